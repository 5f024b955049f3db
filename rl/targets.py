"""What policy and critic learn towards: a job's settings and a batch's rewards give advantages and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deltarl.rl.jobs import RLConfig
from deltarl.rl.losses import gae, group_advantages, kl_estimate, reinforce_plus_plus, token_rewards, whiten


class Targets(NamedTuple):
    """advantages: [N, 1], or [N, T] of tokens. returns: [N, T] with NaN where nothing was graded; None without a
    critic."""

    advantages: Tensor
    returns: Tensor | None = None


def make_targets(
    rl: RLConfig,
    rewards: Tensor,
    group: int,
    mask: Tensor,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    values: Tensor | None = None,
) -> Targets:
    """The targets of a batch of N traces, `group` of them to a problem, before its first update.

    rewards [N], NaN where ungraded; mask, old, reference, values [N, T], right-padded: the completions' tokens, their
    logprobs under the policy and the reference (both needed where `rl.kl_in` is reward), the critic's values (ppo).

    With `rl.kl_in: reward` each token costs beta KL_t. PPO and REINFORCE++ (baseline none, scale batch) take that token
    by token; the others lower the sequence's reward by its sum, as RLOO does (arXiv 2402.14740, section 2).
    """
    kl = None
    if rl.beta > 0 and rl.kl_in == "reward":
        kl = kl_estimate(old, reference, rl.kl_estimator)
    if rl.algorithm == "ppo":
        return _with_critic(rl, rewards, mask, kl, values)
    if kl is None:
        return Targets(group_advantages(rewards, group, baseline=rl.baseline, scale=rl.scale_rewards).unsqueeze(1))
    if rl.baseline == "none" and rl.scale_rewards == "batch":
        return Targets(reinforce_plus_plus(rewards, mask, kl, beta=rl.beta))
    rewards = rewards - rl.beta * torch.where(mask.bool(), kl, 0.0).sum(1)
    return Targets(group_advantages(rewards, group, baseline=rl.baseline, scale=rl.scale_rewards).unsqueeze(1))


def _with_critic(rl: RLConfig, rewards: Tensor, mask: Tensor, kl: Tensor | None, values: Tensor) -> Targets:
    critic = rl.critic
    graded = mask * ~rewards.isnan().unsqueeze(1)
    by_token = token_rewards(rewards.nan_to_num(0.0), graded, kl, beta=rl.beta)
    if critic.whiten_rewards:
        by_token = whiten(by_token, graded, shift_mean=False)
    advantages, returns = gae(by_token, values, graded, gamma=critic.gamma, lam=critic.lam)
    if critic.whiten_advantages:
        advantages = whiten(advantages, graded)
    return Targets(advantages, torch.where(graded.bool(), returns, torch.nan))
