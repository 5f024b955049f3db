"""What PPO needs besides the policy's surrogate: advantages over tokens, and the critic's loss."""

import torch
from torch import Tensor


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
    count = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    scaled = (x - mean) * (variance + 1e-8).rsqrt()
    return (scaled if shift_mean else scaled + mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask: 1 for a perfect critic, 0 for a constant one; NaN where R is constant."""
    inside = mask.bool()
    variance = returns[inside].var(correction=0)
    return torch.where(variance > 0, 1 - (returns - values)[inside].var(correction=0) / variance, torch.nan)
