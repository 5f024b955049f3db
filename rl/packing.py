"""Sequences of different lengths laid end to end, up to a budget of tokens, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deltarl.rollout import Trace


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in groups of at most `budget` together: first fit, longest first, ties by index.

    Raises ValueError for a length over the budget.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > budget:
            raise ValueError(f"a sequence of {lengths[index]} tokens does not fit a budget of {budget}")
        place = next((place for place, free in enumerate(room) if free >= lengths[index]), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(budget)
        groups[place].append(index)
        room[place] -= lengths[index]
    return groups


@dataclass(frozen=True)
class Pack:
    """Some sequences of a batch end to end.

    rows: their indices in the batch; ids [T]: all their tokens, prompt and completion; lengths, completions: tokens of
    each sequence, and of its completion; before [S]: where in `ids` the token before each completion token stands.
    """

    rows: list[int]
    ids: Tensor
    lengths: list[int]
    completions: list[int]
    before: Tensor

    @property
    def targets(self) -> Tensor:
        """The completion tokens [S], sequence after sequence."""
        return self.ids[self.before + 1]

    def to(self, device: torch.device) -> Pack:
        """The same with its tensors on `device`."""
        return Pack(self.rows, self.ids.to(device), self.lengths, self.completions, self.before.to(device))

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of the completion tokens [S, ...] by sequence."""
        return list(values.split(self.completions))

    def to_rows(self, values: Tensor) -> Tensor:
        """Values of the completion tokens [S, ...] right-padded with zeros: [B, longest completion, ...]."""
        return pad_sequence(self.split(values), batch_first=True)

    def mask(self) -> Tensor:
        """[B, longest completion], 1 where `to_rows` has a token."""
        return self.to_rows(torch.ones_like(self.before))


def make_pack(traces: Sequence[Trace], rows: Sequence[int]) -> Pack:
    """The traces of those rows as one pack."""
    chosen = [traces[row] for row in rows]
    lengths = [len(trace.prompt_ids) + len(trace.completion_ids) for trace in chosen]
    before, start = [], 0
    for trace, length in zip(chosen, lengths, strict=True):
        first = start + len(trace.prompt_ids) - 1
        before += range(first, first + len(trace.completion_ids))
        start += length
    return Pack(
        rows=list(rows),
        ids=torch.tensor([token for trace in chosen for token in (*trace.prompt_ids, *trace.completion_ids)]),
        lengths=lengths,
        completions=[len(trace.completion_ids) for trace in chosen],
        before=torch.tensor(before),
    )


def make_packs(traces: Sequence[Trace], rows: Sequence[int], budget: int) -> list[Pack]:
    """The traces of those rows in packs of at most `budget` tokens; the same traces give the same packs."""
    lengths = [len(traces[row].prompt_ids) + len(traces[row].completion_ids) for row in rows]
    return [make_pack(traces, [rows[index] for index in group]) for group in first_fit(lengths, budget)]
