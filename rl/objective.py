"""GRPO and its family: one micro-batch of traces and the job's settings give the loss, and what is logged about it."""

from __future__ import annotations

from dataclasses import dataclass

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
)

NORMALISATION = {"grpo": "sequence", "dr_grpo": "length", "dapo": "token", "cispo": "token", "bnpo": "token"}


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of the batch of one optimizer step, right-padded, [B, T] where nothing else is said.

    logprobs carries the gradient; entropies in nats; advantages [B, 1] or [B, T]; old: the policy's logprobs before
    this batch's first update; sampler: those recorded when each token was drawn; reference: None without a KL term.
    sequences, tokens: of the whole batch of the optimizer step.
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


class Tally:
    """Means and largest values over the tokens of several micro-batches, kept on the device until they are taken."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.largest: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add values [B, T] where the mask is 1, or one value per sequence [B, 1]."""
        weights = mask if values.shape == mask.shape else torch.ones_like(values)
        total, count = (values.detach() * weights).sum().double(), weights.sum().double()
        if name in self.sums:
            before, counted = self.sums[name]
            total, count = before + total, counted + count
        self.sums[name] = total, count

    def max(self, name: str, values: Tensor, mask: Tensor) -> None:
        """The largest of values [B, T] where the mask is true; a name that has none is left out of what is taken."""
        largest = torch.where(mask, values.detach(), -torch.inf).max().double()
        self.largest[name] = torch.maximum(self.largest[name], largest) if name in self.largest else largest

    def take(self) -> dict[str, float]:
        """Everything so far; starts anew."""
        found = {name: total / count.clamp(min=1.0) for name, (total, count) in self.sums.items()} | self.largest
        self.sums, self.largest = {}, {}
        if not found:
            return {}
        values = zip(found, torch.stack(list(found.values())).tolist(), strict=True)
        return {name: value for name, value in values if value != -torch.inf}


def grpo_loss(rl: RLConfig, batch: MicroBatch, tally: Tally) -> Tensor:
    """The micro-batch's share of the loss of its optimizer step, a scalar:

        mean over tokens, as `rl.loss_type` takes it, of   c * surrogate + beta * KL - entropy_bonus * H

    with c the off-policy correction of `rl.importance_sampling`, which is 1 for the samples of an engine that agrees
    with the learner. Formulas: deltarl.rl.losses.
    """
    mask, level = batch.mask, rl.importance_sampling_level
    if rl.loss_type == "cispo":
        surrogate = cispo(batch.logprobs, batch.old, batch.advantages, mask, weight_cap=rl.epsilon_high, level=level)
    else:
        surrogate = clipped_surrogate(
            batch.logprobs,
            batch.old,
            batch.advantages,
            mask,
            epsilon=rl.epsilon,
            epsilon_high=rl.epsilon_high,
            level=level,
        )
    loss = surrogate.loss * _correction(rl, batch, tally)
    if batch.reference is not None:
        kl = kl_estimate(batch.logprobs, batch.reference, rl.kl_estimator)
        loss = loss + rl.beta * kl
        tally.mean("kl", kl if rl.kl_estimator == "k3" else kl_estimate(batch.logprobs, batch.reference), mask)
    if rl.entropy_bonus:
        loss = loss - rl.entropy_bonus * batch.entropies
    tally.mean("entropy", batch.entropies, mask)
    tally.mean("clip_ratio", surrogate.clipped.float(), mask)
    tokens = float(mask.sum()) * batch.sequences / len(mask) if rl.loss_type == "bnpo" else batch.tokens
    return aggregate(
        loss.expand_as(batch.logprobs),
        mask,
        NORMALISATION[rl.loss_type],
        sequences=batch.sequences,
        tokens=tokens,
        max_length=rl.max_completion_length,
    )


def _correction(rl: RLConfig, batch: MicroBatch, tally: Tally) -> Tensor:
    """Importance weights of the policy before this batch's updates against the engine's; what parts them is tallied."""
    gap = (batch.old - batch.sampler).detach()
    inside = batch.mask.bool() & ~gap.isnan()
    tally.mean("logp_gap_mean", gap.abs().nan_to_num(nan=0.0), inside)
    tally.max("logp_gap_max", gap.abs(), inside)
    tally.mean("engine_kl", kl_estimate(batch.sampler.double(), batch.old.double()).nan_to_num(nan=0.0), inside)
    mode = "token_truncate" if rl.importance_sampling == "none" else rl.importance_sampling
    weights = correction_weights(batch.old, batch.sampler, batch.mask, mode, cap=rl.importance_sampling_cap)
    weighed = batch.mask if weights.shape == batch.mask.shape else torch.ones_like(weights)
    tally.mean("is_ratio_mean", weights, batch.mask)
    tally.mean("is_ess", effective_sample_size(weights, weighed).view(1, 1), batch.mask)
    return torch.ones_like(weights) if rl.importance_sampling == "none" else weights
