"""Sequences of different lengths laid end to end, up to a budget of tokens, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

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


def alike(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths`, longest first, in groups that the budget holds when each is as long as its group's longest.

    Raises ValueError for a length over the budget.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > budget:
            raise ValueError(f"a sequence of {lengths[index]} tokens does not fit a budget of {budget}")
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass(frozen=True)
class Pack:
    """Some sequences of a batch end to end, and the tokens of them that are scored: those of their completions.

    rows: their indices in the batch; ids [T]: all their tokens, prompt and completion; lengths, completions: tokens of
    each sequence, and of its completion; before [S]: where in `ids` the token before each completion token stands.
    routing [T, sparse layers, top_k]: the experts that the engine sent the tokens to, negative where that is unknown;
    None where it was not recorded.
    """

    rows: list[int]
    ids: Tensor
    lengths: list[int]
    completions: list[int]
    before: Tensor
    routing: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The completion tokens [S], sequence after sequence."""
        return self.ids[self.before + 1]

    def to(self, device: torch.device) -> Pack:
        """The same with its tensors on `device`."""
        routing = None if self.routing is None else self.routing.to(device)
        return replace(self, ids=self.ids.to(device), before=self.before.to(device), routing=routing)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of the completion tokens [S, ...] by sequence."""
        return list(values.split(self.completions))

    def to_rows(self, values: Tensor) -> Tensor:
        """Values of the completion tokens [S, ...] right-padded with zeros: [B, longest completion, ...]."""
        return pad_sequence(self.split(values), batch_first=True)

    def mask(self) -> Tensor:
        """[B, longest completion], 1 where `to_rows` has a token."""
        return self.to_rows(torch.ones_like(self.before))


class Marked(NamedTuple):
    """A sequence, and which of its tokens are scored: positions of 1 or more, ascending."""

    ids: list[int]
    places: list[int]


def completion_of(trace: Trace) -> Marked:
    """A trace, its completion to be scored."""
    ids = [*trace.prompt_ids, *trace.completion_ids]
    return Marked(ids, list(range(len(trace.prompt_ids), len(ids))))


def make_pack(sequences: Sequence[Trace | Marked], rows: Sequence[int]) -> Pack:
    """The sequences of those rows as one pack."""
    chosen = [completion_of(found) if isinstance(found := sequences[row], Trace) else found for row in rows]
    routings = [found.routing for row in rows if isinstance(found := sequences[row], Trace)]
    recorded = bool(routings) and routings[0] is not None
    starts = accumulate((len(sequence.ids) for sequence in chosen[:-1]), initial=0)
    return Pack(
        rows=list(rows),
        ids=torch.tensor([token for sequence in chosen for token in sequence.ids]),
        lengths=[len(sequence.ids) for sequence in chosen],
        completions=[len(sequence.places) for sequence in chosen],
        before=torch.tensor([start + at - 1 for start, s in zip(starts, chosen, strict=True) for at in s.places]),
        routing=torch.cat(routings).long() if recorded else None,
    )


def make_packs(
    sequences: Sequence[Trace | Marked], rows: Sequence[int], budget: int, *, padded: bool = False
) -> list[Pack]:
    """The sequences of those rows in packs of at most `budget` tokens; the same sequences give the same packs.

    padded: what counts is the tokens of a pack whose sequences are all padded to its longest.
    """
    chosen = [sequences[row] for row in rows]
    lengths = [len(s.prompt_ids) + len(s.completion_ids) if isinstance(s, Trace) else len(s.ids) for s in chosen]
    groups = alike(lengths, budget) if padded else first_fit(lengths, budget)
    return [make_pack(sequences, [rows[index] for index in group]) for group in groups]
