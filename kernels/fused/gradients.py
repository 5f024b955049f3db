"""Gradients of a chunk's inputs from those of its outputs and of the states around it, all chunks and heads at once.

With S the state before the chunk, dS' the gradient of the state after it, `new` the values written, X, P, A as in
`prepare`, and M' the gradient of M, everything passes through solved = X^T new':

    P' = lower(do new^T)               A' = -strictly_lower(solved new^T)         v' = beta solved
    (q exp(G))' = do S^T               (k exp(G_C - G))' = new dS'^T              (beta k exp(G))' = -solved S^T

(A' is -X^T X' X^T with X' = new' (beta v)^T + w' (beta k exp(G))^T, w' = -new' S^T and new = u - w S put in.)
`value_gradients` finds these products; here they become gradients of q, k and g.

A log-decay appears only as exp(+G) beside some q or k, or exp(-G) beside some k, so that G' (`dlog`) is the sum of q q'
and of k k' with that sign, and of what exp(G_C) multiplies; g' sums G' from the token to the end of the chunk.

The gradients of outputs, and all that is linear in them, are in the range that `ranges.into_range` found for them;
those of the pairs are divided by a power of 2 of their own besides, for each chunk and head.

Row sums over all channels need no channels. o is linear in q, so that q . q' = o . o'. From new = beta (v - S^T k) and
S = S + k new^T, token by token, k . k' = (2 new - beta v) . solved, and beta' = solved . new / beta.

Between the phases of `gradients_kernel` stand barriers: the compiler would load ahead of its use what finds no room in
registers.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.prepare import log2_decays
from deltarl.kernels.fused.tiles import (
    FROM_START,
    HALVINGS,
    LN_2,
    NEAR,
    ONWARDS,
    SHARED_HALVES,
    TO_END,
    column_offsets,
    load_rows,
    raw_rows,
    store_rows,
    summed,
    write_strengths,
)


@triton.jit
def in_blocks(x, C: tl.constexpr):
    """x [C] or [C, D] as [C / 16, 16] or [C / 16, 16, D]."""
    if len(x.shape) == 1:
        return tl.reshape(x, (C // 16, 16))
    else:
        return tl.reshape(x, (C // 16, 16, x.shape[1]))


@triton.jit
def block_rows(x, first, stride, size, C: tl.constexpr, D: tl.constexpr):
    """[C / 16, 16, D] in fp32: `size` rows of x from `first` on, zero after them."""
    row = tl.arange(0, C // 16)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    there = x + (first + row).to(tl.int64) * stride + tl.arange(0, D)[None, None, :]
    return tl.load(there, mask=row < size, other=0.0).to(tl.float32)


@triton.jit
def near_pair_gradients(q, k, g, spans, pairs, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """What pairs within 16 tokens give to the gradients of q and k, and to that of k with the sign of its log-decay: +
    where its token is the later one. [C, D] each, level by level as in `prepare.pairs_of`.

    `pairs` points to three [C, C] of `value_gradients_kernel`; q, k, g [C / 16, 16, D] are of the type of the products.
    """
    N: tl.constexpr = C // 16
    dq, dk = tl.zeros((N, 16, D), tl.float32), tl.zeros((N, 16, D), tl.float32)
    dk_by_role = tl.zeros((N, 16, D), tl.float32)
    block, i, j = tl.arange(0, N)[:, None, None], tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    here = (block * 16 + i) * C + block * 16 + j
    table = i * C + j + block * 0  # the same for all blocks
    attended, attended_back = tl.load(pairs + here), tl.load(pairs + C * C + here)
    erased = tl.load(pairs + 2 * C * C + here)
    for level in tl.range(NEAR, HALVINGS, num_stages=1):
        span = tl.load(spans + level * C * C + table).to(g.dtype)
        shared = tl.load(spans + (SHARED_HALVES + level - NEAR) * C * C + table).to(g.dtype)
        decay = tl.exp2(tl.dot(span, g, input_precision=PRECISION))
        late_q, both_k = q * decay.to(q.dtype), k * decay.to(q.dtype)
        dq += decay * tl.dot(attended * shared, both_k, input_precision=PRECISION)
        found = tl.dot(erased * shared, both_k, input_precision=PRECISION)
        found = tl.dot(attended_back * shared, late_q, found, input_precision=PRECISION) * decay
        dk += found
        role = tl.where((tl.arange(0, 16) & ((C // 2) >> level)) > 0, 1.0, -1.0)
        dk_by_role += found * role[None, :, None]
    return tl.reshape(dq, (C, D)), tl.reshape(dk, (C, D)), tl.reshape(dk_by_role, (C, D))


@triton.jit
def add_far_pair_gradients(
    q, k, g, spans, pairs, dq, dk, dk_by_role, LEVEL: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds what pairs of one level above 16 tokens give; q, k, g [C, D], all else as in `near_pair_gradients`."""
    HALF: tl.constexpr = (C // 2) >> LEVEL
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    here = i * C + j
    shared = (i // (2 * HALF) == j // (2 * HALF)) & (i // HALF != j // HALF)
    decay = tl.exp2(summed(spans, LEVEL, g, C, PRECISION))
    late_q, both_k = q * decay.to(q.dtype), k * decay.to(q.dtype)
    dq += decay * tl.dot(tl.load(pairs + here, mask=shared, other=0.0), both_k, input_precision=PRECISION)
    erased = tl.load(pairs + 2 * C * C + here, mask=shared, other=0.0)
    found = tl.dot(erased, both_k, input_precision=PRECISION)
    attended_back = tl.load(pairs + C * C + here, mask=shared, other=0.0)
    found = tl.dot(attended_back, late_q, found, input_precision=PRECISION) * decay
    role = tl.where((tl.arange(0, C) & HALF) > 0, 1.0, -1.0)
    return dq, dk + found, dk_by_role + found * role[:, None]


@triton.jit(do_not_specialize=["H", "beta_stride"])
def gradients_kernel(
    q, k, g, beta, A_log, dt_bias, factor, pairs, unit, along, by_state, units, total, factors, decay,
    chunk_row, chunk_size, spans, dq, dk, dg, dbeta, dA_log, ddt_bias,
    q_stride, k_stride, g_stride, beta_stride, scale, bound, rows,
    H, SHARED: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
    RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BK channels of one head of one chunk. Gradients are contiguous [rows, H, ...], those of q and k
    too where heads share them; those of A_log [chunks, H, K / BK] and dt_bias [chunks, H, K] are this chunk's share.
    Unless RAW, dbeta [1 + K / BK, rows, H] gets what came through these channels."""
    head, block, chunk = tl.program_id(0) // (K // BK), tl.program_id(0) % (K // BK), tl.program_id(1)
    tile, column = chunk * H + head, block * BK
    DT: tl.constexpr = pairs.dtype.element_ty
    first, size = tl.load(chunk_row + chunk), tl.load(chunk_size + chunk)
    valid = tl.arange(0, C) < size
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    smaller = 1.0 / tl.load(unit + tile)
    pairs += tile.to(tl.int64) * (3 * C * C)
    q, k, g = q + head // SHARED * K + column, k + head // SHARED * K + column, g + head * K + column

    b_g = raw_rows(g, first, g_stride, valid, C, BK)
    b_g, _, _ = log2_decays(b_g, A_log, dt_bias, head, column, valid, bound, K, BK, RAW, BIAS, BOUNDED)
    b_g = b_g.to(DT)
    per_row = tile * 2 * C + tl.arange(0, C)
    q_factor, k_factor = tl.load(factors + per_row), tl.load(factors + per_row + C)
    near_q = block_rows(q, first, q_stride, size, C, BK) * in_blocks(q_factor * scale, C)[:, :, None]
    near_k = block_rows(k, first, k_stride, size, C, BK) * in_blocks(k_factor, C)[:, :, None]
    b_dq, b_dk, dlog = near_pair_gradients(
        near_q.to(DT), near_k.to(DT), in_blocks(b_g, C), spans, pairs, C, BK, PRECISION
    )
    tl.debug_barrier()
    b_q = (load_rows(q, first, q_stride, valid, C, BK) * (q_factor * scale)[:, None]).to(DT)
    b_k = (load_rows(k, first, k_stride, valid, C, BK) * k_factor[:, None]).to(DT)
    for level in tl.static_range(NEAR):
        b_dq, b_dk, dlog = add_far_pair_gradients(b_q, b_k, b_g, spans, pairs, b_dq, b_dk, dlog, level, C, PRECISION)
        tl.debug_barrier()

    channels = column_offsets(tile * 3, column, C, K, BK)
    b_units = units + (tile * (K // WIDTH) + column // WIDTH) * 3
    by_end = tl.load(by_state + channels).to(tl.float32)
    by_end *= tl.exp2(summed(spans, TO_END, b_g, C, PRECISION)) * (tl.load(b_units) * smaller)
    b_dk += by_end
    dlog -= by_end
    per_channel = tile * K + column + tl.arange(0, BK)
    dtotal = tl.load(total + per_channel) * smaller
    dtotal *= tl.load(decay + per_channel)
    dtotal += tl.sum(by_end * b_k.to(tl.float32), 0)
    since_start = tl.exp2(summed(spans, FROM_START, b_g, C, PRECISION))
    by_start = tl.load(by_state + C * K + channels).to(tl.float32) * (since_start * (tl.load(b_units + 1) * -smaller))
    if not RAW:
        by_channels = tl.sum(by_start * b_k.to(tl.float32), 1) * (tl.load(unit + tile) * tl.load(factor + tile))
        tl.store(dbeta + ((1 + block) * rows + first + tl.arange(0, C)) * H + head, by_channels, mask=valid)
    by_start *= b_beta[:, None]
    b_dk += by_start
    dlog += by_start
    b_dq += tl.load(by_state + 2 * C * K + channels).to(tl.float32) * (since_start * (tl.load(b_units + 2) * smaller))
    tl.debug_barrier()

    diagonal = tl.load(pairs + tl.arange(0, C) * (C + 1)).to(tl.float32)
    unit_q, unit_k = b_q.to(tl.float32), b_k.to(tl.float32)
    dlog = unit_k * dlog + unit_q * b_dq
    b_unit = tl.load(unit + tile) * tl.load(factor + tile)
    along_q, along_k = tl.load(along + per_row), tl.load(along + per_row + C)
    b_dq = (b_dq + diagonal[:, None] * unit_k) * b_unit
    b_dk = (b_dk + diagonal[:, None] * unit_q) * b_unit
    if L2NORM:
        b_dq -= unit_q * (along_q / (scale * scale))[:, None]
        b_dk -= unit_k * along_k[:, None]
    b_dq *= (q_factor * scale)[:, None]
    b_dk *= k_factor[:, None]
    store_rows(dq + head * K + column, b_dq, first, H * K, valid, C, BK)
    store_rows(dk + head * K + column, b_dk, first, H * K, valid, C, BK)
    tl.debug_barrier()

    last = tl.arange(0, C)[:, None] == C - 1
    dlog += tl.where(last, dtotal[None, :], 0.0)
    raw_g = raw_rows(g, first, g_stride, valid, C, BK)
    dlog = summed(spans, ONWARDS, dlog, C, "ieee" if tl.float32 == DT else "tf32x3")
    log_decay, slope, raw = log2_decays(raw_g, A_log, dt_bias, head, column, valid, bound, K, BK, RAW, BIAS, BOUNDED)
    if RAW and not BOUNDED:
        by_rate = tl.sum(tl.sum(dlog * log_decay, 1), 0)
        tl.store(dA_log + tile * (K // BK) + block, by_rate * b_unit * LN_2)
    slope *= b_unit
    b_dg = dlog * slope
    store_rows(dg + head * K + column, b_dg, first, H * K, valid, C, BK)
    if RAW and BOUNDED:
        tl.store(dA_log + tile * (K // BK) + block, tl.sum(tl.sum(b_dg * raw, 1), 0))
    if BIAS:
        tl.store(ddt_bias + per_channel, tl.sum(b_dg, 0))
