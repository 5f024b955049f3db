"""The `length` verifier: rewards that look at a response's length alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deltarl.rewards.types import Verdict

Shape = Literal["target", "overlong", "kimi"]
Unit = Literal["tokens", "characters", "words"]
NEEDED = {"target": ("target",), "overlong": ("limit", "cache"), "kimi": ("correct",)}


class LengthVerifier:
    """Scores a response by its length; the gold is not looked at.

    shape: "target" gives 1 within `tolerance` of `target`, falling linearly to 0 over a further `target` on either
    side. "overlong" is DAPO's soft overlong punishment (`overlong_punishment`) with L_max = `limit` and L_cache =
    `cache`: -1 to 0. "kimi" is the length reward of Kimi k1.5 (`kimi_length_reward`), -0.5 to 0.5, among the samples
    of one prompt; whether the response is right is told by the part `correct` of a `combine` verifier, which must come
    before this one.
    unit: "tokens" (`meta["n_tokens"]`), "characters" or "words" (between white space) of the response.

    A trainer gives `n_tokens`, the response's tokens, and `group_lengths`, those of every response to the same prompt.
    The status is correct where the length costs nothing: within tolerance, not over limit - cache, or a "kimi" reward
    that is not negative. Raises ValueError for options that do not fit the shape, and in `verify` where `meta` lacks
    what is needed.
    """

    name = "length"
    version = "1"

    def __init__(
        self,
        shape: Shape,
        unit: Unit = "tokens",
        target: int | None = None,
        tolerance: int = 0,
        limit: int | None = None,
        cache: int | None = None,
        correct: str | None = None,
    ) -> None:
        if shape not in NEEDED:
            raise ValueError(f"shape {shape!r}: use {', '.join(NEEDED)}")
        if unit not in ("tokens", "characters", "words"):
            raise ValueError(f"unit {unit!r}: use tokens, characters or words")
        given = {"target": target, "limit": limit, "cache": cache, "correct": correct}
        for option, value in given.items():
            if (value is not None) != (option in NEEDED[shape]):
                raise ValueError(f"shape {shape} takes {', '.join(NEEDED[shape])}: {option} is {value}")
        if shape == "target" and (target < 1 or tolerance < 0):
            raise ValueError(f"target {target} must be at least 1 and tolerance {tolerance} not negative")
        if shape != "target" and tolerance:
            raise ValueError(f"tolerance belongs to shape target, not {shape}")
        if shape == "overlong" and not 0 < cache <= limit:
            raise ValueError(f"cache {cache} must lie between 1 and limit {limit}")
        if shape == "kimi" and unit != "tokens":
            raise ValueError("shape kimi compares the tokens of a group: leave unit at tokens")
        self.shape = shape
        self.unit = unit
        self.target = target
        self.tolerance = tolerance
        self.limit = limit
        self.cache = cache
        self.correct = correct
        self.grouped = shape == "kimi"

    def check_gold(self, gold: str | Sequence[str]) -> None:
        """Any gold will do."""

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        length = self.length(response, meta)
        if self.shape == "target":
            off = max(0, abs(length - self.target) - self.tolerance)
            score, right = max(0.0, 1 - off / self.target), off == 0
        elif self.shape == "overlong":
            score = overlong_punishment(length, self.limit, self.cache)
            right = score == 0
        else:
            score = kimi_length_reward(length, _needed(meta, "group_lengths"), self._is_correct(meta))
            right = score >= 0
        reason = f"{length} {self.unit}"
        return Verdict(score, "correct" if right else "incorrect", info={"reason": reason, "length": length})

    def length(self, response: str, meta: Mapping[str, Any]) -> int:
        """The response's length in the unit of the options."""
        if self.unit == "tokens":
            return _needed(meta, "n_tokens")
        return len(response) if self.unit == "characters" else len(response.split())

    def _is_correct(self, meta: Mapping[str, Any]) -> bool:
        parts = meta.get("parts", {})
        if self.correct not in parts:
            known = ", ".join(parts) or "none"
            raise ValueError(f"no part {self.correct!r} before length (there is {known}): name it in `combine`'s parts")
        return parts[self.correct]["status"] == "correct"


def overlong_punishment(length: int, limit: int, cache: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13): 0 up to limit - cache, falling
    linearly to -1 at limit, and -1 beyond."""
    return max(-1.0, min(0.0, (limit - cache - length) / cache))


def kimi_length_reward(length: int, group_lengths: Sequence[int], correct: bool) -> float:
    """Kimi k1.5's length reward (Kimi Team 2025, arXiv 2501.12599, section 2.3.3).

    lambda = 0.5 - (length - min) / (max - min) over the responses to one prompt, for a right answer; min(0, lambda) for
    a wrong one; 0 where all are of one length. Raises ValueError for a length that is not among the group's.
    """
    low, high = min(group_lengths, default=0), max(group_lengths, default=-1)
    if not low <= length <= high:
        raise ValueError(f"a length of {length} in a group of {low} to {high}: group_lengths holds its own length too")
    if low == high:
        return 0.0
    reward = 0.5 - (length - low) / (high - low)
    return reward if correct else min(0.0, reward)


def _needed(meta: Mapping[str, Any], key: str) -> Any:
    if key not in meta:
        raise ValueError(f"no {key!r} in meta: the caller must give it, as a trainer does")
    return meta[key]
