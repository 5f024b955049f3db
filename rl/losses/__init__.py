"""The objectives of RL as pure functions of tensors, each with its paper's formula.

Shapes: B sequences of T completion tokens, right-padded; `mask` [B, T] is 1 on completion tokens. Log-probabilities are
in nats, of the sampled tokens, under the sampling temperature.
"""

from deltarl.rl.losses.advantages import group_advantages, reinforce_plus_plus
from deltarl.rl.losses.correction import correction_weights, effective_sample_size
from deltarl.rl.losses.kl import kl_estimate
from deltarl.rl.losses.policy import aggregate, cispo, clipped_surrogate, mirror_descent, ptx_loss
from deltarl.rl.losses.value import explained_variance, gae, token_rewards, value_loss, whiten

__all__ = [
    "aggregate",
    "cispo",
    "clipped_surrogate",
    "correction_weights",
    "effective_sample_size",
    "explained_variance",
    "gae",
    "group_advantages",
    "kl_estimate",
    "mirror_descent",
    "ptx_loss",
    "reinforce_plus_plus",
    "token_rewards",
    "value_loss",
    "whiten",
]
