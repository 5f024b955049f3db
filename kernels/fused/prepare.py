"""What a chunk does without knowing the state before it, all chunks and heads at once.

With G the log-decay summed from the start of the chunk (the notation of `deltarl.kernels.chunk`):

    attend  P_ij = q_i . k_j exp(G_i - G_j), j <= i          erase  A_ij = beta_i k_i . k_j exp(G_i - G_j), j < i
    X = (I + A)^-1         w = X (beta k exp(G))         u = X (beta v)
    reader  q exp(G)       writer  k exp(G_C - G)        decay  exp(G_C)

Pairs of different halves of a block of 64 or 32 tokens decay through the middle of the block: two factors, each at
most 1. Pairs within 16 tokens decay through the first of them, with one factor above 1: exact while the decay since
then is above exp(-80). The pairs of a later token with a stronger one are taken one by one.
X comes by halves too: with X_h the inverse of the diagonal blocks of h tokens and A_h the entries of A between the
halves of a block of 2h, X_2h = X_h - X_h A_h X_h.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.tiles import (
    FROM_16TH,
    FROM_START,
    LOWEST_LOG_DECAY,
    LOWEST_SUM,
    TO_END,
    TO_MIDDLE_16,
    TO_MIDDLE_32,
    before,
    column_offsets,
    gated,
    in_one_block,
    is_late,
    load_rows,
    not_after,
    row_scales,
    split,
    summed,
    tile_offsets,
    token_of_16,
    unit_lower_inverse,
    write_strengths,
)


@triton.jit
def halved_pairs(
    q, k, spans, high, low, attend, erase, HALF: tl.constexpr, C: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the pairs between the halves of each block of 2 * HALF tokens to `attend` and `erase`."""
    decay = tl.exp(summed(spans, TO_MIDDLE_32 if HALF == 32 else TO_MIDDLE_16, high, low, C, PRECISION))
    late = is_late(HALF, C)
    early_k = tl.trans(tl.where(late, 0.0, k * decay).to(DT))
    shared = in_one_block(2 * HALF, C)
    late_q = tl.where(late, q * decay, 0.0).to(DT)
    attend += tl.where(shared, tl.dot(late_q, early_k, input_precision=PRECISION), 0.0)
    late_k = tl.where(late, k * decay, 0.0).to(DT)
    erase += tl.where(shared, tl.dot(late_k, early_k, input_precision=PRECISION), 0.0)
    return attend, erase


@triton.jit
def single_pairs(q, k, since_start, too_steep, attend, erase, C: tl.constexpr, D: tl.constexpr):
    """Adds the pairs within 16 tokens whose later token is `too_steep`, one earlier token of every 16 at a time."""
    column = tl.arange(0, C)[None, :]
    for early in range(16):
        early_k = token_of_16(k, early, C, D)
        decay = tl.exp(tl.minimum(since_start - token_of_16(since_start, early, C, D), 0.0))
        here = in_one_block(16, C) & (column % 16 == early) & (too_steep[:, None] > 0)
        attend += tl.where(here & not_after(C), tl.sum(q * early_k * decay, 1)[:, None], 0.0)
        erase += tl.where(here & before(C), tl.sum(k * early_k * decay, 1)[:, None], 0.0)
    return attend, erase


@triton.jit
def within_16(spans, high, low, C: tl.constexpr, PRECISION: tl.constexpr):
    """The decay [C, D] from the start of each 16 tokens and its inverse, and [C] whether the inverse is out of range.

    Tokens where it is have factors of 0. As decay only grows, no pair of another token has one of them as its earlier.
    """
    log_fall = summed(spans, FROM_16TH, high, low, C, PRECISION)
    too_steep = (tl.min(log_fall, 1) < LOWEST_SUM).to(tl.int32)
    steady = too_steep[:, None] == 0
    return tl.where(steady, tl.exp(log_fall), 0.0), tl.where(steady, tl.exp(-log_fall), 0.0), too_steep


