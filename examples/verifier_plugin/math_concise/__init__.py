"""A verifier that pays for right answers, and a little less for right answers that take long to say."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltarl.rewards import Verdict
from deltarl.rewards.math import MathVerifier


class ConciseMathVerifier:
    """The `math` verdict; a correct response longer than `target_chars` loses `penalty` in proportion to the excess.

    The whole penalty is lost from twice the target on: score = 1 - penalty * min(1, max(0, n / target - 1)).
    Further options are the `math` verifier's own.
    """

    name = "math_concise"
    version = "1"

    def __init__(self, target_chars: int = 600, penalty: float = 0.5, **math_options: Any) -> None:
        if target_chars < 1 or not 0 <= penalty <= 1:
            raise ValueError("target_chars must be at least 1 and penalty between 0 and 1")
        self.target_chars = target_chars
        self.penalty = penalty
        self.math = MathVerifier(**math_options)

    def warm_up(self) -> None:
        self.math.warm_up()

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        return self.math.check_gold(gold)

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        verdict = self.math.verify(response, gold, meta=meta)
        if verdict.status != "correct":
            return verdict
        excess = min(1.0, max(0.0, len(response) / self.target_chars - 1))
        return Verdict(1.0 - self.penalty * excess, "correct", verdict.extracted, {"chars": len(response)})
