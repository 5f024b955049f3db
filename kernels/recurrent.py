"""Kimi Delta Attention for decoding: one token (or a few) for many sequences at once."""

import torch
from torch import Tensor

from deltarl.kernels.inputs import initial_or_zero, prepare, sequence_lengths


def kda_recurrent(
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
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, shapes and errors as `kda_chunk`; meant for T == 1 or short.

    Packed sequences must be of one length (a decoding batch); others belong to `kda_chunk` (ValueError).
    """
    x = prepare(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    count = q.shape[0]
    if cu_seqlens is not None:
        lengths = set(sequence_lengths(cu_seqlens, *q.shape[:2]))
        if len(lengths) != 1:
            raise ValueError(
                f"kda_recurrent takes packed sequences of one length, got {sorted(lengths)}: use kda_chunk"
            )
        count = len(cu_seqlens) - 1
    state = initial_or_zero(initial_state, count, x)
    per_sequence = (t.reshape(count, -1, *t.shape[2:]) for t in (x.q, x.k, x.v, x.g, x.beta))
    outputs = []
    for token in zip(*(t.unbind(1) for t in per_sequence), strict=True):
        o, state = _step(*token, state)
        outputs.append(o)
    o = torch.stack(outputs, 1).reshape(v.shape) if outputs else torch.zeros_like(v)
    return o.to(v.dtype), state if output_final_state else None


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
    """One token for each of N sequences, the states living in a pool and updated in place.

    q, k, g [N, H, K], v [N, H, V], beta [N, H]; `state` [slots, H, K, V] fp32; `slots` [N] distinct indices >= 0.
    Returns o [N, H, V] in v's dtype. The gate arguments are those of `kda_chunk`.
    """
    x = prepare(*(t.unsqueeze(1) for t in (q, k, v, g, beta)), A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    q, k, g, beta = (t.squeeze(1) for t in (x.q, x.k, x.g, x.beta))
    decay = g.exp()
    rows = state.index_select(0, slots).to(k.dtype)
    recalled, answered = (torch.stack((k * decay, q * decay), -2) @ rows).unbind(-2)  # [N, H, V] each
    written = beta.unsqueeze(-1) * (x.v.squeeze(1) - recalled)
    rows.mul_(decay.unsqueeze(-1)).addcmul_(k.unsqueeze(-1), written.unsqueeze(-2))
    state.index_copy_(0, slots.long(), rows.to(state.dtype))
    return (answered + (q * k).sum(-1, keepdim=True) * written).to(v.dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, g [N, H, K], v [N, H, V], beta [N, H], state [N, H, K, V]: S_t^T q = (decayed S)^T q + (q.k) written."""
    decayed = state * g.exp().unsqueeze(-1)
    recalled, answered = (torch.stack((k, q), -2) @ decayed).unbind(-2)  # [N, H, V] each
    written = beta.unsqueeze(-1) * (v - recalled)
    o = answered + (q * k).sum(-1, keepdim=True) * written
    return o, decayed + k.unsqueeze(-1) * written.unsqueeze(-2)
