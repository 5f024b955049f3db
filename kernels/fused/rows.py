"""Rows of a head in the decode kernels."""

import triton
import triton.language as tl

from deltarl.kernels.fused.tiles import L2_EPS


@triton.jit
def row_of(x, D: tl.constexpr):
    """[1, D] in fp32: in this shape a warp works on each element once, in that of a column of a state 32 times."""
    return tl.load(x + tl.arange(0, D)[None, :]).to(tl.float32)


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def inverse_norm(b_x, L2NORM: tl.constexpr):
    """What a row is multiplied by to have length 1; 1 without L2NORM."""
    norm = 1.0
    if L2NORM:
        norm = 1.0 / tl.sqrt(total(b_x * b_x) + L2_EPS)
    return norm
