"""What a chunk does without knowing the state before it, all chunks and heads at once.

With G the log-decay summed from the start of the chunk (the notation of `deltarl.kernels.chunk`):

    attend  P_ij = q_i . k_j exp(G_i - G_j), j <= i          erase  A_ij = beta_i k_i . k_j exp(G_i - G_j), j < i
    X = (I + A)^-1         w = X (beta k exp(G))         u = X (beta v)
    reader  q exp(G)       writer  k exp(G_C - G)        decay  exp(G_C)

Pairs are taken by halves: those between the two halves of 64 tokens, then those between the halves of each 32, and so
on down to neighbours. Both tokens of a pair decay to the middle between their halves, by two factors of at most 1:
nothing overflows, however strong the decay.
X comes by halves too: with X_h the inverse of the diagonal blocks of h tokens and A_h the entries of A between the
halves of a block of 2h, X_2h = X_h - X_h A_h X_h. It has a kernel of its own: its products wait for one another, and
with few registers many programs share a multiprocessor.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.tiles import (
    FROM_START,
    HALVINGS,
    L2_EPS,
    LOG2_E,
    LOWEST_LOG_DECAY,
    TO_END,
    apart,
    before,
    gated,
    not_after,
    raw_rows,
    summed,
    tile_offsets,
    unit_lower_inverse,
    write_strengths,
)


@triton.jit
def log2_decays(
    raw, A_log, dt_bias, head, column, valid, bound, K: tl.constexpr, D: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """From `raw` [C, D], the channels column.. of g: the base-2 logarithm of each token's decay, the derivative of the
    natural one by the raw gate, the raw gate with its bias."""
    raw = raw.to(tl.float32)
    value, slope = raw, tl.full(raw.shape, 1.0, tl.float32)
    if RAW:
        if BIAS:
            raw += tl.load(dt_bias + head * K + column + tl.arange(0, D)).to(tl.float32)[None, :]
        value, slope = gated(raw, tl.exp(tl.load(A_log + head).to(tl.float32)), bound, BOUNDED)
    slope = tl.where(valid[:, None], slope, 0.0)
    value = tl.where(valid[:, None], tl.where(value < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, value), 0.0)
    return value * LOG2_E, slope, raw


@triton.jit
def unit_factor(rows, L2NORM: tl.constexpr):
    """[C]: 1 / sqrt(sum x^2 + eps) of each row [C, K], or ones."""
    if L2NORM:
        rows = rows.to(tl.float32)
        return 1.0 / tl.sqrt(tl.sum(rows * rows, 1) + L2_EPS)
    else:
        return tl.full((rows.shape[0],), 1.0, tl.float32)


@triton.jit
def pairs_of(q, k, g, spans, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """q_i . k_j exp(G_i - G_j) for j <= i and k_i . k_j exp(G_i - G_j) for j < i, [C, C] in fp32, zero elsewhere.

    q, k and the base-2 log-decays g [C, K] are of the type of the products. A row of `late_q` is right where its token
    is the later one of a pair, a row of `both_k` for both places; the other entries are overwritten by later levels.
    """
    attend, erase = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    distance = apart(C)
    for level in tl.range(0, HALVINGS, num_stages=1):
        decay = tl.exp2(summed(spans, level, g, C, PRECISION)).to(q.dtype)
        late_q, both_k = q * decay, k * decay
        early_k = tl.trans(both_k)
        here = distance < (C >> level)
        attend = tl.where(here, tl.dot(late_q, early_k, input_precision=PRECISION), attend)
        erase = tl.where(here, tl.dot(both_k, early_k, input_precision=PRECISION), erase)
    itself = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    attend = tl.where(distance == 0, itself[:, None], attend)
    return tl.where(not_after(C), attend, 0.0), tl.where(before(C), erase, 0.0)


@triton.jit(do_not_specialize=["H"])
def prepare_kernel(
    q, k, g, A_log, dt_bias, chunk_row, chunk_size, spans,
    w, reader, writer, attend, erase, factors, decay,
    q_stride, k_stride, g_stride, scale, bound,
    H, SHARED: tl.constexpr, K: tl.constexpr, C: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr,
    BOUNDED: tl.constexpr, L2NORM: tl.constexpr, KEEP_FACTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk; writes tiles [C, ...] of contiguous [chunks, H, C, ...] tensors.

    `w` becomes k exp(G), `erase` A without its beta. KEEP_FACTORS: what q and k were multiplied by for their norm goes
    to `factors` [chunks, H, 2, C].
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = w.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)

    b_g = raw_rows(g + head * K, first, g_stride, valid, C, K)
    b_q = raw_rows(q + head // SHARED * K, first, q_stride, valid, C, K)
    b_k = raw_rows(k + head // SHARED * K, first, k_stride, valid, C, K)
    b_g, _, _ = log2_decays(b_g, A_log, dt_bias, head, 0, valid, bound, K, K, RAW, BIAS, BOUNDED)
    tl.store(decay + tile * K + tl.arange(0, K), tl.exp2(tl.sum(b_g, 0)))
    b_g = b_g.to(DT)
    q_factor, k_factor = unit_factor(b_q, L2NORM), unit_factor(b_k, L2NORM)
    if KEEP_FACTORS:
        rows = tile * 2 * C + tl.arange(0, C)
        tl.store(factors + rows, q_factor)
        tl.store(factors + rows + C, k_factor)
    b_q = (b_q.to(tl.float32) * (q_factor * scale)[:, None]).to(DT)
    b_k = (b_k.to(tl.float32) * k_factor[:, None]).to(DT)
    keys = tile_offsets(tile, C, K)
    to_end = tl.exp2(summed(spans, TO_END, b_g, C, PRECISION)).to(DT)
    tl.store(writer + keys, b_k * to_end)
    since_start = tl.exp2(summed(spans, FROM_START, b_g, C, PRECISION)).to(DT)
    tl.store(reader + keys, b_q * since_start)
    tl.store(w + keys, b_k * since_start)
    b_attend, b_erase = pairs_of(b_q, b_k, b_g, spans, C, K, PRECISION)
    pairs = tile_offsets(tile, C, C)
    tl.store(attend + pairs, b_attend.to(DT))
    tl.store(erase + pairs, b_erase.to(DT))


@triton.jit(do_not_specialize=["H", "beta_stride"])
def solve_kernel(
    v, beta, chunk_row, chunk_size, erase, w, u, inverse, v_stride, beta_stride,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, RAW: tl.constexpr,
    KEEP_INVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk: `w`, k exp(G) until then, `u` and, if asked for, the inverse X."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = w.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    b_v = raw_rows(v + head * V, first, v_stride, valid, C, V)
    keys = tile_offsets(tile, C, K)
    b_k = tl.load(w + keys)
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    b_erase = tl.load(erase + tile_offsets(tile, C, C)).to(tl.float32) * b_beta[:, None]
    b_inverse = unit_lower_inverse(b_erase, C, DT, PRECISION)
    if KEEP_INVERSE:
        tl.store(inverse + tile_offsets(tile, C, C), b_inverse.to(DT))
    b_inverse = (b_inverse * b_beta[None, :]).to(DT)
    tl.store(u + tile_offsets(tile, C, V), tl.dot(b_inverse, b_v.to(DT), input_precision=PRECISION).to(DT))
    b_w = tl.dot(b_inverse, b_k, input_precision=PRECISION)
    tl.debug_barrier()  # every thread has read its part of k exp(G)
    tl.store(w + keys, b_w.to(DT))
