"""What the Kimi recipe adapts between steps: the KL coefficient, the size of the minibatches, the length penalty.

The Kimi Linear report (arXiv 2510.26692, section on RL) says that the KL penalty and the mini-batch size are adjusted
dynamically, and not how. The first law below is PPO's for its KL penalty, the second is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltarl.rewards import Verdict
from deltarl.rewards.length import kimi_length_reward

TOLERANCE = 1.5
FACTOR = 2.0
FARTHEST = 64.0


class AdaptiveKL:
    """tau, the coefficient of the KL to the policy that an iteration began from, held to a measured KL.

    After each step, with d the measured KL and d* the target (Schulman et al. 2017, arXiv 1707.06347, section 4):

        d > 1.5 d*: tau <- 2 tau        d < d* / 1.5: tau <- tau / 2

    and, ours, tau stays within a factor of 64 of where it began, so that steps whose KL cannot be measured (a single
    update, which starts at KL 0) do not carry it away for good.
    """

    def __init__(self, coefficient: float, target: float) -> None:
        self.start = self.coefficient = coefficient
        self.target = target

    def update(self, measured: float) -> None:
        """Take the KL of a step, in nats per token."""
        if measured > TOLERANCE * self.target:
            self.coefficient *= FACTOR
        elif measured < self.target / TOLERANCE:
            self.coefficient /= FACTOR
        self.coefficient = min(max(self.coefficient, self.start / FARTHEST), self.start * FARTHEST)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient reached."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the coefficient that was reached."""
        self.coefficient = state["coefficient"]


def adapted_minibatches(most: int, effective_share: float) -> int:
    """Into how many minibatches a batch is cut whose importance weights have that effective sample size, a share.

    A minibatch of n sequences weighs as much as n x share sequences sampled by the policy itself (Kong 1992). So that
    it weighs what a minibatch of an agreeing engine does, it grows by 1 / share: there are round(most x share) of them,
    and at least one. The share is measured on the batch's own tokens before its first update, with weights that are
    not truncated: the law has no memory, and nothing to checkpoint.
    """
    return max(1, round(most * effective_share))


def length_penalties(verdicts: Sequence[Verdict], lengths: Sequence[int], group: int, weight: float) -> list[float]:
    """weight x `kimi_length_reward` of every trace, added to its reward (k1.5, arXiv 2501.12599, section 2.3.3).

    verdicts, lengths: of the traces, group after group; lengths in completion tokens. A trace counts as right by its
    verdict's status.
    """
    penalties = []
    for index, (verdict, length) in enumerate(zip(verdicts, lengths, strict=True)):
        first = index - index % group
        reward = kimi_length_reward(length, lengths[first : first + group], verdict.status == "correct")
        penalties.append(weight * reward)
    return penalties
