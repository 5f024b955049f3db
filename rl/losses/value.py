"""What PPO needs besides the policy's surrogate: advantages over tokens, and the critic's loss."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, *, beta: float = 0.0) -> Tensor:
    """r_t = -beta KL_t, plus the sequence's score at its last token: rewards of tokens [B, T], 0 outside the mask.

    (Ziegler et al. 2019, arXiv 1909.08593, eq. 2, its KL spread over the tokens.) scores [B]; kl [B, T], None for no
    such term. A sequence without tokens has no place for its score.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position == (mask * position).argmax(1, keepdim=True)) * mask
    rewards = scores.unsqueeze(1) * last
    return rewards if kl is None else rewards - beta * torch.where(mask.bool(), kl, 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over tokens -> advantages, returns [B, T], zero outside the mask.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    (Schulman et al. 2016, arXiv 1506.02438, eq. 12 and 16.) rewards, values, mask [B, T], right-padded; V_t is the
    value before token t, and that of the state after the last token is 0.
    """
    advantages = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    following = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(inside.bool(), delta + gamma * lam * running, running)
        following = torch.where(inside.bool(), values[:, t], following)
        advantages[:, t] = running * inside
    return advantages, (advantages + values) * mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) per token [B, T]; without `clip` the first alone.

    (The clipped form is of OpenAI's PPO2; see Engstrom et al. 2020, arXiv 2005.12729, section 2.)
    """
    loss = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns).square())
    return 0.5 * loss


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x [B, T] with variance 1 over the mask, and mean 0 unless `shift_mean` is false; 0 outside the mask."""
    inside = mask.bool()
    count = mask.sum().clamp(min=1)
    mean = torch.where(inside, x, 0.0).sum() / count
    offset = torch.where(inside, x - mean, 0.0)
    scaled = offset * (offset.square().sum() / count + 1e-8).rsqrt()
    return scaled if shift_mean else (scaled + mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask: 1 for a perfect critic, 0 for a constant one; NaN where R is constant."""
    inside = mask.bool()
    variance = returns[inside].var(correction=0)
    return torch.where(variance > 0, 1 - (returns - values)[inside].var(correction=0) / variance, torch.nan)
