"""A token for each of N sequences with which the states take in all that is pending: see `deltarl.kernels.pending`.
With S the states, k_i, G_i, new_i what is pending, G the sum of all log-decays:

S = Diag(exp G) S + sum_i exp(G - G_i) k_i new_i^T        new = beta (v - S^T k)        o = S^T q * scale + ...

Some columns of a state at a time, each read and written once. What a pending token adds is the same for all columns:
exp(G - G_i) k_i is put in the place of k_i first.
"""

import triton
import triton.language as tl

from deltarl.kernels.fused.decode_pending import summed_decays
from deltarl.kernels.fused.rows import inverse_norm, row_of, total

PROGRAMS = 528
"""At most so many, four for each multiprocessor of an H100: a launch with nothing to do takes time by its programs."""


@triton.jit(do_not_specialize=["H", "rows"])
def decode_taking_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate, pending, place, o,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, gate_stride, scale, bound, norm_eps, H, rows,
    SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr,
    BOUNDED: tl.constexpr, L2NORM: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr, PAST: tl.constexpr,
    BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program goes from head to head of the `rows` there are of all sequences, BV columns of a state at a time;
    none does anything where this token is to stay pending. MOST: pending tokens at most, PAST: that as a power of
    two."""
    TOKEN: tl.constexpr = K + WIDTH + V
    EACH: tl.constexpr = 1 if WIDTH > 1 else 0
    STEPS: tl.constexpr = V // BV
    count = tl.load(place)
    if tl.load(place + 1) != 0:
        return
    at, channel, decays = tl.arange(0, K), tl.arange(0, K)[None, :], tl.arange(0, WIDTH)[None, :]
    all_columns = tl.arange(0, STEPS)[:, None] * BV + tl.arange(0, BV)[None, :]
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        head, sequence = row % H, (row // H).to(tl.int64)
        slot = tl.load(slots + sequence).to(tl.int64)
        b_o = tl.zeros([STEPS, BV], tl.float32)
        if slot >= 0:
            q_row = q + sequence * q_stride + head // SHARED * K
            k_row = k + sequence * k_stride + head // SHARED * K
            v_row = v + sequence * v_stride + head * V
            g_row = g + sequence * g_stride + head * WIDTH
            bias_row = dt_bias
            if BIAS:
                bias_row = dt_bias + head * WIDTH
            earlier = pending + (sequence * H + head) * (MOST * TOKEN)
            before = earlier + (count - 1) * TOKEN + K
            corner = state + slot * slot_stride + head * (K * V)
            b_beta = tl.load(beta + sequence * beta_stride + head).to(tl.float32)
            rate = 0.0
            if RAW:
                rate = tl.exp(tl.load(A_log + head).to(tl.float32))
                b_beta = tl.sigmoid(b_beta)

            b_g = summed_decays(g_row, bias_row, before, decays, rate, bound, count, WIDTH, RAW, BIAS, BOUNDED)
            token = tl.arange(0, PAST)[:, None]
            there, past = token < count, earlier + token * TOKEN
            faded = tl.exp(b_g - tl.load(past + K + decays, mask=there, other=0.0))
            faded *= tl.load(past + channel, mask=there, other=0.0)
            tl.store(past + channel, faded, mask=token < MOST)
            if count < MOST:
                news = past + K + WIDTH + tl.arange(0, V)[None, :]
                tl.store(news, tl.load(news, mask=there, other=0.0), mask=token < MOST)
            tl.debug_barrier()

            b_q, b_k = row_of(q_row, K), row_of(k_row, K)
            q_norm, k_norm = inverse_norm(b_q, L2NORM), inverse_norm(b_k, L2NORM)
            match = total(b_k * b_q) * q_norm * k_norm
            key, query = tl.load(k_row + at).to(tl.float32) * k_norm, tl.load(q_row + at).to(tl.float32) * q_norm
            decay = tl.exp(
                summed_decays(g_row, bias_row, before, at * EACH, rate, bound, count, WIDTH, RAW, BIAS, BOUNDED)
            )
            for step in tl.range(0, STEPS, num_stages=STAGES):
                columns = step * BV + tl.arange(0, BV)
                tile = corner + at[:, None] * V + columns[None, :]
                b_tile = tl.load(tile) * decay[:, None]
                for one in tl.static_range(0, MOST):
                    b_new = tl.load(earlier + one * TOKEN + K + WIDTH + columns)
                    b_tile += tl.load(earlier + one * TOKEN + at)[:, None] * b_new[None, :]
                recalled, answered = tl.sum(b_tile * key[:, None], 0), tl.sum(b_tile * query[:, None], 0)
                new = b_beta * (tl.load(v_row + columns).to(tl.float32) - recalled)
                tl.store(tile, b_tile + key[:, None] * new[None, :])
                b_o = tl.where(tl.arange(0, STEPS)[:, None] == step, ((answered + match * new) * scale)[None, :], b_o)
            if NORM:
                b_o *= 1.0 / tl.sqrt(total(b_o * b_o) / V + norm_eps)
                b_o *= tl.load(norm_weight + all_columns).to(tl.float32)
                gate = tl.load(norm_gate + sequence * gate_stride + head * V + all_columns).to(tl.float32)
                b_o *= tl.sigmoid(gate)
        tl.store(o + (sequence * H + head) * V + all_columns, b_o.to(o.dtype.element_ty))
