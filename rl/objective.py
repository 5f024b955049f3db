"""The loss: one micro-batch of traces and the job's settings give it, and what is logged about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltarl.rl.jobs import RLConfig
from deltarl.rl.losses import (
    aggregate,
    cispo,
    clipped_surrogate,
    correction_weights,
    effective_sample_size,
    kl_estimate,
    mirror_descent,
    value_loss,
)
from deltarl.rl.losses.policy import Surrogate
from deltarl.rl.sharding import gathered, processes

NORMALISATION = {"grpo": "sequence", "dr_grpo": "length", "dapo": "token", "cispo": "token", "bnpo": "token"}


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of the batch of one optimizer step, right-padded, [B, T] where nothing else is said.

    logprobs carries the gradient; entropies in nats; advantages [B, 1] or [B, T]; old: the policy's logprobs before
    this batch's first update; sampler: those recorded when each token was drawn; reference: None without a KL term.
    sequences, tokens: of the whole batch of the optimizer step.
    values, old_values, returns: PPO's, of the critic now (with its gradient), before this batch's first update, and
    what it learns towards, NaN where nothing was graded.
    """

    logprobs: Tensor
    entropies: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor
    sampler: Tensor
    reference: Tensor | None
    sequences: float
    tokens: float
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


class Tally:
    """Means and largest values over the tokens of several micro-batches, kept on the device until they are taken.

    counting: turned off, nothing is added.
    """

    def __init__(self) -> None:
        self.counting = True
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.largest: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add values [B, T] where the mask is 1, or one value per sequence [B, 1]."""
        if not self.counting:
            return
        weights = mask if values.shape == mask.shape else torch.ones_like(values)
        total, count = (values.detach() * weights).sum().double(), weights.sum().double()
        if name in self.sums:
            before, counted = self.sums[name]
            total, count = before + total, counted + count
        self.sums[name] = total, count

    def max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """The largest of values [B, T] where the mask is true; a name that has none is left out of what is taken."""
        if not self.counting:
            return
        largest = torch.where(mask, values.detach(), -torch.inf).max().double()
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest

    def of_all_processes(self) -> Tally:
        """What all processes of the learner have together; starts anew itself. Collective."""
        if processes() == 1:
            return self
        together = Tally()
        for part in gathered(self.state_dict("cpu")):
            for name, (total, count) in part["sums"].items():
                before, counted = together.sums.get(name, (0.0, 0.0))
                together.sums[name] = before + total, counted + count
            for name, value in part["largest"].items():
                together.largest[name] = torch.maximum(together.largest.get(name, value), value)
        self.sums, self.largest = {}, {}
        return together

    def copy(self) -> Tally:
        """The same so far, to go back to."""
        other = Tally()
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self, device: str | None = None) -> dict[str, Any]:
        """Everything so far, still in sums, on a device if one is named."""
        return {
            "sums": {name: (total.to(device), count.to(device)) for name, (total, count) in self.sums.items()},
            "largest": {name: value.to(device) for name, value in self.largest.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.sums, self.largest = dict(state["sums"]), dict(state["largest"])

    def take(self) -> dict[str, float]:
        """Everything so far; starts anew."""
        found = {name: total / count.clamp(min=1.0) for name, (total, count) in self.sums.items()} | self.largest
        self.sums, self.largest = {}, {}
        if not found:
            return {}
        device = next(reversed(found.values())).device  # what a checkpoint gave back lies on the CPU
        values = zip(found, torch.stack([value.to(device) for value in found.values()]).tolist(), strict=True)
        return {name: value for name, value in values if value != -torch.inf}


def policy_loss(rl: RLConfig, batch: MicroBatch, tally: Tally, *, tau: float | None = None) -> Tensor:
    """The micro-batch's share of the policy's loss in its optimizer step, a scalar. Formulas: deltarl.rl.losses.

    grpo, ppo: the mean over tokens, as `rl.loss_type` takes it, of

        c * surrogate + beta * KL - entropy_bonus * H

    kimi: the mean over sequences of mirror descent's loss at `tau`, its tokens weighed by c, and of the sums over each
    sequence of the other two terms.

    c: the off-policy correction of `rl.importance_sampling`, which is 1 for the samples of an engine that agrees with
    the learner. KL: to the reference, unless `rl.kl_in` puts it into the rewards.
    """
    mask = batch.mask
    correction = _correction(rl, batch, tally)
    extra = _regularisers(rl, batch, tally)
    tally.mean("update_kl", kl_estimate(batch.old, batch.logprobs.detach()), mask)
    if rl.algorithm == "kimi":
        loss = mirror_descent(batch.logprobs, batch.old, batch.advantages, mask, tau=tau, weights=correction)
        return (loss + (extra * mask).sum(-1, keepdim=True)).sum() / batch.sequences
    surrogate = _surrogate(rl, batch)
    tally.mean("clip_ratio", surrogate.clipped.float(), mask)
    loss = (surrogate.loss * correction + extra).expand_as(batch.logprobs)
    tokens = float(mask.sum()) * batch.sequences / len(mask) if rl.loss_type == "bnpo" else batch.tokens
    return aggregate(
        loss,
        mask,
        NORMALISATION[rl.loss_type],
        sequences=batch.sequences,
        tokens=tokens,
        max_length=rl.max_completion_length,
    )


def critic_loss(rl: RLConfig, batch: MicroBatch, tally: Tally) -> Tensor:
    """The micro-batch's share of the value loss in its optimizer step: the mean over tokens, a scalar."""
    graded = batch.mask * ~batch.returns.isnan()
    returns = batch.returns.nan_to_num(0.0)
    loss = value_loss(batch.values, batch.old_values, returns, clip=rl.critic.value_clip)
    tally.mean("value_loss", loss, graded)
    return (loss * graded).sum() / max(batch.tokens, 1)


