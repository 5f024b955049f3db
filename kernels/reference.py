"""Kimi Delta Attention token by token: the definition that every other implementation is tested against.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t * scale

(Kimi Linear, arXiv 2510.26692, eq. 1.)
"""

import torch
from torch import Tensor

from deltarl.kernels.inputs import initial_or_zero, prepare, sequence_lengths


def kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_lower_bound: float | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, shapes and errors as `kda_chunk`; computes in fp64 for fp64 inputs, else in fp32."""
    x = prepare(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    if cu_seqlens is None:
        o, state = _recur(x.q, x.k, x.v, x.g, x.beta, initial_or_zero(initial_state, q.shape[0], x))
    else:
        lengths = sequence_lengths(cu_seqlens, *q.shape[:2])
        states = initial_or_zero(initial_state, len(lengths), x).split(1)
        pieces = zip(*(t.split(lengths, 1) for t in (x.q, x.k, x.v, x.g, x.beta)), states, strict=True)
        done = [_recur(*piece) for piece in pieces]
        o, state = torch.cat([o for o, _ in done], 1), torch.cat([s for _, s in done])
    return o.to(v.dtype), state if output_final_state else None


def _recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp().unsqueeze(-1)
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t].unsqueeze(-1) * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def dplr_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """The general diagonal-plus-low-rank recurrence (DPLR, which arXiv 2510.26692 compares KDA with):

        S_t = (Diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t * scale

    KDA is the case a = -beta k, b = k exp(g), with beta k in the place of k. q, k, g, a, b [B, T, H, K], v and the
    result [B, T, H, V], in the dtype given.
    """
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        recalled = torch.einsum("bhk,bhkv->bhv", b[:, t], state)
        state = g[:, t].exp().unsqueeze(-1) * state
        state = state + torch.einsum("bhk,bhv->bhkv", a[:, t], recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * scale)
    return torch.stack(outputs, 1)
