"""`gated_rms_norm` for NVIDIA GPUs. It is bound by bytes: each program reads whole rows, once.

n = x rstd        y = weight n act(gate)        dn = dy act(gate) weight        dx = rstd (dn - n mean(dn n))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltarl.kernels.fused.configs import CONFIGS, Config
from deltarl.kernels.gated_norm import check_gated_norm

# Tiles of a program of backward, which leaves one sum of dweight for them.
BACKWARD_TILES = 8


@triton.jit
def row_offsets(row, H, outer_stride, inner_stride):
    """[R, 1]: where the rows lie of which H follow one another at the inner stride."""
    return ((row // H).to(tl.int64) * outer_stride + row % H * inner_stride)[:, None]


@triton.jit
def activation(gate, SILU: tl.constexpr):
    """act(gate) and its derivative."""
    share = 1.0 / (1.0 + tl.exp(-gate))
    if SILU:
        return gate * share, share * (1.0 + gate * (1.0 - share))
    else:
        return share, share * (1.0 - share)


@triton.jit
def gated_norm_kernel(
    x, gate, weight, y, rows, H, x_outer, x_inner, gate_outer, gate_inner, eps,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program for BR rows."""
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BV)[None, :]
    inside = (row < rows)[:, None] & (column < V)
    b_x = tl.load(x + row_offsets(row, H, x_outer, x_inner) + column, mask=inside, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + row_offsets(row, H, gate_outer, gate_inner) + column, mask=inside, other=0.0)
    b_weight = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / V + eps)
    act, _ = activation(b_gate.to(tl.float32), SILU)
    b_y = b_x * rstd[:, None] * b_weight * act
    tl.store(y + row.to(tl.int64)[:, None] * V + column, b_y.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    x, gate, weight, dy, dx, dgate, dweight, rows, H, x_outer, x_inner, gate_outer, gate_inner, dy_outer, dy_inner, eps,
    V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program for TILES tiles of BR rows."""
    column = tl.arange(0, BV)[None, :]
    b_weight = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((BR, BV), tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * BR + tl.arange(0, BR)
        inside = (row < rows)[:, None] & (column < V)
        b_x = tl.load(x + row_offsets(row, H, x_outer, x_inner) + column, mask=inside, other=0.0).to(tl.float32)
        b_gate = tl.load(gate + row_offsets(row, H, gate_outer, gate_inner) + column, mask=inside, other=0.0)
        b_dy = tl.load(dy + row_offsets(row, H, dy_outer, dy_inner) + column, mask=inside, other=0.0).to(tl.float32)
        rstd = (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / V + eps))[:, None]
        normed = b_x * rstd
        act, slope = activation(b_gate.to(tl.float32), SILU)
        b_dweight += b_dy * act * normed
        b_dy *= b_weight
        b_dgate = b_dy * normed * slope
        dnormed = b_dy * act
        b_dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, 1) / V)[:, None])
        place = row.to(tl.int64)[:, None] * V + column
        tl.store(dx + place, b_dx.to(dx.dtype.element_ty), mask=inside)
        tl.store(dgate + place, b_dgate.to(dgate.dtype.element_ty), mask=inside)
    total = tl.sum(b_dweight, 0)[None, :]
    tl.store(dweight + tl.program_id(0).to(tl.int64) * V + column, total, mask=column < V)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str = "sigmoid") -> Tensor:
    """Same arguments, shapes and errors as `deltarl.kernels.gated_norm.gated_rms_norm`; x and gate of 16 or 32 bits."""
    check_gated_norm(x, gate, weight, activation)
    return GatedNorm.apply(x, gate, weight, eps, activation == "silu")


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.silu = eps, silu
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, heads, (x, gate), strides = as_rows(x, gate)
        sizes = tile_sizes(weight, CONFIGS["gated_norm"])
        if rows:
            gated_norm_kernel[(triton.cdiv(rows, sizes["BR"]),)](
                x, gate, weight, y, rows, heads, *strides, eps, SILU=silu, **sizes
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, gate, weight = ctx.saved_tensors
        dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
        rows, heads, (x, gate, dy), strides = as_rows(x, gate, dy)
        sizes = tile_sizes(weight, CONFIGS["gated_norm_backward"])
        programs = triton.cdiv(rows, sizes["BR"] * BACKWARD_TILES)
        dweight = torch.empty(programs, *weight.shape, dtype=torch.float32, device=weight.device)
        if rows:
            gated_norm_backward_kernel[(programs,)](
                x, gate, weight, dy, dx, dgate, dweight, rows, heads, *strides, ctx.eps, TILES=BACKWARD_TILES,
                SILU=ctx.silu, **sizes,
            )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None, None


def as_rows(*tensors: Tensor) -> tuple[int, int, list[Tensor], list[int]]:
    """How many rows there are in all and H, how many follow one another; the tensors [..., V] as [rows / H, H, V] whose
    last stride is 1, and their other strides. H is 1 where rows lie at one distance; what fits neither is copied."""
    shape = tensors[0].shape
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    heads = 1 if len(shape) < 3 or all(t.is_contiguous() for t in tensors) else max(1, shape[-2])
    rows = shape[:-1].numel()
    tensors = [t.reshape(rows // heads, heads, shape[-1]) for t in tensors]
    return rows, heads, tensors, [stride for t in tensors for stride in t.stride()[:2]]


def tile_sizes(weight: Tensor, config: Config) -> dict[str, int]:
    width = triton.next_power_of_2(len(weight))
    return {"V": len(weight), "BV": width, "BR": max(1, config.block // width), **config.launch()}
