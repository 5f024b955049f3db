"""What an algorithm does around the loss: rewards, targets, number of minibatches, the critic, and what it adapts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltarl.rl.batch import Batch
from deltarl.rl.critic import Critic
from deltarl.rl.jobs import RLConfig
from deltarl.rl.kimi import AdaptiveKL, adapted_minibatches, length_penalties
from deltarl.rl.losses import effective_sample_size, explained_variance
from deltarl.rl.objective import MicroBatch, Tally, critic_loss, policy_loss
from deltarl.rl.targets import Targets, make_targets


@dataclass(frozen=True)
class Scores:
    """What was computed about a batch before its first update, of completion tokens [N, T], right-padded with zeros.

    old, reference: logprobs under the policy and the reference; sampler: as recorded; values: the critic's. None where
    the algorithm has no use for it.
    """

    mask: Tensor
    sampler: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None


class Algorithm:
    """GRPO, PPO or Kimi's recipe, as `rl` says. One object goes through a run; its state belongs into checkpoints.

    critic: PPO's.
    """

    def __init__(self, rl: RLConfig, critic: Critic | None = None) -> None:
        self.rl, self.critic = rl, critic
        kimi = rl.kimi
        self.tau = None if kimi is None else AdaptiveKL(kimi.tau, kimi.target_kl or 0.0)
        self._measured: dict[str, float] = {}

    def to(self, device: torch.device) -> None:
        """Move what has weights there."""
        if self.critic is not None:
            self.critic.to(device)

    @property
    def needs_old(self) -> bool:
        """Whether the policy's logprobs are needed before the first update, beyond what that update computes itself."""
        rl = self.rl
        several = rl.minibatches * rl.num_iterations > 1
        return several or rl.kl_in == "reward" or self.critic is not None

    def learns_policy(self, step: int) -> bool:
        """Whether the policy learns in the RL step after `step` completed ones; the critic may learn alone at first."""
        return self.critic is None or step >= self.critic.settings.warmup_steps

    def begin(self, batch: Batch, scores: Scores, step: int) -> Targets:
        """What the policy and the critic learn towards in the RL step after `step` completed ones."""
        self._measured = {}
        targets = make_targets(
            self.rl,
            self._rewards(batch, step),
            batch.group,
            scores.mask,
            old=scores.old,
            reference=scores.reference,
            values=scores.values,
        )
        if scores.values is not None:
            graded = scores.mask * ~targets.returns.isnan()
            explained = explained_variance(scores.values, targets.returns.nan_to_num(0.0), graded)
            self._measured["explained_variance"] = explained.item()
        return targets

    def minibatches(self, scores: Scores) -> int:
        """Into how many minibatches the batch is cut."""
        most = self.rl.minibatches
        if self.rl.kimi is None or not self.rl.kimi.adapt_minibatches or most == 1:
            return most
        gap = ((scores.old - scores.sampler) * scores.mask).nan_to_num(nan=0.0)
        number = adapted_minibatches(most, effective_sample_size(gap.exp(), scores.mask).item())
        self._measured["minibatches"] = number
        return number

    def loss(self, batch: MicroBatch, step: int, tally: Tally) -> Tensor:
        """The micro-batch's share of everything that learns from traces in the RL step after `step` completed ones."""
        loss = policy_loss(self.rl, batch, tally, tau=None if self.tau is None else self.tau.coefficient)
        if self.critic is None:
            return loss
        values = critic_loss(self.rl, batch, tally)
        return loss + values if self.learns_policy(step) else values

    def after_update(self) -> None:
        """The critic's own optimizer step. Collective."""
        if self.critic is not None:
            self._measured["critic_grad_norm"] = self.critic.update(self.rl.max_grad_norm)

    def after_step(self, tallied: Mapping[str, float]) -> dict[str, float]:
        """Adapt to what was tallied in a step; what there is to add to it."""
        if self.tau is not None:
            self._measured["tau"] = self.tau.coefficient
            if self.rl.kimi.target_kl is not None:
                self.tau.update(tallied["update_kl"])
        return self._measured

    def state_dict(self) -> dict[str, Any]:
        """The critic, what has been adapted, and what was measured in a step that has begun."""
        return {
            "measured": dict(self._measured),
            "tau": None if self.tau is None else self.tau.state_dict(),
            "critic": None if self.critic is None else self.critic.learned(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self._measured = dict(state["measured"])
        if self.tau is not None:
            self.tau.load_state_dict(state["tau"])
        if self.critic is not None:
            self.critic.go_on(state["critic"])

    def _rewards(self, batch: Batch, step: int) -> Tensor:
        kimi = self.rl.kimi
        if kimi is None or kimi.length_weight == 0 or step < kimi.length_warmup:
            return batch.rewards
        verdicts = [sample.verdict for sample in batch.samples]
        lengths = [len(sample.trace.completion_ids) for sample in batch.samples]
        penalties = length_penalties(verdicts, lengths, batch.group, kimi.length_weight)
        self._measured["length_reward"] = sum(penalties) / len(penalties)
        return batch.rewards + torch.tensor(penalties)
