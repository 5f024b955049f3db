"""Policy objectives per token or sequence, and how they become one number."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Level = Literal["token", "sequence"]
Normalisation = Literal["sequence", "length", "token"]


class Surrogate(NamedTuple):
    """loss: [B, T], or [B, 1] at the level of sequences; clipped: where the gradient was cut, of the same shape."""

    loss: Tensor
    clipped: Tensor


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: Level) -> Tensor:
    """log pi / pi_old, per token [B, T] or the mean over a sequence's tokens [B, 1] (GSPO: arXiv 2507.18071, eq. 7)."""
    difference = logprobs - old_logprobs
    if level == "token":
        return difference
    return ((difference * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    level: Level = "token",
) -> Surrogate:
    """-min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A), w = pi / pi_old.

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), GRPO (arXiv 2402.03300, eq. 3); a larger `epsilon_high` is
    DAPO's clip-higher (arXiv 2503.14476, section 3.1); level "sequence" is GSPO (arXiv 2507.18071, eq. 5). advantages
    [B, 1] or [B, T].
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = log_ratio(logprobs, old_logprobs, mask, level).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return Surrogate(loss, clipped)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weight_cap: float,
    level: Level = "token",
) -> Surrogate:
    """-min(w, weight_cap) A log pi, the weight w = pi / pi_old held constant: no token is left without a gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585, section 3.1).
    """
    ratio = log_ratio(logprobs, old_logprobs, mask, level).exp().detach()
    loss = -ratio.clamp(max=weight_cap) * advantages * logprobs
    return Surrogate(loss, (ratio > weight_cap) & (advantages > 0))


def mirror_descent(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    tau: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Kimi k1.5's policy mirror descent (arXiv 2501.12599, section 2.3.2, whose gradient is its eq. 3), [B, 1]:

        -(A log pi(y|x) - tau / 2 (log pi(y|x) / pi_i(y|x))^2),      A = r - mean reward of the prompt's samples

    with pi_i the policy that the iteration began from. Sums over a sequence's tokens, as in the paper; advantages
    [B, 1]. weights [B, T] or [B, 1] multiply each token's term of both sums, and so its gradient: truncated importance
    weights of pi_i against the engine that sampled (`correction_weights`), as the Kimi Linear report (arXiv 2510.26692)
    adds them to this objective.
    """
    weighed = mask if weights is None else mask * weights
    sequence = (logprobs * weighed).sum(-1, keepdim=True)
    drift = ((logprobs - old_logprobs) * weighed).sum(-1, keepdim=True)
    return -(advantages * sequence - 0.5 * tau * drift.square())


def aggregate(
    loss: Tensor, mask: Tensor, how: Normalisation, *, sequences: float, tokens: float, max_length: int
) -> Tensor:
    """One number from per-token losses [B, T] (or [B, 1]: one per sequence); the micro-batches of a batch add up to it.

    "sequence": the mean over sequences of the mean over each one's tokens (GRPO, arXiv 2402.03300, eq. 3).
    "length":   the sum over tokens by sequences x max_length (Dr. GRPO, arXiv 2503.20783, section 3.2).
    "token":    the mean over all tokens (DAPO, arXiv 2503.14476, section 3.3).

    sequences, tokens: of the whole batch of an optimizer step, of which `loss` may be a part.
    """
    by_sequence = (loss * mask).sum(-1)
    if how == "sequence":
        return (by_sequence / mask.sum(-1).clamp(min=1)).sum() / sequences
    return by_sequence.sum() / (sequences * max_length if how == "length" else max(tokens, 1))


def ptx_loss(logprobs: Tensor, mask: Tensor, *, tokens: float) -> Tensor:
    """-sum log pi / tokens over the supervised tokens: the term that keeps what pre-training or SFT taught.

    (InstructGPT's PPO-ptx: Ouyang et al. 2022, arXiv 2203.02155, eq. 2, on the SFT mix as in Kimi K2, arXiv 2507.20534,
    and Kimi Linear, arXiv 2510.26692.) logprobs, mask of one shape; tokens: supervised ones of the whole step, so that
    its parts add up.
    """
    return -torch.where(mask.bool(), logprobs, 0.0).sum() / max(tokens, 1)
