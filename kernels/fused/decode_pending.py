"""A token for each of N sequences where the states lack the last few, and will lack this one too: see
`deltarl.kernels.pending`. With S the states, k_i, G_i, new_i what is pending, G the sum of all log-decays:

recalled = S^T (exp(G) k) + sum_i (k . exp(G - G_i) k_i) new_i        new = beta (v - recalled), and o likewise with q

A state is only read, a few channels at a time, so that many programs fit a multiprocessor and have loads under way. It
is `decode_taking` that writes it.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.rows import inverse_norm, row_of, total
from deltarl.kernels.fused.tiles import gated


@triton.jit
def summed_decays(
    g, dt_bias, before, at, rate, bound, count,
    WIDTH: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """G at these channels: this token's log-decay and the sum `before` of those that are pending."""
    b_g = tl.load(g + at).to(tl.float32)
    if RAW:
        if BIAS:
            b_g += tl.load(dt_bias + at).to(tl.float32)
        b_g, _ = gated(b_g, rate, bound, BOUNDED)
    return b_g + tl.load(before + at, mask=at < count * WIDTH, other=0.0)


@triton.jit(do_not_specialize=["H"])
def decode_pending_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate, pending, place, o,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, gate_stride, scale, bound, norm_eps, H,
    SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr,
    BOUNDED: tl.constexpr, L2NORM: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr, PAST: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for one head of one sequence, BK channels of its state at a time; none does anything where this
    token is not to stay pending. MOST: pending tokens at most, PAST: that as a power of two."""
    TOKEN: tl.constexpr = K + WIDTH + V
    EACH: tl.constexpr = 1 if WIDTH > 1 else 0
    head, sequence = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    column = tl.arange(0, V)
    count = tl.load(place)
    if tl.load(place + 1) == 0:
        return
    slot = tl.load(slots + sequence).to(tl.int64)
    o += (sequence * H + head) * V + column
    if slot < 0:
        tl.store(o, tl.zeros([V], o.dtype.element_ty))
        return
    q += sequence * q_stride + head // SHARED * K
    k += sequence * k_stride + head // SHARED * K
    g += sequence * g_stride + head * WIDTH
    if BIAS:
        dt_bias += head * WIDTH
    pending += (sequence * H + head) * (MOST * TOKEN)
    next_token = pending + count * TOKEN
    before = next_token - TOKEN + K
    corner = state + slot * slot_stride + head * (K * V) + tl.arange(0, BK)[:, None] * V + column[None, :]
    b_beta = tl.load(beta + sequence * beta_stride + head).to(tl.float32)
    rate = 0.0
    if RAW:
        rate = tl.exp(tl.load(A_log + head).to(tl.float32))
        b_beta = tl.sigmoid(b_beta)

    b_q, b_k = row_of(q, K), row_of(k, K)
    q_norm, k_norm = inverse_norm(b_q, L2NORM), inverse_norm(b_k, L2NORM)
    b_q, b_k = b_q * q_norm, b_k * k_norm
    match = total(b_k * b_q)
    channel, decays = tl.arange(0, K)[None, :], tl.arange(0, WIDTH)[None, :]
    b_g = summed_decays(g, dt_bias, before, decays, rate, bound, count, WIDTH, RAW, BIAS, BOUNDED)
    there = (tl.arange(0, PAST) < count)[:, None]
    past = pending + tl.arange(0, PAST)[:, None] * TOKEN
    faded = tl.exp(b_g - tl.load(past + K + decays, mask=there, other=0.0))
    faded *= tl.load(past + channel, mask=there, other=0.0)  # [PAST, K]
    b_news = tl.load(past + K + WIDTH + column[None, :], mask=there, other=0.0)
    recalled = tl.sum(tl.sum(faded * b_k, 1)[:, None] * b_news, 0)
    answered = tl.sum(tl.sum(faded * b_q, 1)[:, None] * b_news, 0)
    tl.store(next_token + channel, b_k)
    tl.store(next_token + K + decays, b_g)

    by_writer, by_reader = tl.zeros([BK, V], tl.float32), tl.zeros([BK, V], tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        b_state = tl.load(corner + first * V)
        at = first + tl.arange(0, BK)
        decay = tl.exp(summed_decays(g, dt_bias, before, at * EACH, rate, bound, count, WIDTH, RAW, BIAS, BOUNDED))
        by_writer += b_state * (tl.load(k + at).to(tl.float32) * decay)[:, None]
        by_reader += b_state * (tl.load(q + at).to(tl.float32) * decay)[:, None]
    recalled += tl.sum(by_writer, 0) * k_norm
    answered += tl.sum(by_reader, 0) * q_norm
    new = b_beta * (tl.load(v + sequence * v_stride + head * V + column).to(tl.float32) - recalled)
    tl.store(next_token + K + WIDTH + column, new)
    b_o = (answered + match * new) * scale
    if NORM:
        b_o *= 1.0 / tl.sqrt(tl.sum(b_o * b_o, 0) / V + norm_eps) * tl.load(norm_weight + column).to(tl.float32)
        b_o *= tl.sigmoid(tl.load(norm_gate + sequence * gate_stride + head * V + column).to(tl.float32))
    tl.store(o, b_o.to(o.dtype.element_ty))
