"""Verifiers as TRL reward functions, and TRL reward functions as verifiers.

A TRL reward function takes prompts, completions and the data set's columns as keyword arguments, each a list with one
entry per completion, and returns one float (or None: not graded) per completion. It may be a coroutine function.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from deltarl.rewards.host import Item, VerifierHost
from deltarl.rewards.types import Verdict, Verifier

Rewards = Sequence[float | None]
RewardFunction = Callable[..., Rewards]
AsyncRewardFunction = Callable[..., Awaitable[Rewards]]
Completion = str | Sequence[Mapping[str, Any]]
TOKENS = "completion_ids"


def as_trl_reward(verifier: Verifier | VerifierHost, gold_column: str = "gold") -> RewardFunction:
    """The verifier as a TRL reward function that takes the gold from the column `gold_column`.

    The prompt and the other columns reach the verifier as `meta`. An unusable gold gives None, which TRL leaves out of
    the reward. The function raises ValueError when the data set has no such column.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        items = _items(prompts, completions, columns, gold_column)
        if isinstance(verifier, VerifierHost):
            return [verdict.score for verdict in verifier.verify(items)]
        return [verifier.verify(response, gold, meta=meta).score for response, gold, meta in items]

    reward.__name__ = verifier.spec.name if isinstance(verifier, VerifierHost) else verifier.name
    return reward


def as_async_trl_reward(host: VerifierHost, gold_column: str = "gold") -> AsyncRewardFunction:
    """As `as_trl_reward`, as a coroutine function: TRL runs all of a trainer's at the same time, in one event loop."""

    async def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        futures = [host.submit(item) for item in _items(prompts, completions, columns, gold_column)]
        return [verdict.score for verdict in await asyncio.gather(*map(asyncio.wrap_future, futures))]

    reward.__name__ = host.spec.name
    return reward


def from_trl_reward(
    function: RewardFunction | AsyncRewardFunction,
    *,
    gold_column: str = "gold",
    correct_from: float = 1.0,
    name: str | None = None,
) -> Verifier:
    """A TRL reward function as a verifier; picklable when the function is.

    It is called with one prompt (`meta["prompt"]`, else ""), one completion, the gold under `gold_column` and every
    other entry of `meta` as columns of one row; a coroutine is run to its end. A reward from `correct_from` is
    "correct", None is "gold_error".
    """
    return _TrlVerifier(function, gold_column, correct_from, name or function.__name__)


def completion_text(completion: Completion) -> str:
    """A completion's text: itself, or the content of the last of its chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class _TrlVerifier:
    version = "1"

    def __init__(
        self, function: RewardFunction | AsyncRewardFunction, gold_column: str, correct_from: float, name: str
    ) -> None:
        self.function = function
        self.gold_column = gold_column
        self.correct_from = correct_from
        self.name = name

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        columns = {key: [value] for key, value in meta.items() if key != "prompt"} | {self.gold_column: [gold]}
        rewards = self.function(prompts=[meta.get("prompt", "")], completions=[response], **columns)
        (score,) = asyncio.run(_result(rewards)) if inspect.isawaitable(rewards) else rewards
        if score is None:
            return Verdict(None, "gold_error", info={"reason": f"{self.name} did not grade it"})
        return Verdict(float(score), "correct" if score >= self.correct_from else "incorrect", response)


async def _result(rewards: Awaitable[Rewards]) -> Rewards:
    return await rewards


def _items(
    prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any], gold_column: str
) -> list[Item]:
    if gold_column not in columns:
        raise ValueError(f"no column {gold_column!r} in the data set: name the gold's with gold_column=...")
    left_out = (gold_column, TOKENS)
    rows = {k: v for k, v in columns.items() if k not in left_out and _is_column(v, len(completions))}
    return [
        (completion_text(completion), gold, {"prompt": prompt} | {k: v[i] for k, v in rows.items()})
        for i, (prompt, completion, gold) in enumerate(zip(prompts, completions, columns[gold_column], strict=True))
    ]


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rows
