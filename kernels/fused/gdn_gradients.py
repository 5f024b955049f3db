"""Gradients of a chunk's inputs from those of its outputs and of the states around it, for one decay per head.

With S the state before the chunk, dS' the gradient of the state after it, `new` the values written, X, P, A as in
`gdn_prepare`, and M' the gradient of M, everything passes through solved = X^T new':

    P' = lower(do new^T)               A' = -strictly_lower(solved new^T)         v' = beta solved
    (q exp(G))' = do S^T               (k exp(G_C - G))' = new dS'^T              (beta k exp(G))' = -solved S^T

(A' is -X^T X' X^T with X' = new' (beta v)^T + w' (beta k exp(G))^T, w' = -new' S^T and new = u - w S put in.)

P' and A' times the decays of their pairs are the gradients of the products q k^T and k k^T. A pair's share of G' is
P' P + A' A, given to its later token and taken from its earlier one; the rest are the row sums of q q' and k k' in the
second line, and what exp(G_C) multiplies. g' sums G' from the token to the end of the chunk; what k k' gives to G_C - G
is summed up to the token instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs
from deltarl.kernels.fused.chunks import CHUNK
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.gdn_prepare import (
    BETA,
    END_DECAY,
    K_UNIT,
    Q_UNIT,
    START_DECAY,
    head_log_decays,
    pair_decays,
    token_row,
)
from deltarl.kernels.fused.launch import launch
from deltarl.kernels.fused.ranges import Scaled
from deltarl.kernels.fused.tiles import before, column_offsets, load_rows, store_rows, tile_offsets


@triton.jit(do_not_specialize=["H"])
def gdn_pair_gradients_kernel(
    v, do, factor, tokens, attend, erase, inverse, new, dnew, chunk_row, chunk_size, dattend, derase, dv, dbeta, dlog,
    v_stride, scale, H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of v of one chunk: `dattend` and `derase` [chunks, H, C, C], the gradients of q k^T and
    k k^T (unit rows), dv [rows, H, V], and the parts of dbeta and G' [chunks, H, C] that come through v and the pairs,
    in fp32; all but dv are divided by `factor`, as `do` is when it is read. `dnew` becomes `solved`."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    b_beta = token_row(tokens, tile, BETA, C)
    b_factor = tl.load(factor + tile)
    solve = tl.trans(tl.load(inverse + tile_offsets(tile, C, C)))
    b_dattend, b_derase = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    b_dbeta = tl.zeros((C,), tl.float32)
    for column in range(0, V, BV):
        values = column_offsets(tile, column, C, V, BV)
        solved = tl.dot(solve, tl.load(dnew + values), input_precision=PRECISION)
        b_v = load_rows(v + head * V + column, first, v_stride, valid, C, BV)
        b_dbeta += tl.sum(solved * b_v, 1)
        store_rows(dv + head * V + column, solved * (b_beta * b_factor)[:, None], first, H * V, valid, C, BV)
        tl.debug_barrier()  # every thread has read dnew
        solved = solved.to(DT)
        tl.store(dnew + values, solved)
        b_new = tl.trans(tl.load(new + values))
        b_derase -= tl.dot(solved, b_new, input_precision=PRECISION)
        b_do = (load_rows(do + head * V + column, first, H * V, valid, C, BV) * (1.0 / b_factor)).to(DT)
        b_dattend += tl.dot(b_do, b_new, input_precision=PRECISION)

    pairs = pair_decays(tokens, tile, C, PRECISION)
    here = tile_offsets(tile, C, C)
    tl.store(dattend + here, (b_dattend * pairs * scale).to(DT))
    tl.store(derase + here, (b_derase * tl.where(before(C), pairs, 0.0) * b_beta[:, None]).to(DT))
    moved = b_derase * tl.load(erase + here).to(tl.float32)
    tl.store(dbeta + tile * C + tl.arange(0, C), b_dbeta + tl.sum(moved, 1))
    moved *= b_beta[:, None]
    moved += tl.where(before(C), b_dattend * tl.load(attend + here).to(tl.float32), 0.0)
    tl.store(dlog + tile * C + tl.arange(0, C), tl.sum(moved, 1) - tl.sum(moved, 0))


@triton.jit
def before_norm(dx, x, x_unit, L2NORM: tl.constexpr):
    """The gradient of the rows whose unit rows x [C, D] have the gradient dx: less its part along x, times x_unit."""
    if L2NORM:
        dx = (dx - tl.sum(dx * x, 1)[:, None] * x) * x_unit[:, None]
    return dx


@triton.jit(do_not_specialize=["H", "g_stride"])
def gdn_gradients_kernel(
    q, k, g, A_log, dt_bias, do, factor, tokens, states, dstates, new, solved, dattend, derase,
    dbeta_part, dlog_part, dlog_read, chunk_row, chunk_size, dq, dk, dg, dbeta, dA_log, ddt_bias,
    q_stride, k_stride, g_stride, scale, bound,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, RAW: tl.constexpr,
    BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of q and k of one chunk, which goes through its SHARED heads of v. Gradients are
    contiguous [rows, heads, ...]; those of A_log and dt_bias [chunks, H] are this chunk's share. All are multiplied by
    `factor` [chunks, H], by which `do` is divided when it is read; `dlog_read` [chunks, H, C] is room for what the q of
    a head give to G'."""
    key_head, chunk = tl.program_id(0), tl.program_id(1)
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    place = tl.arange(0, C)
    valid = place < tl.load(chunk_size + chunk)
    q_unit = token_row(tokens, chunk * H + key_head * SHARED, Q_UNIT, C)
    k_unit = token_row(tokens, chunk * H + key_head * SHARED, K_UNIT, C)
    row_stride = H // SHARED * K
    b_dq = tl.zeros((C, K), tl.float32)
    for share in range(SHARED):
        tile = chunk * H + key_head * SHARED + share
        b_factor = tl.load(factor + tile)
        read = tl.zeros((C, K), tl.float32)
        for value in range(0, V, BV):
            b_state = tl.trans(tl.load(states + column_offsets(tile, value, K, V, BV)))
            b_do = load_rows(do + (key_head * SHARED + share) * V + value, first, H * V, valid, C, BV)
            b_do = (b_do * (1.0 / b_factor)).to(DT)
            read += tl.dot(b_do, b_state, input_precision=PRECISION)
        read *= (token_row(tokens, tile, START_DECAY, C) * scale)[:, None]
        b_q = load_rows(q + key_head * K, first, q_stride, valid, C, K) * q_unit[:, None]
        tl.store(dlog_read + tile * C + place, tl.sum(read * b_q, 1))
        b_k = load_rows(k + key_head * K, first, k_stride, valid, C, K) * k_unit[:, None]
        b_dattend = tl.load(dattend + tile_offsets(tile, C, C))
        b_dq += read * b_factor
        b_dq += tl.dot(b_dattend, b_k.to(DT), input_precision=PRECISION) * b_factor
    b_q = load_rows(q + key_head * K, first, q_stride, valid, C, K) * q_unit[:, None]
    store_rows(dq + key_head * K, before_norm(b_dq, b_q, q_unit, L2NORM), first, row_stride, valid, C, K)
    tl.debug_barrier()  # dlog_read was written by other threads

    b_dk = tl.zeros((C, K), tl.float32)
    for share in range(SHARED):
        head = key_head * SHARED + share
        tile = chunk * H + head
        here = tile * C + place
        b_factor, b_beta = tl.load(factor + tile), token_row(tokens, tile, BETA, C)
        erased = tl.zeros((C, K), tl.float32)
        for value in range(0, V, BV):
            b_state = tl.trans(tl.load(states + column_offsets(tile, value, K, V, BV)))
            b_solved = tl.load(solved + column_offsets(tile, value, C, V, BV))
            erased -= tl.dot(b_solved, b_state, input_precision=PRECISION)
        erased *= token_row(tokens, tile, START_DECAY, C)[:, None]
        b_k = load_rows(k + key_head * K, first, k_stride, valid, C, K) * k_unit[:, None]
        by_beta = tl.sum(erased * b_k, 1)
        b_dk += erased * (b_beta * b_factor)[:, None]
        flipped = tile.to(tl.int64) * (C * C) + place[:, None] + place[None, :] * C
        either = tl.load(derase + tile_offsets(tile, C, C)) + tl.load(derase + flipped)
        b_dk += tl.dot(either, b_k.to(DT), input_precision=PRECISION) * b_factor
        b_q = load_rows(q + key_head * K, first, q_stride, valid, C, K) * q_unit[:, None]
        b_dk += tl.dot(tl.load(dattend + flipped), b_q.to(DT), input_precision=PRECISION) * b_factor

        written, crossing = tl.zeros((C, K), tl.float32), tl.zeros((K,), tl.float32)
        for value in range(0, V, BV):
            corner = column_offsets(tile, value, K, V, BV)
            b_dstate = tl.load(dstates + corner)
            crossing += tl.sum(tl.load(states + corner).to(tl.float32) * b_dstate.to(tl.float32), 1)
            b_new = tl.load(new + column_offsets(tile, value, C, V, BV))
            written += tl.dot(b_new, tl.trans(b_dstate), input_precision=PRECISION)
        written *= token_row(tokens, tile, END_DECAY, C)[:, None]
        b_k = load_rows(k + key_head * K, first, k_stride, valid, C, K) * k_unit[:, None]
        kept = tl.sum(written * b_k, 1)
        b_dk += written * b_factor

        b_g, slope, raw = head_log_decays(g, A_log, dt_bias, first, g_stride, head, valid, bound, C, RAW, BIAS, BOUNDED)
        dlog = tl.load(dlog_part + here) + tl.load(dlog_read + here) + b_beta * by_beta
        b_dg = tl.sum(tl.where(before(C), kept[None, :], dlog[None, :]), 1)
        b_dg = (b_dg + tl.sum(crossing, 0) * tl.exp(tl.sum(b_g, 0))) * b_factor
        b_dbeta = (tl.load(dbeta_part + here) + by_beta) * b_factor
        row = (first + place).to(tl.int64) * H + head
        if RAW:
            by_rate = b_dg * slope * raw if BOUNDED else tl.where(slope == 0.0, 0.0, b_dg * b_g)
            tl.store(dA_log + tile, tl.sum(by_rate, 0))
            if BIAS:
                tl.store(ddt_bias + tile, tl.sum(b_dg * slope, 0))
            b_dbeta *= b_beta * (1.0 - b_beta)
        tl.store(dg + row, (b_dg * slope).to(dg.dtype.element_ty), mask=valid)
        tl.store(dbeta + row, b_dbeta.to(dbeta.dtype.element_ty), mask=valid)
    b_k = load_rows(k + key_head * K, first, k_stride, valid, C, K) * k_unit[:, None]
    store_rows(dk + key_head * K, before_norm(b_dk, b_k, k_unit, L2NORM), first, row_stride, valid, C, K)


