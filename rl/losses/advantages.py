"""Advantages from rewards without a critic: of whole sequences by their group, or of tokens by their returns."""

from typing import Literal

from torch import Tensor

from deltarl.rl.losses.value import token_rewards, whiten

STD_FLOOR = 1e-4

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, group: int, *, baseline: Baseline = "mean", scale: Scale = "group") -> Tensor:
    """A_i = (r_i - b_i) / s_i for rewards [N] that lie group after group of `group` samples of one prompt; [N].

    baseline: "mean" of the group (GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1.2); "leave_one_out", the mean
    of the others (RLOO: Ahmadian et al. 2024, arXiv 2402.14740, section 3); "none".
    scale: the "group"'s standard deviation (GRPO); mean 0 and the standard deviation of the "batch" of what the
    baseline left (REINFORCE++-baseline: Hu et al. 2025, arXiv 2501.03262); or "none" (Dr. GRPO: Liu et al. 2025, arXiv
    2503.20783). Standard deviations are of the sample (N - 1), plus 1e-4.

    A reward of NaN was not graded: it takes part in no baseline and gets the advantage 0. Raises ValueError when the
    rewards do not divide into groups, or "leave_one_out" has no other.
    """
    if rewards.numel() % group:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {group}")
    if baseline == "leave_one_out" and group < 2:
        raise ValueError("leave_one_out needs groups of at least 2")
    grouped = rewards.view(-1, group)
    graded = ~grouped.isnan()
    known = grouped.nan_to_num(0.0)
    if baseline == "none":
        centred = known
    elif baseline == "mean":
        centred = known - known.sum(1, keepdim=True) / graded.sum(1, keepdim=True).clamp(min=1)
    else:
        others = graded.sum(1, keepdim=True) - 1
        centred = known - (known.sum(1, keepdim=True) - known) / others.clamp(min=1)
        centred = centred * (others > 0)
    if scale == "group":
        centred = centred / (_std(known, graded, 1) + STD_FLOOR)
    elif scale == "batch":
        centred = centred * graded
        centred = centred - centred.sum() / graded.sum().clamp(min=1)
        centred = centred / (_std(centred.view(1, -1), graded.view(1, -1), 1) + STD_FLOOR)
    return (centred * graded).view(-1)


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, kl: Tensor | None = None, *, beta: float = 0.0) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): advantages of tokens [B, T], 0 outside the mask.

        G_{i,t} = r_i - beta sum_{s >= t} KL_{i,s}        A = (G - mean G) / std G   over all tokens of the batch

    rewards [B]; kl [B, T]: k1 of each token (`kl_estimate`). One sample a prompt is enough. A reward of NaN was not
    graded: its tokens count nowhere and have the advantage 0.
    """
    inside = mask * ~rewards.isnan().unsqueeze(1)
    per_token = token_rewards(rewards.nan_to_num(0.0), inside, kl, beta=beta)
    return whiten(per_token.flip(1).cumsum(1).flip(1), inside)


def _std(x: Tensor, graded: Tensor, dim: int) -> Tensor:
    """Standard deviation of the sample over `dim` among the graded entries; 0 where there are fewer than two."""
    count = graded.sum(dim, keepdim=True)
    mean = (x * graded).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = ((x - mean).square() * graded).sum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
