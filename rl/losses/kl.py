"""KL divergence to a reference policy, estimated on sampled tokens."""

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """KL(pi || reference) per sampled token, in nats, with l = log pi - log reference [B, T]:

        k1 = l          unbiased; as a loss its expected gradient is 0, so it belongs into the reward
        k2 = l^2 / 2    biased; as a loss its gradient is that of the KL on samples of pi
        k3 = exp(-l) - 1 + l    unbiased, never negative

    (Schulman 2020, "Approximating KL Divergence"; k3 is GRPO's, arXiv 2402.03300, eq. 4.)
    """
    log_ratio = logprobs - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return (-log_ratio).expm1() + log_ratio
