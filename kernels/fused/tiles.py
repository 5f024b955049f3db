"""Pieces that the chunk kernels share: gates, norms, decays between the tokens of a chunk.

A log-decay below -120 is -120: either way fp32 knows no smaller product than zero, and sums over a chunk stay small.
"""

import triton
import triton.language as tl

LOWEST_LOG_DECAY = tl.constexpr(-120.0)
L2_EPS = tl.constexpr(1e-6)
# Down to this, exp of a sum and of its negative are both normal numbers, in fp32 and in bf16.
LOWEST_SUM = tl.constexpr(-80.0)
# The matrices of `chunks.spans`.
FROM_START, TO_END, TO_MIDDLE_32, TO_MIDDLE_16, FROM_16TH, ONWARDS = (tl.constexpr(n) for n in range(6))


@triton.jit
def row_offsets(first, stride, C: tl.constexpr, D: tl.constexpr):
    """Offsets [C, D] of D neighbours in each of C rows, `stride` apart, from row `first` on."""
    return (first + tl.arange(0, C)).to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def load_rows(x, first, stride, valid, C: tl.constexpr, D: tl.constexpr):
    """[C, D] in fp32, zero where not valid."""
    return tl.load(x + row_offsets(first, stride, C, D), mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, first, stride, valid, C: tl.constexpr, D: tl.constexpr):
    tl.store(x + row_offsets(first, stride, C, D), value.to(x.dtype.element_ty), mask=valid[:, None])


@triton.jit
def tile_offsets(tile, C: tl.constexpr, D: tl.constexpr):
    """Offsets [C, D] of a tile of a contiguous [tiles, C, D] tensor."""
    return tile.to(tl.int64) * (C * D) + tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def column_offsets(tile, column, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Offsets [R, BD] of the columns column.. of a tile of a contiguous [tiles, R, D] tensor."""
    return tile.to(tl.int64) * (R * D) + tl.arange(0, R)[:, None] * D + column + tl.arange(0, BD)[None, :]


@triton.jit
def gated(x, rate, bound, BOUNDED: tl.constexpr):
    """Log-decay from the raw projection with its bias, and its derivative: rate = exp(A_log).

    log(1 + y) is 2 atanh(s) for s = y / (2 + y) <= 1/3, by its series: 1e-7 of itself, and cheaper than a logarithm.
    """
    if BOUNDED:
        gate = tl.sigmoid(rate * x)
        return bound * gate, bound * rate * gate * (1.0 - gate)
    else:
        y = tl.exp(-tl.abs(x))
        s = y / (2.0 + y)
        t = s * s
        series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t / 13)))))
        softplus = tl.maximum(x, 0.0) + 2.0 * s * series
        return -rate * softplus, -rate * tl.where(x >= 0, 1.0, y) / (1.0 + y)


@triton.jit
def split(x, ST: tl.constexpr):
    """x as the sum of two numbers of a short type."""
    high = x.to(ST)
    return high, (x - high.to(tl.float32)).to(ST)


@triton.jit
def summed(spans, WHICH: tl.constexpr, high, low, C: tl.constexpr, PRECISION: tl.constexpr):
    """[C, D]: the matrix WHICH of `chunks.spans` times high + low [C, D]: sums over chosen tokens, in fp32.

    The matrix is loaded each time: held in registers it would push out what the kernel works on.
    """
    span = tl.load(spans + WHICH * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]).to(high.dtype)
    return tl.dot(span, low, tl.dot(span, high, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def token_of_16(x, place, C: tl.constexpr, D: tl.constexpr):
    """[C, D]: in each 16 rows, the row `place` of them."""
    blocks = tl.reshape(x, (C // 16, 16, D))
    row = tl.sum(tl.where(tl.arange(0, 16)[None, :, None] == place, blocks, 0.0), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(row, (C // 16, 16, D)), (C, D))


@triton.jit
def is_late(HALF: tl.constexpr, C: tl.constexpr):
    """[C, 1]: whether a token lies in the second half of its block."""
    return ((tl.arange(0, C) // HALF) % 2 == 1)[:, None]


@triton.jit
def in_one_block(SIZE: tl.constexpr, C: tl.constexpr):
    """[C, C]: whether two tokens share a block of SIZE."""
    block = tl.arange(0, C) // SIZE
    return block[:, None] == block[None, :]


@triton.jit
def not_after(C: tl.constexpr):
    """[C, C]: j <= i."""
    return tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]


@triton.jit
def before(C: tl.constexpr):
    """[C, C]: j < i."""
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def unit_lower_inverse(erase, C: tl.constexpr, ST: tl.constexpr, PRECISION: tl.constexpr):
    """(I + erase)^-1 for `erase` [C, C] strictly lower, with products of type ST."""
    inverse = tl.where(in_one_block(1, C), 1.0, 0.0) - tl.where(in_one_block(2, C), erase, 0.0)
    for level in tl.static_range(1, 6):
        between = tl.where(in_one_block(2 << level, C) & (in_one_block(1 << level, C) == 0), erase, 0.0)
        short = inverse.to(ST)
        solved = tl.dot(short, between.to(ST), input_precision=PRECISION)
        inverse -= tl.dot(solved.to(ST), short, input_precision=PRECISION)
    return inverse


@triton.jit
def write_strengths(beta, first, stride, head, valid, C: tl.constexpr, RAW: tl.constexpr):
    """beta [C], zero where not valid."""
    value = tl.load(beta + (first + tl.arange(0, C)).to(tl.int64) * stride + head, mask=valid, other=0.0)
    value = value.to(tl.float32)
    if RAW:
        value = tl.sigmoid(value)
    return tl.where(valid, value, 0.0)


@triton.jit
def row_scales(x, first, stride, head, valid, C: tl.constexpr, K: tl.constexpr, L2NORM: tl.constexpr):
    """[C]: 1 / sqrt(sum x^2 + eps), or ones."""
    if L2NORM:
        rows = load_rows(x + head * K, first, stride, valid, C, K)
        return 1.0 / tl.sqrt(tl.sum(rows * rows, 1) + L2_EPS)
    else:
        return tl.full((C,), 1.0, tl.float32)
