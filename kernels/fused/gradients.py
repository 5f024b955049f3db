"""Gradients of a chunk's inputs from those of its outputs and of the states around it, all chunks and heads at once.

With S the state before the chunk, dS' the gradient of the state after it, `new` the values written, X, P, A as in
`prepare`, and M' the gradient of M, everything passes through solved = X^T new':

    P' = lower(do new^T)               A' = -strictly_lower(solved new^T)         v' = beta solved
    (q exp(G))' = do S^T               (k exp(G_C - G))' = new dS'^T              (beta k exp(G))' = -solved S^T

(A' is -X^T X' X^T with X' = new' (beta v)^T + w' (beta k exp(G))^T, w' = -new' S^T and new = u - w S put in.)

A log-decay appears only as exp(+G) beside some q or k, or exp(-G) beside some k, so that G' (`dlog`) is the sum of q q'
and of k k' with that sign, and of what exp(G_C) multiplies; g' sums G' from the token to the end of the chunk.

The gradients of outputs, and all that is linear in them, are in the range that `ranges.into_range` gave them; those of
the pairs are divided by a power of 2 of their own besides, for each chunk and head.

Row sums over all channels need no channels. o is linear in q, so that q . q' = o . o'. From new = beta (v - S^T k) and
S = S + k new^T, token by token, k . k' = (2 new - beta v) . solved, and beta' = solved . new / beta.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.prepare import log2_decays
from deltarl.kernels.fused.tiles import (
    FROM_START,
    HALVINGS,
    LN_2,
    ONWARDS,
    SHARED_HALVES,
    TO_END,
    before,
    column_offsets,
    load_rows,
    not_after,
    raw_rows,
    store_rows,
    summed,
    tile_offsets,
    write_strengths,
)


@triton.jit
def power_of_2(x):
    """The largest power of 2 that is at most x >= 0, within 2^-60 and 2^60."""
    bits = tl.minimum(tl.maximum(x, 2.0**-60), 2.0**60).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["H", "beta_stride"])
def value_gradients_kernel(
    v, beta, o, do, factor, erase, inverse, new, dnew, pairs, unit, along, chunk_row, chunk_size, dv, dbeta,
    v_stride, beta_stride,
    H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk. Writes dv [rows, H, V], dbeta [rows, H] in fp32 (unless RAW, without what
    came through w) and, for `gradients_kernel`,

        pairs [chunks, H, 3, C, C]  P', its transpose, and beta A' plus its transpose, divided by unit [chunks, H]
        along [chunks, H, 2, C]     q . q' and k . k'

    `dnew` becomes `solved`. All but `pairs` are multiplied by `factor` [chunks, H], as `do` in fp16 is to be."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    rows = tl.arange(0, C)
    valid = rows < tl.load(chunk_size + chunk)
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    b_factor = tl.load(factor + tile)
    solve = tl.trans(tl.load(inverse + tile_offsets(tile, C, C)))
    attended, attended_back = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    erased, erased_back = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    by_new, by_v, along_q = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for column in tl.range(0, V, BV, num_stages=1):
        values = column_offsets(tile, column, C, V, BV)
        b_dnew, b_new = tl.load(dnew + values), tl.load(new + values)
        b_v = raw_rows(v + head * V + column, first, v_stride, valid, C, BV)
        b_do = raw_rows(do + head * V + column, first, H * V, valid, C, BV)
        b_o = raw_rows(o + head * V + column, first, H * V, valid, C, BV)
        along_q += tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        solved = tl.dot(solve, b_dnew, input_precision=PRECISION)
        by_v += tl.sum(solved * b_v.to(tl.float32), 1)
        by_new += tl.sum(solved * b_new.to(tl.float32), 1)
        store_rows(dv + head * V + column, solved * (b_beta * b_factor)[:, None], first, H * V, valid, C, BV)
        tl.debug_barrier()  # every thread has read dnew
        solved = solved.to(DT)
        tl.store(dnew + values, solved)
        erased = tl.dot(solved, tl.trans(b_new), erased, input_precision=PRECISION)
        erased_back = tl.dot(b_new, tl.trans(solved), erased_back, input_precision=PRECISION)
        attended = tl.dot(b_do, tl.trans(b_new), attended, input_precision=PRECISION)
        attended_back = tl.dot(b_new, tl.trans(b_do), attended_back, input_precision=PRECISION)
    tl.store(along + tile * 2 * C + rows, along_q * b_factor)
    tl.store(along + tile * 2 * C + C + rows, (2.0 * by_new - b_beta * by_v) * b_factor)
    later, here = before(C), tile_offsets(tile, C, C)
    erased = tl.where(later, -erased, 0.0)
    b_dbeta = by_new * (1.0 - b_beta)
    if not RAW:
        b_dbeta = by_v + tl.sum(erased * tl.load(erase + here).to(tl.float32), 1)
    tl.store(dbeta + (first + rows).to(tl.int64) * H + head, b_dbeta * b_factor, mask=valid)
    erased *= b_beta[:, None]
    attended = tl.where(not_after(C), attended, 0.0)
    b_unit = power_of_2(tl.maximum(tl.max(tl.abs(erased)), tl.max(tl.abs(attended))))
    tl.store(unit + tile, b_unit)
    smaller = 1.0 / b_unit
    here = tile_offsets(tile * 3, C, C)
    tl.store(pairs + here, (attended * smaller).to(pairs.dtype.element_ty))
    attended_back = tl.where(later, 0.0, attended_back * smaller)
    tl.store(pairs + C * C + here, attended_back.to(pairs.dtype.element_ty))
    erased_back = tl.where(not_after(C), 0.0, -erased_back * b_beta[None, :])
    tl.store(pairs + 2 * C * C + here, ((erased + erased_back) * smaller).to(pairs.dtype.element_ty))


@triton.jit
def pair_gradients(q, k, g, spans, pairs, dq, dk, dk_by_role, C: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what the pairs give to the gradients of q and k, and to that of k with the sign of its log-decay: + where
    its token is the later one. Level by level, as in `prepare.pairs_of`.

    `pairs` points to three [C, C] of `value_gradients_kernel`; q, k, g [C, K] are of the type of the products.
    """
    here = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    for level in tl.range(0, HALVINGS, num_stages=1):
        decay = tl.exp2(summed(spans, level, g, C, PRECISION))
        late_q, both_k = q * decay.to(q.dtype), k * decay.to(q.dtype)
        shared = tl.load(spans + (SHARED_HALVES + level) * C * C + here).to(q.dtype)
        dq += decay * tl.dot(tl.load(pairs + here) * shared, both_k, input_precision=PRECISION)
        found = tl.dot(tl.load(pairs + 2 * C * C + here) * shared, both_k, input_precision=PRECISION)
        found = tl.dot(tl.load(pairs + C * C + here) * shared, late_q, found, input_precision=PRECISION) * decay
        dk += found
        role = tl.where((tl.arange(0, C) & ((C // 2) >> level)) > 0, 1.0, -1.0)
        dk_by_role += found * role[:, None]
    return dq, dk, dk_by_role


@triton.jit(do_not_specialize=["H", "beta_stride"])
def gradients_kernel(
    q, k, g, beta, A_log, dt_bias, do, factor, states, dstates, new, solved, pairs, unit, factors,
    along, decay, chunk_row, chunk_size, spans, dq, dk, dg, dbeta, dA_log, ddt_bias,
    q_stride, k_stride, g_stride, beta_stride, scale, bound, rows,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BK channels of one head of one chunk. Gradients are contiguous [rows, H, ...], those of q and k
    too where heads share them; those of A_log [chunks, H, K / BK] and dt_bias [chunks, H, K] are this chunk's share.
    Unless RAW, dbeta [1 + K / BK, rows, H] gets what came through these channels."""
    head, block, chunk = tl.program_id(0) // (K // BK), tl.program_id(0) % (K // BK), tl.program_id(1)
    tile, column = chunk * H + head, block * BK
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    smaller = 1.0 / tl.load(unit + tile)

    b_g = raw_rows(g + head * K + column, first, g_stride, valid, C, BK)
    b_g, _, _ = log2_decays(b_g, A_log, dt_bias, head, column, valid, bound, K, BK, RAW, BIAS, BOUNDED)
    b_g = b_g.to(DT)

    b_dq, b_dk = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    dk_start, dtotal = tl.zeros((C, BK), tl.float32), tl.zeros((BK,), tl.float32)
    for value in tl.range(0, V, BV, num_stages=1):  # in 2 stages and more the values differ from run to run
        corner = column * V + column_offsets(tile * (K // BK), value, BK, V, BV)
        b_state, b_dstate = tl.load(states + corner), tl.load(dstates + corner)
        dtotal += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
        values = column_offsets(tile, value, C, V, BV)
        b_dk = tl.dot(tl.load(new + values), tl.trans(b_dstate), b_dk, input_precision=PRECISION)
        b_state = tl.trans(b_state)
        b_do = raw_rows(do + head * V + value, first, H * V, valid, C, BV)
        b_dq = tl.dot(b_do, b_state, b_dq, input_precision=PRECISION)
        dk_start = tl.dot(tl.load(solved + values), b_state, dk_start, input_precision=PRECISION)

    since_start = tl.exp2(summed(spans, FROM_START, b_g, C, PRECISION))
    b_dq *= since_start * smaller
    dk_start *= since_start * -smaller
    b_dk *= tl.exp2(summed(spans, TO_END, b_g, C, PRECISION)) * smaller
    per_row = tile * 2 * C + tl.arange(0, C)
    q_factor, k_factor = tl.load(factors + per_row), tl.load(factors + per_row + C)
    b_q = load_rows(q + head // SHARED * K + column, first, q_stride, valid, C, BK) * (q_factor * scale)[:, None]
    b_k = load_rows(k + head // SHARED * K + column, first, k_stride, valid, C, BK) * k_factor[:, None]
    b_q, b_k = b_q.to(DT), b_k.to(DT)
    if not RAW:
        by_channels = tl.sum(dk_start * b_k.to(tl.float32), 1) * (tl.load(unit + tile) * tl.load(factor + tile))
        tl.store(dbeta + ((1 + block) * rows + first + tl.arange(0, C)) * H + head, by_channels, mask=valid)
    dk_start *= b_beta[:, None]
    dtotal *= tl.load(decay + tile * K + column + tl.arange(0, BK)) * smaller
    dtotal += tl.sum(b_dk * b_k.to(tl.float32), 0)
    b_dq, b_dk, dlog = pair_gradients(
        b_q, b_k, b_g, spans, pairs + tile.to(tl.int64) * (3 * C * C),
        b_dq, b_dk + dk_start, dk_start - b_dk, C, PRECISION,
    )  # fmt: skip
    diagonal = tl.load(pairs + tile.to(tl.int64) * (3 * C * C) + tl.arange(0, C) * (C + 1)).to(tl.float32)
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

    last = tl.arange(0, C)[:, None] == C - 1
    dlog += tl.where(last, dtotal[None, :], 0.0)
    if RAW and not BOUNDED:
        by_rate = dlog * summed(spans, FROM_START, b_g, C, PRECISION)
        tl.store(dA_log + tile * (K // BK) + block, tl.sum(tl.sum(by_rate, 1), 0) * b_unit * LN_2)
    raw_g = raw_rows(g + head * K + column, first, g_stride, valid, C, BK)
    dlog = summed(spans, ONWARDS, dlog, C, "ieee" if tl.float32 == DT else "tf32x3")
    _, slope, raw = log2_decays(raw_g, A_log, dt_bias, head, column, valid, bound, K, BK, RAW, BIAS, BOUNDED)
    slope *= b_unit
    b_dg = dlog * slope
    store_rows(dg + head * K + column, b_dg, first, H * K, valid, C, BK)
    if RAW and BOUNDED:
        tl.store(dA_log + tile * (K // BK) + block, tl.sum(tl.sum(b_dg * raw, 1), 0))
    if BIAS:
        tl.store(ddt_bias + tile * K + column + tl.arange(0, BK), tl.sum(b_dg, 0))
