"""Pieces that the chunk kernels share: gates, norms, decays between the tokens of a chunk.

A log-decay below -120 is -120: either way fp32 knows no smaller product than zero, and sums over a chunk stay small.
"""

import triton
import triton.language as tl

LOWEST_LOG_DECAY = tl.constexpr(-120.0)
L2_EPS = tl.constexpr(1e-6)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# The matrices of `chunks.spans`; the first HALVINGS of them lead to the middle of 64, 32, ... 2 tokens, from NEAR on
# within 16 tokens.
HALVINGS, NEAR = tl.constexpr(6), tl.constexpr(2)
FROM_START, TO_END, ONWARDS, SHARED_HALVES = (tl.constexpr(n) for n in (6, 7, 8, 9))


@triton.jit
def row_offsets(first, stride, C: tl.constexpr, D: tl.constexpr):
    """Offsets [C, D] of D neighbours in each of C rows, `stride` apart, from row `first` on."""
    return (first + tl.arange(0, C)).to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def raw_rows(x, first, stride, valid, C: tl.constexpr, D: tl.constexpr):
    """[C, D] in x's type, zero where not valid."""
    return tl.load(x + row_offsets(first, stride, C, D), mask=valid[:, None], other=0.0)


@triton.jit
def load_rows(x, first, stride, valid, C: tl.constexpr, D: tl.constexpr):
    """[C, D] in fp32, zero where not valid."""
    return raw_rows(x, first, stride, valid, C, D).to(tl.float32)


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

    log(1 + y) for y in [0, 1] is y times a polynomial, within 3e-7 of itself in fp32: cheaper than a logarithm that is
    as exact near 0.
    """
    if BOUNDED:
        gate = tl.sigmoid(rate * x)
        return bound * gate, bound * rate * gate * (1.0 - gate)
    else:
        y = tl.exp2(tl.abs(x) * -LOG2_E)
        series = 0.0782247039 + y * (-0.0295044725 + y * 0.00523250307)
        series = 0.333190952 + y * (-0.248429695 + y * (0.19105957 + y * (-0.136631399 + y * series)))
        softplus = tl.maximum(x, 0.0) + y * (0.99999997 + y * (-0.499994931 + y * series))
        root = tl.rsqrt(1.0 + y)  # squared, it is cheaper than a quotient
        return -rate * softplus, -rate * tl.where(x >= 0, 1.0, y) * (root * root)


@triton.jit
def split(x, ST: tl.constexpr):
    """x as the sum of two numbers of a short type."""
    high = x.to(ST)
    return high, (x - high.to(tl.float32)).to(ST)


@triton.jit
def summed(spans, which, x, C: tl.constexpr, PRECISION: tl.constexpr):
    """[C, D] in fp32: the matrix `which` of `chunks.spans` times x [C, D]: sums over chosen tokens.

    The matrix is loaded each time: held in registers it would push out what the kernel works on.
    """
    span = tl.load(spans + which * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]).to(x.dtype)
    return tl.dot(span, x, input_precision=PRECISION)


@triton.jit
def apart(C: tl.constexpr):
    """[C, C]: i xor j. Tokens share a block of n (a power of 2) where it is below n."""
    return tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]


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
    distance = apart(C)
    inverse = tl.where(distance == 0, 1.0, 0.0) - tl.where(distance == 1, erase, 0.0)
    for level in tl.range(1, HALVINGS, num_stages=1):
        between = tl.where((distance >> level) == 1, erase, 0.0)
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