def gdn_gradients(
    x: Inputs, out: Scaled, tokens: Tensor, attend: Tensor, erase: Tensor, inverse: Tensor, new: Tensor, dnew: Tensor,
    states: Tensor, dstates: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, g, beta, A_log and dt_bias (None where there is no such input)."""
    dq, dk, dv, dg, dbeta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v, x.g, x.beta))
    dA_log, ddt_bias = (None if t is None else x.tiles(dtype=torch.float32) for t in (x.A_log, x.dt_bias))
    dattend, derase = x.tiles(CHUNK, CHUNK), x.tiles(CHUNK, CHUNK)
    dbeta_part, dlog_part, dlog_read = (x.tiles(CHUNK, dtype=torch.float32) for _ in range(3))
    chunks = x.options.chunks
    q_stride, k_stride, v_stride, g_stride, _ = x.strides()
    config = CONFIGS["gdn_pair_gradients"]
    launch(
        gdn_pair_gradients_kernel, (x.heads, chunks.count),
        x.v, out.do, out.by_chunk, tokens, attend, erase, inverse, new, dnew,
        chunks.row, chunks.size, dattend, derase, dv, dbeta_part, dlog_part, v_stride, x.options.scale,
        H=x.heads, V=x.value, C=CHUNK, BV=min(config.block, x.value), PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip
    config = CONFIGS["gdn_gradients"]
    launch(
        gdn_gradients_kernel, (x.heads // x.shared, chunks.count),
        x.q, x.k, x.g, x.A_log, x.dt_bias, out.do, out.by_chunk, tokens, states, dstates, new, dnew,
        dattend, derase, dbeta_part, dlog_part, dlog_read, chunks.row, chunks.size, dq, dk, dg, dbeta, dA_log, ddt_bias,
        q_stride, k_stride, g_stride, x.options.scale, x.options.bound,
        **x.sizes(), SHARED=x.shared, BV=min(config.block, x.value), **x.switches(), PRECISION=x.precision(),
        **config.launch(),
    )  # fmt: skip
    if dA_log is not None:
        dA_log = dA_log.sum(0).to(x.A_log.dtype)
    if ddt_bias is not None:
        ddt_bias = ddt_bias.sum(0).to(x.dt_bias.dtype)
    return dq, dk, dv, dg, dbeta, dA_log, ddt_bias
