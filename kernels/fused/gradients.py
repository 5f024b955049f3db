"""Gradients of a chunk's inputs from those of its outputs and of the states around it, all chunks and heads at once.

With S the state before the chunk, dS' the gradient of the state after it, `new` the values written, X, P, A as in
`prepare`, and M' the gradient of M, everything passes through solved = X^T new':

    P' = lower(do new^T)               A' = -strictly_lower(solved new^T)         v' = beta solved
    (q exp(G))' = do S^T               (k exp(G_C - G))' = new dS'^T              (beta k exp(G))' = -solved S^T

(A' is -X^T X' X^T with X' = new' (beta v)^T + w' (beta k exp(G))^T, w' = -new' S^T and new = u - w S put in.)

A log-decay appears only as exp(+G) beside some q or k, or exp(-G) beside some k, so that G' (`dlog`) is the sum of q q'
and of k k' with that sign, and of what exp(G_C) multiplies; g' sums G' from the token to the end of the chunk.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.prepare import log_decays, within_16
from deltarl.kernels.fused.tiles import (
    FROM_START,
    ONWARDS,
    TO_END,
    TO_MIDDLE_16,
    TO_MIDDLE_32,
    before,
    column_offsets,
    in_one_block,
    is_late,
    load_rows,
    not_after,
    row_scales,
    split,
    store_rows,
    summed,
    tile_offsets,
    token_of_16,
    write_strengths,
)


@triton.jit
def factored_gradients(
    q, k, to_late, to_early, dattend, derase, pairs, beta, dq, dk, dlog, dbeta, C: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the chosen `pairs` [C, C] give to the gradients of q, k, G and beta.

    `dattend` and `derase` point to [C, C], zero above the diagonal; a pair's decay is `to_late` times `to_early`. What
    a pair gives to G of its later token it takes from its earlier one: both from the same rounded factors, so that
    nothing remains for the tokens before the two.
    """
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    here, flipped = row * C + column, row + column * C
    early_k = (k * to_early).to(DT)
    late_q = (q * to_late).to(DT)
    attended = tl.where(pairs, tl.load(dattend + here), 0.0).to(DT)
    found = tl.dot(attended, early_k, input_precision=PRECISION)
    dq += found * to_late
    dlog += found * late_q.to(tl.float32)
    late_k = (k * to_late * beta[:, None]).to(DT)
    erased = tl.where(pairs, tl.load(derase + here), 0.0).to(DT)
    found = tl.dot(erased, early_k, input_precision=PRECISION)
    dlog += found * late_k.to(tl.float32)
    found *= to_late
    dbeta += tl.sum(found * k, 1)
    dk += found * beta[:, None]
    attended = tl.where(pairs, tl.load(dattend + flipped), 0.0).to(DT)
    erased = tl.where(pairs, tl.load(derase + flipped), 0.0).to(DT)
    found = tl.dot(attended, late_q, input_precision=PRECISION)
    found = tl.dot(erased, late_k, found, input_precision=PRECISION)
    dk += found * to_early
    dlog -= found * early_k.to(tl.float32)
    return dq, dk, dlog, dbeta


