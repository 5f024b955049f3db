"""One token for each of N sequences: gate, norms, the step and the output's norm in one kernel, each state read once.

S = Diag(exp g) S        new = beta (v - S^T k)        S = S + k new^T        o = S^T q * scale

What S^T k and S^T q need is summed in one pass over the decayed state: S_new^T q = S^T q + (k.q) new. With tokens
pending (`deltarl.kernels.pending`) the state is the one before them, its decay that of all, and their part is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.tiles import L2_EPS, gated
from deltarl.kernels.inputs import check_arguments, check_decoding
from deltarl.kernels.pending import Pending


@triton.jit
def row_of(x, D: tl.constexpr):
    """[1, D] in fp32: in this shape a warp works on each element once, in that of a column of a state 32 times."""
    return tl.load(x + tl.arange(0, D)[None, :]).to(tl.float32)


@triton.jit
def total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit(do_not_specialize=["H"])
def decode_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate, pending, place, o,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, gate_stride, scale, bound, norm_eps,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr,
    L2NORM: tl.constexpr, NORM: tl.constexpr, MOST: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """One program for STEPS blocks of BV columns of the state of one head of one sequence, the blocks to come being
    loaded while one is worked on; g has WIDTH (K or 1) decays a head. MOST: pending tokens at most, PAST: that as a
    power of two. The program of a head's first columns keeps their keys and decays."""
    PARTS: tl.constexpr = V // (BV * STEPS)
    head, sequence = tl.program_id(0) // PARTS % H, (tl.program_id(0) // (PARTS * H)).to(tl.int64)
    first = tl.program_id(0) % PARTS * (BV * STEPS)
    channel, column = tl.arange(0, K), tl.arange(0, BV)
    columns = tl.arange(0, STEPS)[:, None] * BV + column[None, :]
    b_o = tl.zeros([STEPS, BV], tl.float32)
    slot = tl.load(slots + sequence).to(tl.int64)
    o += (sequence * H + head) * V + first
    if slot < 0:
        tl.store(o + columns, b_o.to(o.dtype.element_ty))
        return

    corner = state + slot * slot_stride + head * (K * V) + first + channel[:, None] * V + column[None, :]
    if STEPS == 1:
        b_state = tl.load(corner)
    b_q = row_of(q + sequence * q_stride + head // SHARED * K, K)
    b_k = row_of(k + sequence * k_stride + head // SHARED * K, K)
    b_g = row_of(g + sequence * g_stride + head * WIDTH, WIDTH)
    b_beta = tl.load(beta + sequence * beta_stride + head).to(tl.float32)
    if RAW:
        if BIAS:
            b_g += row_of(dt_bias + head * WIDTH, WIDTH)
        b_g, _ = gated(b_g, tl.exp(tl.load(A_log + head).to(tl.float32)), bound, BOUNDED)
        b_beta = tl.sigmoid(b_beta)
    if L2NORM:
        b_q *= 1.0 / tl.sqrt(total(b_q * b_q) + L2_EPS)
        b_k *= 1.0 / tl.sqrt(total(b_k * b_k) + L2_EPS)
    match = total(b_k * b_q)
    if PAST:
        TOKEN: tl.constexpr = K + WIDTH + V
        count, stays = tl.load(place), tl.load(place + 1) != 0
        pending += (sequence * H + head) * (MOST * TOKEN)
        next_token = pending + count * TOKEN
        there = (tl.arange(0, PAST) < count)[:, None]
        past = pending + tl.arange(0, PAST)[:, None] * TOKEN
        before = next_token - TOKEN + K + tl.arange(0, WIDTH)[None, :]
        b_g += tl.load(before, mask=(tl.arange(0, WIDTH) < count * WIDTH)[None, :], other=0.0)
        since = tl.exp(b_g - tl.load(past + K + tl.arange(0, WIDTH)[None, :], mask=there, other=0.0))
        faded = since * tl.load(past + tl.arange(0, K)[None, :], mask=there, other=0.0)  # [PAST, K]
        by_writer, by_reader = tl.sum(faded * b_k, 1)[:, None], tl.sum(faded * b_q, 1)[:, None]
        if stays & (first == 0):
            tl.store(next_token + tl.arange(0, K)[None, :], b_k)
            tl.store(next_token + K + tl.arange(0, WIDTH)[None, :], b_g)
    row_decay = tl.exp(b_g)
    writer, reader = tl.sum(b_k * row_decay, 0)[:, None], tl.sum(b_q * row_decay, 0)[:, None]
    key, decay = tl.sum(b_k, 0)[:, None], tl.sum(row_decay, 0)[:, None]

    v += sequence * v_stride + head * V + first + column
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if STEPS > 1:
            b_state = tl.load(corner + step * BV)  # [K, BV]
        recalled, answered = tl.split(tl.sum(tl.join(b_state * writer, b_state * reader), 0))
        if PAST:
            news = past + K + WIDTH + first + step * BV + column[None, :]
            b_news = tl.load(news, mask=there, other=0.0)
            recalled += tl.sum(by_writer * b_news, 0)
            answered += tl.sum(by_reader * b_news, 0)
        new = b_beta * (tl.load(v + step * BV).to(tl.float32) - recalled)
        b_state = b_state * decay + key * new[None, :]
        if PAST:
            if stays:
                tl.store(next_token + K + WIDTH + first + step * BV + column, new)
            else:
                for token in tl.range(0, count):
                    earlier = pending + token * TOKEN
                    b_since = tl.exp(tl.sum(b_g - tl.load(earlier + K + tl.arange(0, WIDTH))[None, :], 0))
                    b_earlier = (tl.load(earlier + channel) * b_since)[:, None]
                    b_state += b_earlier * tl.load(earlier + K + WIDTH + first + step * BV + column)[None, :]
                tl.store(corner + step * BV, b_state)
        else:
            tl.store(corner + step * BV, b_state)
        b_o = tl.where(tl.arange(0, STEPS)[:, None] == step, ((answered + match * new) * scale)[None, :], b_o)
    if NORM:
        b_o *= 1.0 / tl.sqrt(total(b_o * b_o) / V + norm_eps) * tl.load(norm_weight + columns).to(tl.float32)
        b_o *= tl.sigmoid(tl.load(norm_gate + sequence * gate_stride + head * V + columns).to(tl.float32))
    tl.store(o + columns, b_o.to(o.dtype.element_ty))


def rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows x[i] are each in one piece."""
    return x if x.is_contiguous() or x[:1].is_contiguous() else x.contiguous()


@torch.no_grad()
def kda_decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_lower_bound: float | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    norm_weight: Tensor | None = None,
    norm_gate: Tensor | None = None,
    norm_eps: float = 1e-5,
    pending: Pending | None = None,
) -> Tensor:
    """Same arguments, shapes and errors as `deltarl.kernels.recurrent.kda_decode_`; K and V are powers of two from 16
    on, and each slot of `state` is in one piece. Fit for CUDA graphs: nothing is read on the host."""
    check_arguments(*(x.unsqueeze(1) for x in (q, k, v, g, beta)), A_log, dt_bias, gate_lower_bound)
    check_decoding(q, v, g, state, slots, norm_weight, norm_gate, pending)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    (count, heads, width), key = v.shape, q.shape[-1]
    if not count * heads:
        return o
    q, k, v, g, beta = (rows(x) for x in (q, k, v, g, beta))
    tokens, place = (None, None) if pending is None else pending
    most = 0 if pending is None else tokens.shape[2]
    normed = norm_weight is not None
    norm_gate = rows(norm_gate) if normed else None
    # The output's norm needs a whole head in one program; without it, programs of a few columns are a little faster.
    config = CONFIGS["decode" if not normed else "decode_normed" if pending is None else "decode_pending"]
    block = min(width, config.block)
    steps = width // block if normed else 1
    decode_kernel[(count * heads * (width // (block * steps)),)](
        q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate, tokens, place, o,
        *(x.stride(0) for x in (q, k, v, g, beta, state)), norm_gate.stride(0) if normed else 0,
        key**-0.5 if scale is None else scale, gate_lower_bound, norm_eps,
        H=heads, SHARED=heads // q.shape[1], K=key, V=width, BV=block, STEPS=steps, STAGES=config.num_stages,
        WIDTH=g.shape[-1], RAW=A_log is not None, BIAS=dt_bias is not None, BOUNDED=gate_lower_bound is not None,
        L2NORM=use_qk_l2norm, NORM=normed, MOST=most, PAST=triton.next_power_of_2(most) if most else 0,
        **config.launch(),
    )  # fmt: skip
    return o
