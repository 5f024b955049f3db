"""Off-policy correction: importance weights of the learner's policy against the one that sampled each token."""

from typing import Literal

import torch
from torch import Tensor

Correction = Literal[
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
]


def correction_weights(
    learner: Tensor, sampler: Tensor, mask: Tensor, mode: Correction, *, cap: float, floor: float = 0.0
) -> Tensor:
    """w = pi_learner / pi_sampler, put into [floor, cap] or, in a mask mode, 0 outside of it; no gradient.

    learner, sampler [B, T]: logprobs of the sampled tokens; the sampler's are those recorded when each token was drawn,
    of whichever weight version drew it. "token": a weight per token [B, T] (Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training"; masked: IcePop, Ling Team 2025, arXiv 2510.18855).
    "sequence": the product over the sequence [B, 1], whose variance grows with length. "geometric": the sequence's
    geometric mean [B, 1] (GSPO's ratio, arXiv 2507.18071, eq. 7). NaN logprobs of the sampler count as the learner's
    own.
    """
    level, _, treatment = mode.partition("_")
    gap = ((learner - sampler) * mask).nan_to_num(nan=0.0).detach()
    if level == "sequence":
        gap = gap.sum(-1, keepdim=True)
    elif level == "geometric":
        gap = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    weights = gap.exp()
    if treatment == "truncate":
        return weights.clamp(floor, cap)
    return torch.where((weights < floor) | (weights > cap), 0.0, weights)


def effective_sample_size(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """(sum w)^2 / (n sum w^2), in (0, 1]: the share of the n weights that an equally weighted sample would need.

    (Kong 1992; Owen, "Monte Carlo theory, methods and examples", eq. 9.13, over n.)
    """
    mask = torch.ones_like(weights) if mask is None else mask
    weights = torch.where(mask.bool(), weights, 0.0)
    return weights.sum().square() / (mask.sum() * weights.square().sum()).clamp(min=1e-30)
