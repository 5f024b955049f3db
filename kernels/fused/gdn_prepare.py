"""What a chunk does without knowing the state before it, for one decay per head: all chunks and heads at once.

With G the log-decay summed from the start of the chunk (the notation of `deltarl.kernels.chunk`):

    attend  P_ij = q_i . k_j exp(G_i - G_j), j <= i          erase  A_ij = beta_i k_i . k_j exp(G_i - G_j), j < i
    X = (I + A)^-1         w = X (beta k exp(G))         u = X (beta v)
    reader  q exp(G)       writer  k exp(G_C - G)        decay  exp(G_C)

The decay between two tokens is one number, so that P and A are products of q and k as they came, each entry then
multiplied by its decay and divided by the lengths of its two rows. G_i - G_j is a sum over the tokens between, never a
difference of sums: no strength of decay overflows or cancels. Several heads of v may share a head of q and k.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Tiles
from deltarl.kernels.fused.chunks import CHUNK
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.launch import launch
from deltarl.kernels.fused.tiles import (
    L2_EPS,
    LOWEST_LOG_DECAY,
    before,
    column_offsets,
    gated,
    load_rows,
    not_after,
    raw_rows,
    split,
    tile_offsets,
    unit_lower_inverse,
    write_strengths,
)

# Rows of `GdnTiles.tokens`.
LOG_DECAY, BETA, START_DECAY, END_DECAY, Q_UNIT, K_UNIT, TOKEN_ROWS = (tl.constexpr(n) for n in range(7))


@dataclass(frozen=True, kw_only=True)
class GdnTiles(Tiles):
    """`tokens` fp32 [chunks, H, rows, C], a number for each token: its log-decay, beta, exp(G), exp(G_C - G), and what
    makes unit rows of q and k. For backward also `erase` without its beta."""

    tokens: Tensor


@triton.jit
def head_log_decays(
    g, A_log, dt_bias, first, stride, head, valid, bound, C: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """[C] each: the log-decay of each token, its derivative by the raw gate, the raw gate."""
    raw = tl.load(g + (first + tl.arange(0, C)).to(tl.int64) * stride + head, mask=valid, other=0.0).to(tl.float32)
    value, slope = raw, tl.full((C,), 1.0, tl.float32)
    if RAW:
        if BIAS:
            raw += tl.load(dt_bias + head).to(tl.float32)
        value, slope = gated(raw, tl.exp(tl.load(A_log + head).to(tl.float32)), bound, BOUNDED)
    too_low = value < LOWEST_LOG_DECAY
    slope = tl.where(too_low | (valid == 0), 0.0, slope)
    value = tl.where(valid, tl.where(too_low, LOWEST_LOG_DECAY, value), 0.0)
    return value, slope, raw


@triton.jit
def token_row(tokens, tile, ROW: tl.constexpr, C: tl.constexpr):
    """[C]. Loaded wherever it is used: kept, it would be computed anew for each layout that it is used in."""
    return tl.load(tokens + (tile * TOKEN_ROWS + ROW) * C + tl.arange(0, C))


@triton.jit
def keep_token_row(tokens, tile, value, ROW: tl.constexpr, C: tl.constexpr):
    tl.store(tokens + (tile * TOKEN_ROWS + ROW) * C + tl.arange(0, C), value)


@triton.jit
def pair_decays(tokens, tile, C: tl.constexpr, PRECISION: tl.constexpr):
    """[C, C]: exp(G_i - G_j) for j <= i, else 0. Sums as products with a matrix of 0 and 1."""
    ST: tl.constexpr = tl.float32 if PRECISION == "ieee" else tl.float16
    log_decay = token_row(tokens, tile, LOG_DECAY, C)
    high, low = split(tl.where(before(C), log_decay[:, None], 0.0), ST)
    until = tl.where(not_after(C), 1.0, 0.0).to(ST)
    between = tl.dot(until, low, tl.dot(until, high, input_precision=PRECISION), input_precision=PRECISION)
    return tl.where(not_after(C), tl.exp(between), 0.0)


@triton.jit
def unit_scales(rows, C: tl.constexpr, L2NORM: tl.constexpr):
    """[C]: 1 / sqrt(sum of squares + eps) of the rows [C, D], or ones."""
    if L2NORM:
        rows = rows.to(tl.float32)
        return 1.0 / tl.sqrt(tl.sum(rows * rows, 1) + L2_EPS)
    else:
        return tl.full((C,), 1.0, tl.float32)


@triton.jit(do_not_specialize=["H", "g_stride", "beta_stride"])
def gdn_prepare_kernel(
    q, k, v, g, beta, A_log, dt_bias, chunk_row, chunk_size,
    w, u, reader, writer, attend, erase, inverse, decay, tokens,
    q_stride, k_stride, v_stride, g_stride, beta_stride, scale, bound,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, FOR_BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of v of one chunk; writes tiles [C, ...] of contiguous [chunks, H, C, ...] tensors."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = w.dtype.element_ty
    ST: tl.constexpr = tl.float32 if tl.float32 == DT else tl.float16
    first = tl.load(chunk_row + chunk)
    place = tl.arange(0, C)
    valid = place < tl.load(chunk_size + chunk)
    b_g, _, _ = head_log_decays(g, A_log, dt_bias, first, g_stride, head, valid, bound, C, RAW, BIAS, BOUNDED)
    keep_token_row(tokens, tile, b_g, LOG_DECAY, C)
    keep_token_row(tokens, tile, write_strengths(beta, first, beta_stride, head, valid, C, RAW), BETA, C)
    keep_token_row(tokens, tile, tl.exp(tl.cumsum(b_g, 0)), START_DECAY, C)
    tl.store(decay + tile * K + tl.arange(0, K), tl.exp(tl.sum(b_g, 0)) + tl.zeros((K,), tl.float32))
    b_k = raw_rows(k + head // SHARED * K, first, k_stride, valid, C, K)
    keep_token_row(tokens, tile, unit_scales(b_k, C, L2NORM), K_UNIT, C)
    b_q = raw_rows(q + head // SHARED * K, first, q_stride, valid, C, K)
    keep_token_row(tokens, tile, unit_scales(b_q, C, L2NORM), Q_UNIT, C)
    tl.debug_barrier()  # rows of `tokens` are read by other threads than wrote them
    from_end = tl.load(tokens + (tile * TOKEN_ROWS + LOG_DECAY + 1) * C - place, mask=place > 0, other=0.0)
    tl.store(tokens + (tile * TOKEN_ROWS + END_DECAY + 1) * C - 1 - place, tl.exp(tl.cumsum(from_end, 0)))
    tl.debug_barrier()

    q_unit, k_unit = token_row(tokens, tile, Q_UNIT, C) * scale, token_row(tokens, tile, K_UNIT, C)
    to_read = q_unit * token_row(tokens, tile, START_DECAY, C)
    tl.store(reader + tile_offsets(tile, C, K), (b_q.to(tl.float32) * to_read[:, None]).to(DT))
    to_write = k_unit * token_row(tokens, tile, END_DECAY, C)
    tl.store(writer + tile_offsets(tile, C, K), (b_k.to(tl.float32) * to_write[:, None]).to(DT))
    pairs = pair_decays(tokens, tile, C, PRECISION) * k_unit[None, :]
    to_k = tl.trans(b_k)
    b_attend = tl.dot(b_q, to_k, input_precision=PRECISION) * pairs * q_unit[:, None]
    tl.store(attend + tile_offsets(tile, C, C), b_attend.to(DT))
    b_erase = tl.dot(b_k, to_k, input_precision=PRECISION) * pairs * k_unit[:, None]
    b_erase = tl.where(before(C), b_erase, 0.0)
    b_beta = token_row(tokens, tile, BETA, C)
    b_inverse = unit_lower_inverse(b_erase * b_beta[:, None], C, ST, PRECISION)
    if FOR_BACKWARD:
        tl.store(erase + tile_offsets(tile, C, C), b_erase.to(DT))
        tl.store(inverse + tile_offsets(tile, C, C), b_inverse.to(DT))

    b_inverse *= b_beta[None, :]
    b_k = (load_rows(k + head // SHARED * K, first, k_stride, valid, C, K) * k_unit[:, None]).to(DT)
    to_w = (b_inverse * token_row(tokens, tile, START_DECAY, C)[None, :]).to(DT)
    tl.store(w + tile_offsets(tile, C, K), tl.dot(to_w, b_k, input_precision=PRECISION).to(DT))
    b_inverse = b_inverse.to(DT)
    for column in range(0, V, BV):
        b_v = load_rows(v + head * V + column, first, v_stride, valid, C, BV).to(DT)
        b_u = tl.dot(b_inverse, b_v, input_precision=PRECISION)
        tl.store(u + column_offsets(tile, column, C, V, BV), b_u.to(DT))


def gdn_prepare(x: Inputs, for_backward: bool) -> GdnTiles:
    """The tiles of every chunk; x.g is [B, T, H]."""
    tiles = GdnTiles(
        w=x.tiles(CHUNK, x.key),
        u=x.tiles(CHUNK, x.value),
        reader=x.tiles(CHUNK, x.key),
        writer=x.tiles(CHUNK, x.key),
        attend=x.tiles(CHUNK, CHUNK),
        decay=x.tiles(x.key, dtype=torch.float32),
        erase=x.tiles(CHUNK, CHUNK) if for_backward else None,
        inverse=x.tiles(CHUNK, CHUNK) if for_backward else None,
        tokens=x.tiles(TOKEN_ROWS.value, CHUNK, dtype=torch.float32),
    )
    chunks, config = x.options.chunks, CONFIGS["gdn_prepare"]
    launch(
        gdn_prepare_kernel, (x.heads, chunks.count),
        x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, chunks.row, chunks.size,
        tiles.w, tiles.u, tiles.reader, tiles.writer, tiles.attend, tiles.erase, tiles.inverse, tiles.decay,
        tiles.tokens, *x.strides(), x.options.scale, x.options.bound,
        **x.sizes(), SHARED=x.shared, BV=min(config.block, x.value), **x.switches(), FOR_BACKWARD=for_backward,
        PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip
    return tiles
