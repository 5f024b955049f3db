"""One token for each of N sequences: gate, norms and the step of the recurrence in one kernel, each state read once.

S = Diag(exp g) S        new = beta (v - S^T k)        S = S + k new^T        o = S^T q * scale
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.tiles import L2_EPS, gated
from deltarl.kernels.inputs import check_arguments


@triton.jit(do_not_specialize=["H"])
def decode_kernel(
    q, k, v, g, beta, A_log, dt_bias, state, slots, o,
    q_stride, k_stride, v_stride, g_stride, beta_stride, slot_stride, scale, bound,
    H, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr,
    RAW: tl.constexpr, BIAS: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of the state of one head of one sequence; g has WIDTH (K or 1) decays a head."""
    column, head, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, value = tl.arange(0, K), column + tl.arange(0, BV)
    gate = channel if WIDTH == K else channel * 0
    corner = state + tl.load(slots + sequence).to(tl.int64) * slot_stride + head * K * V
    b_state = tl.load(corner + channel[:, None] * V + value[None, :])
    b_q = tl.load(q + sequence * q_stride + head // SHARED * K + channel).to(tl.float32)
    b_k = tl.load(k + sequence * k_stride + head // SHARED * K + channel).to(tl.float32)
    b_v = tl.load(v + sequence * v_stride + head * V + value).to(tl.float32)
    b_g = tl.load(g + sequence * g_stride + head * WIDTH + gate).to(tl.float32)
    b_beta = tl.load(beta + sequence * beta_stride + head).to(tl.float32)
    if RAW:
        if BIAS:
            b_g += tl.load(dt_bias + head * WIDTH + gate).to(tl.float32)
        b_g, _ = gated(b_g, tl.exp(tl.load(A_log + head).to(tl.float32)), bound, BOUNDED)
        b_beta = tl.sigmoid(b_beta)
    if L2NORM:
        b_q *= 1.0 / tl.sqrt(tl.sum(b_q * b_q, 0) + L2_EPS)
        b_k *= 1.0 / tl.sqrt(tl.sum(b_k * b_k, 0) + L2_EPS)
    decayed = b_state.to(tl.float32) * tl.exp(b_g)[:, None]
    new = b_beta * (b_v - tl.sum(decayed * b_k[:, None], 0))
    updated = decayed + b_k[:, None] * new[None, :]
    tl.store(corner + channel[:, None] * V + value[None, :], updated.to(state.dtype.element_ty))
    b_o = tl.sum(updated * (b_q * scale)[:, None], 0)
    tl.store(o + (sequence * H + head) * V + value, b_o.to(o.dtype.element_ty))


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
) -> Tensor:
    """Same arguments, shapes and errors as `deltarl.kernels.recurrent.kda_decode_`; K and V are powers of two, and each
    slot of `state` is contiguous. Fit for CUDA graphs: nothing is read on the host."""
    check_arguments(*(x.unsqueeze(1) for x in (q, k, v, g, beta)), A_log, dt_bias, gate_lower_bound)
    q, k, v, g, beta = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v, g, beta))
    count, heads, width = v.shape
    key, config = q.shape[-1], CONFIGS["decode"]
    block = min(config.block, width)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    decode_kernel[(triton.cdiv(width, block), heads, count)](
        q, k, v, g, beta, A_log, dt_bias, state, slots, o,
        *(x.stride(0) for x in (q, k, v, g, beta, state)), key**-0.5 if scale is None else scale, gate_lower_bound,
        H=heads, SHARED=heads // q.shape[1], K=key, V=width, BV=block, WIDTH=g.shape[-1], RAW=A_log is not None,
        BIAS=dt_bias is not None, BOUNDED=gate_lower_bound is not None, L2NORM=use_qk_l2norm, **config.launch(),
    )  # fmt: skip
    return o
