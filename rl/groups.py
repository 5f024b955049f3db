"""The samples of one problem on their way from the engine to the learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from deltarl.rewards import Verdict
from deltarl.rl.batch import Sample
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace


@dataclass
class Group:
    """`size` samples of a problem. `number` counts the groups of a run from 0, in the order in which they are drawn.

    traces: None where nothing was drawn yet; finish_reason "suspended" where the completion has not ended. texts and
    verdicts: None until the completion has ended, and was verified. dropped: why the learner will not see it.
    """

    number: int
    problem: Problem
    size: int
    traces: list[Trace | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    verdicts: list[Verdict | None] = field(default_factory=list)
    dropped: str | None = None

    def __post_init__(self) -> None:
        if not self.traces:
            self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing drawn."""
        self.traces: list[Trace | None] = [None] * self.size
        self.texts: list[str | None] = [None] * self.size
        self.verdicts: list[Verdict | None] = [None] * self.size
        self.dropped = None

    @property
    def complete(self) -> bool:
        """Whether every sample has its verdict."""
        return None not in self.verdicts

    @property
    def ungradable(self) -> bool:
        """Whether the gold was found unusable, which it is for every sample."""
        return any(verdict is not None and verdict.score is None for verdict in self.verdicts)

    @property
    def equal(self) -> bool:
        """Whether all rewards of a complete group are equal: nothing can be learned from it against its own mean."""
        return len({verdict.score for verdict in self.verdicts}) == 1

    @property
    def successes(self) -> int:
        """Samples that were found correct."""
        return sum(verdict is not None and verdict.status == "correct" for verdict in self.verdicts)

    @property
    def graded(self) -> int:
        """Samples that have a score."""
        return sum(verdict is not None and verdict.score is not None for verdict in self.verdicts)

    def seeds(self, seed: int) -> list[int]:
        """The seed of each sample's random draws, by the job's seed and the group's number."""
        return np.random.SeedSequence([seed, self.number]).generate_state(self.size).tolist()

    def samples(self) -> list[Sample]:
        """What the learner is given of a complete group."""
        rows = zip(self.traces, self.texts, self.verdicts, strict=True)
        return [Sample(self.problem, trace, text, verdict) for trace, text, verdict in rows]

    def state_dict(self, *, drawn: bool) -> dict[str, Any]:
        """The group as plain values; with `drawn` what was drawn of it, else its place alone."""
        state: dict[str, Any] = {"number": self.number, "problem": self.problem.id}
        if drawn:
            state |= {
                "traces": [trace and _plain(trace) for trace in self.traces],
                "texts": list(self.texts),
                "verdicts": [verdict and asdict(verdict) for verdict in self.verdicts],
            }
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], problems: Mapping[str, Problem], size: int) -> Group:
        """The group that gave `state`; `problems` by id."""
        return cls(
            state["number"],
            problems[state["problem"]],
            size,
            [trace and _restored(trace) for trace in state.get("traces", ())],
            list(state.get("texts", ())),
            [verdict and Verdict(**verdict) for verdict in state.get("verdicts", ())],
        )


def _plain(trace: Trace) -> dict[str, Any]:
    routing = None if trace.routing is None else trace.routing.tolist()
    return {**asdict(replace(trace, routing=None)), "routing": routing}


def _restored(state: Mapping[str, Any]) -> Trace:
    routing = state["routing"]
    return Trace(**{**state, "routing": None if routing is None else torch.tensor(routing, dtype=torch.int16)})
