"""One token for each of N sequences: gate, norms, the step and the output's norm in one kernel, each state read once.

S = Diag(exp g) S        new = beta (v - S^T k)        S = S + k new^T        o = S^T q * scale

What S^T k and S^T q need is summed in one pass over the decayed state: S_new^T q = S^T q + (k.q) new.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.decode_pending import decode_pending_kernel
from deltarl.kernels.fused.decode_taking import PROGRAMS, decode_taking_kernel
from deltarl.kernels.fused.rows import inverse_norm, row_of, total
from deltarl.kernels.fused.tiles import gated
from deltarl.kernels.inputs import check_arguments, check_decoding
from deltarl.kernels.pending import Pending


@triton.jit(do_not_specialize=["H"])
def decode_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate, o,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, gate_stride, scale, bound, norm_eps,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr,
    L2NORM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program for STEPS blocks of BV columns of the state of one head of one sequence, the blocks to come being
    loaded while one is worked on; g has WIDTH (K or 1) decays a head."""
    PARTS: tl.constexpr = V // (BV * STEPS)
    place = tl.program_id(0) // PARTS
    head, sequence = place % H, (place // H).to(tl.int64)
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
    b_q *= inverse_norm(b_q, L2NORM)
    b_k *= inverse_norm(b_k, L2NORM)
    match = total(b_k * b_q)
    row_decay = tl.exp(b_g)
    writer, reader = tl.sum(b_k * row_decay, 0)[:, None], tl.sum(b_q * row_decay, 0)[:, None]
    key, decay = tl.sum(b_k, 0)[:, None], tl.sum(row_decay, 0)[:, None]

    v += sequence * v_stride + head * V + first + column
    for step in tl.range(0, STEPS, num_stages=STAGES):
        if STEPS > 1:
            b_state = tl.load(corner + step * BV)  # [K, BV]
        recalled, answered = tl.split(tl.sum(tl.join(b_state * writer, b_state * reader), 0))
        new = b_beta * (tl.load(v + step * BV).to(tl.float32) - recalled)
        tl.store(corner + step * BV, b_state * decay + key * new[None, :])
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
    normed = norm_weight is not None
    norm_gate = rows(norm_gate) if normed else None
    tensors = q, k, v, g, beta, A_log, dt_bias, state, slots, norm_weight, norm_gate
    numbers = (
        *(x.stride(0) for x in (q, k, v, g, beta, state)), norm_gate.stride(0) if normed else 0,
        key**-0.5 if scale is None else scale, gate_lower_bound, norm_eps, heads,
    )  # fmt: skip
    options = {
        "SHARED": heads // q.shape[1], "K": key, "V": width, "WIDTH": g.shape[-1], "RAW": A_log is not None,
        "BIAS": dt_bias is not None, "BOUNDED": gate_lower_bound is not None, "L2NORM": use_qk_l2norm, "NORM": normed,
    }  # fmt: skip
    if pending is not None:
        most = pending.tokens.shape[2]
        options |= {"MOST": most, "PAST": triton.next_power_of_2(most)}
        # Which of them works is known on the GPU only (`place`), where a CUDA graph has both.
        config = CONFIGS["decode_pending"]
        decode_pending_kernel[(count * heads,)](
            *tensors, *pending, o, *numbers, **options, BK=min(key, config.block), STAGES=config.num_stages,
            **config.launch(),
        )  # fmt: skip
        config = CONFIGS["decode_taking"]
        decode_taking_kernel[(min(count * heads, PROGRAMS),)](
            *tensors, *pending, o, *numbers, count * heads, **options, BV=min(width, config.block),
            STAGES=config.num_stages, **config.launch(),
        )  # fmt: skip
        return o
    # The output's norm needs a whole head in one program; without it, programs of a few columns are a little faster.
    config = CONFIGS["decode_normed" if normed else "decode"]
    block = min(width, config.block)
    steps = width // block if normed else 1
    decode_kernel[(count * heads * (width // (block * steps)),)](
        *tensors, o, *numbers, **options, BV=block, STEPS=steps, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return o
