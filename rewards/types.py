"""What a verifier is given and what it answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

Status = Literal["correct", "incorrect", "no_answer", "gold_error", "timeout", "limit", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNUSABLE: tuple[Status, ...] = ("gold_error", "timeout", "limit", "error")  # nothing was said about the response


@dataclass(frozen=True, slots=True)
class Verdict:
    """One graded response.

    score: the reward, finite; None exactly when the gold is unusable (status "gold_error"), never turned into 0.
    extracted: the text that was graded, None where no answer was found.
    info: anything else worth logging, made of plain values; `info["reason"]` says in one line why.

    Raises ValueError for an unknown status, a score that is not finite, or a score that disagrees with "gold_error".
    """

    score: float | None
    status: Status
    extracted: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown verdict status {self.status!r}: use one of {', '.join(STATUSES)}")
        if (self.score is None) != (self.status == "gold_error"):
            raise ValueError(f"score {self.score!r} with status {self.status!r}: None belongs to gold_error alone")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"score {self.score!r} is not finite: a reward must be a finite number")


@runtime_checkable
class Verifier(Protocol):
    """A plain, picklable object; uses no signals, no threads, no eval.

    Two further methods are called where they exist: `check_gold(gold) -> str | None` says in one line why a gold
    cannot be graded against, and `warm_up() -> None` does slow imports before the first deadline starts. One that reads
    `meta["group_lengths"]` says so by an attribute `grouped = True`: a response is then verified when every response
    to its prompt is there, and not as soon as it ends itself.
    """

    name: str
    version: str

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """A verifier by name, as a job file gives it.

    name: a built-in ("math"), an installed package's entry point, "package.module:attr" or "path/to/file.py:attr".
    options: keyword arguments of its factory.
    """

    name: str = "math"
    options: Mapping[str, Any] = field(default_factory=dict)