def _surrogate(rl: RLConfig, batch: MicroBatch) -> Surrogate:
    level = rl.importance_sampling_level
    given = (batch.logprobs, batch.old, batch.advantages, batch.mask)
    if rl.loss_type == "cispo":
        return cispo(*given, weight_cap=rl.epsilon_high, level=level)
    return clipped_surrogate(*given, epsilon=rl.epsilon, epsilon_high=rl.epsilon_high, level=level)


def _regularisers(rl: RLConfig, batch: MicroBatch, tally: Tally) -> Tensor:
    """beta * KL - entropy_bonus * H of each token [B, T], as far as the job has them in its loss."""
    mask, extra = batch.mask, torch.zeros_like(batch.logprobs)
    tally.mean("entropy", batch.entropies, mask)
    if batch.reference is not None:
        kl = kl_estimate(batch.logprobs, batch.reference, rl.kl_estimator)
        tally.mean("kl", kl if rl.kl_estimator == "k3" else kl_estimate(batch.logprobs, batch.reference), mask)
        if rl.kl_in == "loss":
            extra = extra + rl.beta * kl
    return extra - rl.entropy_bonus * batch.entropies if rl.entropy_bonus else extra


def _correction(rl: RLConfig, batch: MicroBatch, tally: Tally) -> Tensor:
    """Importance weights of the policy before this batch's updates against the engine's; what parts them is tallied."""
    gap = (batch.old - batch.sampler).detach()
    inside = batch.mask.bool() & ~gap.isnan()
    tally.mean("logp_gap_mean", gap.abs().nan_to_num(nan=0.0), inside)
    tally.max("logp_gap_max", gap.abs(), inside)
    tally.mean("engine_kl", kl_estimate(batch.sampler.double(), batch.old.double()).nan_to_num(nan=0.0), inside)
    mode = "token_truncate" if rl.importance_sampling == "none" else rl.importance_sampling
    limits = {"cap": rl.importance_sampling_cap, "floor": rl.importance_sampling_floor}
    weights = correction_weights(batch.old, batch.sampler, batch.mask, mode, **limits)
    weighed = batch.mask if weights.shape == batch.mask.shape else torch.ones_like(weights)
    tally.mean("is_ratio_mean", weights, batch.mask)
    tally.mean("is_ess", effective_sample_size(weights, weighed).view(1, 1), batch.mask)
    return torch.ones_like(weights) if rl.importance_sampling == "none" else weights
