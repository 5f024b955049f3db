"""RMSNorm of a residual stream (Zhang and Sennrich 2019, eq. 4) for inference, the stream in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm_(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """weight · s / sqrt(mean(s²) + eps) of s = residual + x, which is left in `residual`; of x itself without one.

    x [N, D], weight [D], residual [N, D] in fp32 and in one piece -> y [N, D] in x's dtype. In fp32, rounded once; no
    gradient. Raises ValueError on shapes and a residual that do not fit.
    """
    check_add_norm(x, weight, residual)
    stream = x.float() if residual is None else residual.add_(x)
    return F.rms_norm(stream, weight.shape, weight.float(), eps).to(x.dtype)


def check_add_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raises ValueError, naming what does not fit, unless `add_rms_norm_` can take these together."""
    if x.ndim != 2 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x must be [N, D] and weight [D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != torch.float32 or not residual.is_contiguous()
    ):
        raise ValueError(
            f"residual must be {tuple(x.shape)} in fp32 and in one piece, got {tuple(residual.shape)} in "
            f"{residual.dtype}, strides {residual.stride()}"
        )