@triton.jit
def add_pairs(
    q, k, spans, high, low, attend, erase, C: tl.constexpr, D: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds D channels to P and to A without its beta, [C, C] in fp32.

    `high` + `low` [C, D] are the log-decays of the tokens.
    """
    attend, erase = halved_pairs(q, k, spans, high, low, attend, erase, 32, C, DT, PRECISION)
    attend, erase = halved_pairs(q, k, spans, high, low, attend, erase, 16, C, DT, PRECISION)
    fall, rise, too_steep = within_16(spans, high, low, C, PRECISION)
    # exp(80) is no fp16 number: fp32 operands for fp16 (in tf32, whose precision is fp16's), bf16 for bf16.
    WIDE: tl.constexpr = tl.bfloat16 if tl.bfloat16 == DT else tl.float32
    shared = in_one_block(16, C)
    to_k = tl.trans((k * rise).to(WIDE))
    near = tl.dot((q * fall).to(WIDE), to_k, input_precision=PRECISION)
    attend += tl.where(shared & not_after(C), near, 0.0)
    near = tl.dot((k * fall).to(WIDE), to_k, input_precision=PRECISION)
    erase += tl.where(shared & before(C), near, 0.0)
    if tl.max(too_steep) > 0:
        since_start = summed(spans, FROM_START, high, low, C, PRECISION)
        attend, erase = single_pairs(q, k, since_start, too_steep, attend, erase, C, D)
    return attend, erase


@triton.jit
def log_decays(
    g, A_log, dt_bias, first, stride, head, column, valid, bound, C: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """[C, D] of the channels column..: the log-decay of each token, its derivative by the raw gate, the raw gate."""
    raw = load_rows(g + head * K + column, first, stride, valid, C, D)
    value, slope = raw, tl.full((C, D), 1.0, tl.float32)
    if RAW:
        if BIAS:
            raw += tl.load(dt_bias + head * K + column + tl.arange(0, D)).to(tl.float32)[None, :]
        value, slope = gated(raw, tl.exp(tl.load(A_log + head).to(tl.float32)), bound, BOUNDED)
    too_low = value < LOWEST_LOG_DECAY
    slope = tl.where(too_low | (valid[:, None] == 0), 0.0, slope)
    value = tl.where(valid[:, None], tl.where(too_low, LOWEST_LOG_DECAY, value), 0.0)
    return value, slope, raw


@triton.jit(do_not_specialize=["H", "beta_stride"])
def prepare_kernel(
    q, k, v, g, beta, A_log, dt_bias, chunk_row, chunk_size, spans,
    w, u, reader, writer, attend, inverse, decay,
    q_stride, k_stride, v_stride, g_stride, beta_stride, scale, bound,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, KEEP_INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk; writes tiles [C, ...] of contiguous [chunks, H, C, ...] tensors."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = w.dtype.element_ty
    ST: tl.constexpr = tl.float32 if tl.float32 == DT else tl.float16
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    q_scale = row_scales(q, first, q_stride, head, valid, C, K, L2NORM) * scale
    k_scale = row_scales(k, first, k_stride, head, valid, C, K, L2NORM)

    b_attend, b_erase = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for column in range(0, K, BK):
        b_g, _, _ = log_decays(
            g, A_log, dt_bias, first, g_stride, head, column, valid, bound, C, K, BK, RAW, BIAS, BOUNDED
        )
        tl.store(decay + tile * K + column + tl.arange(0, BK), tl.exp(tl.sum(b_g, 0)))
        high, low = split(b_g, ST)
        start_decay = tl.exp(summed(spans, FROM_START, high, low, C, PRECISION))
        channels = column_offsets(tile, column, C, K, BK)
        b_q = load_rows(q + head * K + column, first, q_stride, valid, C, BK) * q_scale[:, None]
        tl.store(reader + channels, (b_q * start_decay).to(DT))
        b_k = load_rows(k + head * K + column, first, k_stride, valid, C, BK) * k_scale[:, None]
        to_end = summed(spans, TO_END, high, low, C, PRECISION)
        tl.store(writer + channels, (b_k * tl.exp(to_end)).to(DT))
        tl.store(w + channels, (b_k * start_decay).to(DT))
        b_attend, b_erase = add_pairs(b_q, b_k, spans, high, low, b_attend, b_erase, C, BK, DT, PRECISION)
    tl.store(attend + tile_offsets(tile, C, C), b_attend.to(DT))

    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    b_inverse = unit_lower_inverse(b_erase * b_beta[:, None], C, ST, PRECISION)
    if KEEP_INVERSE:
        tl.store(inverse + tile_offsets(tile, C, C), b_inverse.to(DT))
    b_inverse = (b_inverse * b_beta[None, :]).to(DT)
    b_v = load_rows(v + head * V, first, v_stride, valid, C, V).to(DT)
    tl.store(u + tile_offsets(tile, C, V), tl.dot(b_inverse, b_v, input_precision=PRECISION).to(DT))
    tl.debug_barrier()  # w holds k exp(G), written by other threads
    b_k = tl.load(w + tile_offsets(tile, C, K))
    tl.debug_barrier()
    tl.store(w + tile_offsets(tile, C, K), tl.dot(b_inverse, b_k, input_precision=PRECISION).to(DT))