@triton.jit
def halved_gradients(
    q, k, spans, high, low, dattend, derase, beta, dq, dk, dlog, dbeta, HALF: tl.constexpr, C: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`factored_gradients` of the pairs between the halves of each block of 2 * HALF tokens."""
    decay = tl.exp(summed(spans, TO_MIDDLE_32 if HALF == 32 else TO_MIDDLE_16, high, low, C, PRECISION))
    late = is_late(HALF, C)
    pairs = in_one_block(2 * HALF, C) & (in_one_block(HALF, C) == 0)
    return factored_gradients(
        q, k, tl.where(late, decay, 0.0), tl.where(late, 0.0, decay), dattend, derase, pairs, beta,
        dq, dk, dlog, dbeta, C, DT, PRECISION,
    )  # fmt: skip


@triton.jit
def single_gradients(
    q, k, since_start, too_steep, dattend, derase, beta, dq, dk, dlog, dbeta, C: tl.constexpr, D: tl.constexpr
):
    """The same for the pairs within 16 tokens whose later token is `too_steep`, one earlier of every 16 at a time."""
    token = tl.arange(0, C)
    for early in range(16):
        early_k = token_of_16(k, early, C, D)
        decay = tl.exp(tl.minimum(since_start - token_of_16(since_start, early, C, D), 0.0)) * too_steep[:, None]
        pair = token * C + token // 16 * 16 + early
        attended = tl.load(dattend + pair).to(tl.float32)[:, None] * decay
        erased = tl.load(derase + pair).to(tl.float32)[:, None] * decay
        dq += attended * early_k
        dbeta += tl.sum(erased * early_k * k, 1)
        dk += erased * early_k * beta[:, None]
        found = attended * q + erased * k * beta[:, None]
        dlog += found * early_k
        found = tl.reshape(found, (C // 16, 16, D))
        found = tl.broadcast_to(tl.sum(found, 1, keep_dims=True), (C // 16, 16, D))
        found = tl.where((token % 16)[:, None] == early, tl.reshape(found, (C, D)), 0.0)
        dk += found
        dlog -= found * early_k
    return dq, dk, dlog, dbeta


@triton.jit
def pair_gradients(
    q, k, spans, high, low, dattend, derase, beta, dq, dk, dlog, dbeta, C: tl.constexpr, D: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The counterpart of `prepare.add_pairs`, with the same choice within 16 tokens."""
    for level in tl.static_range(2):
        dq, dk, dlog, dbeta = halved_gradients(
            q, k, spans, high, low, dattend, derase, beta, dq, dk, dlog, dbeta, 32 >> level, C, DT, PRECISION
        )
    fall, rise, too_steep = within_16(spans, high, low, C, PRECISION)
    dq, dk, dlog, dbeta = factored_gradients(
        q, k, fall, rise, dattend, derase, in_one_block(16, C), beta, dq, dk, dlog, dbeta, C, DT, PRECISION
    )
    if tl.max(too_steep) > 0:
        since_start = summed(spans, FROM_START, high, low, C, PRECISION)
        dq, dk, dlog, dbeta = single_gradients(
            q, k, since_start, too_steep, dattend, derase, beta, dq, dk, dlog, dbeta, C, D
        )
    return dq, dk, dlog, dbeta


@triton.jit(do_not_specialize=["H", "beta_stride"])
def value_gradients_kernel(
    v, beta, do, inverse, new, dnew, dattend, derase, chunk_row, chunk_size, dv, dbeta, v_stride, beta_stride,
    H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk: P' and A' [chunks, H, C, C], dv [rows, H, V], and the part of dbeta
    [chunks, H, C] that came through v, in fp32. `dnew` becomes `solved`."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    solve = tl.trans(tl.load(inverse + tile_offsets(tile, C, C)))
    b_dattend, b_derase = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    b_dbeta = tl.zeros((C,), tl.float32)
    for column in range(0, V, BV):
        values = column_offsets(tile, column, C, V, BV)
        solved = tl.dot(solve, tl.load(dnew + values), input_precision=PRECISION)
        b_v = load_rows(v + head * V + column, first, v_stride, valid, C, BV)
        b_dbeta += tl.sum(solved * b_v, 1)
        store_rows(dv + head * V + column, solved * b_beta[:, None], first, H * V, valid, C, BV)
        tl.debug_barrier()  # every thread has read dnew
        solved = solved.to(DT)
        tl.store(dnew + values, solved)
        b_new = tl.trans(tl.load(new + values))
        b_derase -= tl.dot(solved, b_new, input_precision=PRECISION)
        b_do = load_rows(do + head * V + column, first, H * V, valid, C, BV).to(DT)
        b_dattend += tl.dot(b_do, b_new, input_precision=PRECISION)
    tl.store(derase + tile_offsets(tile, C, C), tl.where(before(C), b_derase, 0.0).to(DT))
    tl.store(dattend + tile_offsets(tile, C, C), tl.where(not_after(C), b_dattend, 0.0).to(DT))
    tl.store(dbeta + tile * C + tl.arange(0, C), b_dbeta)


@triton.jit(do_not_specialize=["H", "beta_stride"])
def gradients_kernel(
    q, k, g, beta, A_log, dt_bias, do, states, dstates, new, solved, dattend, derase, dbeta_by_v,
    chunk_row, chunk_size, spans, dq, dk, dg, dbeta, dA_log, ddt_bias,
    q_stride, k_stride, g_stride, beta_stride, scale, bound,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk. Gradients are contiguous [rows, H, ...]; those of A_log [chunks, H] and
    dt_bias [chunks, H, K] are this chunk's share."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = new.dtype.element_ty
    ST: tl.constexpr = tl.float32 if tl.float32 == DT else tl.float16
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    dattend += tile.to(tl.int64) * C * C
    derase += tile.to(tl.int64) * C * C
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    b_dbeta = tl.load(dbeta_by_v + tile * C + tl.arange(0, C))
    q_scale = row_scales(q, first, q_stride, head, valid, C, K, L2NORM)
    k_scale = row_scales(k, first, k_stride, head, valid, C, K, L2NORM)
    q_share, k_share = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    rate_share = tl.zeros((C,), tl.float32)
    for column in range(0, K, BK):
        b_dq, dk_late = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        b_dk, dtotal = tl.zeros((C, BK), tl.float32), tl.zeros((BK,), tl.float32)
        for value in range(0, V, BV):
            corner = column * V + column_offsets(tile * (K // BK), value, BK, V, BV)
            b_state, b_dstate = tl.load(states + corner), tl.load(dstates + corner)
            dtotal += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
            values = column_offsets(tile, value, C, V, BV)
            b_dk += tl.dot(tl.load(new + values), tl.trans(b_dstate), input_precision=PRECISION)
            b_state = tl.trans(b_state)
            b_do = load_rows(do + head * V + value, first, H * V, valid, C, BV).to(DT)
            b_dq += tl.dot(b_do, b_state, input_precision=PRECISION)
            dk_late -= tl.dot(tl.load(solved + values), b_state, input_precision=PRECISION)

        b_g, _, _ = log_decays(
            g, A_log, dt_bias, first, g_stride, head, column, valid, bound, C, K, BK, RAW, BIAS, BOUNDED
        )
        high, low = split(b_g, ST)
        b_q = load_rows(q + head * K + column, first, q_stride, valid, C, BK) * (q_scale * scale)[:, None]
        b_k = load_rows(k + head * K + column, first, k_stride, valid, C, BK) * k_scale[:, None]
        start_decay = tl.exp(summed(spans, FROM_START, high, low, C, PRECISION))
        b_dq *= start_decay
        dk_late *= start_decay
        b_dbeta += tl.sum(dk_late * b_k, 1)
        dk_late *= b_beta[:, None]
        b_dk *= tl.exp(summed(spans, TO_END, high, low, C, PRECISION))
        dtotal = dtotal * tl.exp(tl.sum(b_g, 0)) + tl.sum(b_dk * b_k, 0)
        dlog = b_q * b_dq + b_k * (dk_late - b_dk)
        b_dk += dk_late
        b_dq, b_dk, dlog, b_dbeta = pair_gradients(
            b_q, b_k, spans, high, low, dattend, derase, b_beta, b_dq, b_dk, dlog, b_dbeta, C, BK, DT, PRECISION
        )
        q_share += tl.sum(b_q * b_dq, 1)
        k_share += tl.sum(b_k * b_dk, 1)
        store_rows(dq + head * K + column, b_dq * (q_scale * scale)[:, None], first, H * K, valid, C, BK)
        store_rows(dk + head * K + column, b_dk * k_scale[:, None], first, H * K, valid, C, BK)

        tl.debug_barrier()  # loads g again: its gate need not be kept while the pairs are worked on
        b_g, slope, raw = log_decays(
            g, A_log, dt_bias, first, g_stride, head, column, valid, bound, C, K, BK, RAW, BIAS, BOUNDED
        )
        high, low = split(dlog, DT)
        dlog = summed(spans, ONWARDS, high, low, C, PRECISION) + dtotal[None, :]
        b_dg = dlog * slope
        store_rows(dg + head * K + column, b_dg, first, H * K, valid, C, BK)
        if RAW:
            if BIAS:
                tl.store(ddt_bias + tile * K + column + tl.arange(0, BK), tl.sum(b_dg, 0))
            by_rate = b_dg * raw if BOUNDED else tl.where(slope == 0.0, 0.0, dlog * b_g)
            rate_share += tl.sum(by_rate, 1)

    if RAW:
        b_dbeta *= b_beta * (1.0 - b_beta)
        tl.store(dA_log + tile, tl.sum(rate_share, 0))
    tl.store(dbeta + (first + tl.arange(0, C)) * H + head, b_dbeta.to(dbeta.dtype.element_ty), mask=valid)
    if L2NORM:
        tl.debug_barrier()  # dq and dk were written by other threads
        subtract_along(dq, q, q_stride, q_share * q_scale * q_scale, first, head, valid, H, C, K)
        subtract_along(dk, k, k_stride, k_share * k_scale * k_scale, first, head, valid, H, C, K)


@triton.jit
def subtract_along(dx, x, stride, share, first, head, valid, H, C: tl.constexpr, K: tl.constexpr):
    """dx -= share x, row by row: the part of a gradient along a row whose length was divided out."""
    rows = load_rows(dx + head * K, first, H * K, valid, C, K)
    rows -= share[:, None] * load_rows(x + head * K, first, stride, valid, C, K)
    tl.debug_barrier()
    store_rows(dx + head * K, rows, first, H * K, valid, C, K)
