"""RMSNorm of a layer's output, gated per channel (Kimi Linear, arXiv 2510.26692, section 4), with its own backward.

    rstd = 1 / sqrt(mean(x^2) + eps)        y = weight * x * rstd * act(gate)        act = sigmoid or SiLU

All of it in fp32 or wider, rounded once. Forward keeps nothing but its inputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str = "sigmoid") -> Tensor:
    """y [..., V] in x's dtype, for x and gate [..., V] and weight [V]; the norm is over the last dimension.

    Raises ValueError on shapes that do not fit and on an activation other than "sigmoid" and "silu".
    """
    check_gated_norm(x, gate, weight, activation)
    return _GatedNorm.apply(x, gate, weight, eps, activation)


def check_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, activation: str) -> None:
    """Raises ValueError, naming what does not fit, unless `gated_rms_norm` can take these together."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if x.ndim == 0 or gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x and gate must both be [..., V] and weight [V], got {tuple(x.shape)}, {tuple(gate.shape)} and "
            f"{tuple(weight.shape)}"
        )


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.activation = eps, activation
        wide, gate, weight = _widened(x, gate, weight)
        return (F.rms_norm(wide, weight.shape, weight, eps) * ACTIVATIONS[activation](gate)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """dn = dy act(gate) weight for the normed n = x rstd, and dx = dn rstd - x rstd^3 mean(dn x)."""
        saved = ctx.saved_tensors
        types = [tensor.dtype for tensor in saved]
        x, gate, weight = _widened(*saved)
        dy = dy.to(x.dtype)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        normed, act = x * rstd, ACTIVATIONS[ctx.activation](gate)
        dact = (weight * normed).mul_(dy)
        if ctx.activation == "sigmoid":
            dgate = torch.ops.aten.sigmoid_backward(dact, act)
        else:
            dgate = torch.ops.aten.silu_backward(dact, gate)
        dscaled = act.mul_(dy)
        dweight = normed.mul_(dscaled).reshape(-1, x.shape[-1]).sum(0)
        dnormed = dscaled.mul_(weight)
        dmean = (dnormed * x).sum(-1, keepdim=True).mul_(-0.5).mul_(rstd.pow(3)).div_(x.shape[-1])
        dx = dnormed.mul_(rstd).add_((2.0 * x).mul_(dmean))
        return *(d.to(dtype) for d, dtype in zip((dx, dgate, dweight), types, strict=True)), None, None


def _widened(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), gate.to(dtype), weight.to(dtype)
