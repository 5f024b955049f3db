"""Verifiers as TRL reward functions, and TRL reward functions as verifiers.

A TRL reward function takes prompts, completions and the data set's columns as keyword arguments, each a list with one
entry per completion, and returns one float (or None: not graded) per completion.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltarl.rewards.host import VerifierHost
from deltarl.rewards.types import Verdict, Verifier

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | Sequence[Mapping[str, Any]]


def as_trl_reward(verifier: Verifier | VerifierHost, gold_column: str = "gold") -> RewardFunction:
    """The verifier as a TRL reward function that takes the gold from the column `gold_column`.

    The other columns reach the verifier as `meta`. An unusable gold gives None, which TRL leaves out of the reward.
    The function raises ValueError when the data set has no such column.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        if gold_column not in columns:
            raise ValueError(f"no column {gold_column!r} in the data set: name the gold's with gold_column=...")
        rows = {k: v for k, v in columns.items() if k != gold_column and _is_column(v, len(completions))}
        items = [
            (completion_text(completion), gold, {k: v[i] for k, v in rows.items()})
            for i, (completion, gold) in enumerate(zip(completions, columns[gold_column], strict=True))
        ]
        if isinstance(verifier, VerifierHost):
            return [verdict.score for verdict in verifier.verify(items)]
        return [verifier.verify(response, gold, meta=meta).score for response, gold, meta in items]

    reward.__name__ = verifier.spec.name if isinstance(verifier, VerifierHost) else verifier.name
    return reward


def from_trl_reward(
    function: RewardFunction, *, gold_column: str = "gold", correct_from: float = 1.0, name: str | None = None
) -> Verifier:
    """A TRL reward function as a verifier; picklable when the function is.

    It is called with one prompt (`meta["prompt"]`, else ""), one completion, the gold under `gold_column` and every
    other entry of `meta` as columns of one row. A reward from `correct_from` is "correct", None is "gold_error".
    """
    return _TrlVerifier(function, gold_column, correct_from, name or function.__name__)


def completion_text(completion: Completion) -> str:
    """A completion's text: itself, or the content of the last of its chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class _TrlVerifier:
    version = "1"

    def __init__(self, function: RewardFunction, gold_column: str, correct_from: float, name: str) -> None:
        self.function = function
        self.gold_column = gold_column
        self.correct_from = correct_from
        self.name = name

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        columns = {key: [value] for key, value in meta.items() if key != "prompt"} | {self.gold_column: [gold]}
        (score,) = self.function(prompts=[meta.get("prompt", "")], completions=[response], **columns)
        if score is None:
            return Verdict(None, "gold_error", info={"reason": f"{self.name} did not grade it"})
        return Verdict(float(score), "correct" if score >= self.correct_from else "incorrect", response)


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rows
