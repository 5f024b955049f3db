"""Kimi Delta Attention for decoding: one token (or a few) for many sequences at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltarl.kernels.inputs import check_decoding, initial_or_zero, prepare, sequence_lengths
from deltarl.kernels.pending import Pending


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
    norm_weight: Tensor | None = None,
    norm_gate: Tensor | None = None,
    norm_eps: float = 1e-5,
    pending: Pending | None = None,
) -> Tensor:
    """One token for each of N sequences, the states living in a pool and updated in place.

    q, k, g [N, H, K], v [N, H, V], beta [N, H]; `state` [slots, H, K, V] fp32; `slots` [N] distinct indices, or -1 for
    padding: its o is 0, and no state changes. Returns o [N, H, V] in v's dtype; with `norm_weight` [V] and `norm_gate`
    [N, H, V], RMSNorm(o) * norm_weight * sigmoid(norm_gate) in place of o. The gate arguments are those of `kda_chunk`.
    With `pending`, what the sequences have besides their states, and may leave this token to. Raises ValueError on
    shapes that do not fit.
    """
    check_decoding(q, v, g, state, slots, norm_weight, norm_gate, pending)
    if len(slots) and slots.min() < 0:
        valid = (slots >= 0).nonzero().squeeze(1)
        o = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
        taken = None if pending is None else pending._replace(tokens=pending.tokens[valid])
        o[valid] = kda_decode_(
            *(x[valid] for x in (q, k, v, g, beta)),
            state,
            slots[valid],
            A_log=A_log,
            dt_bias=dt_bias,
            gate_lower_bound=gate_lower_bound,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            norm_weight=norm_weight,
            norm_gate=None if norm_gate is None else norm_gate[valid],
            norm_eps=norm_eps,
            pending=taken,
        )
        if pending is not None:
            pending.tokens[valid] = taken.tokens
        return o
    x = prepare(*(t.unsqueeze(1) for t in (q, k, v, g, beta)), A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    dtype = v.dtype
    q, k, v, g, beta = (t.squeeze(1) for t in (x.q, x.k, x.v, x.g, x.beta))
    count, stays = (0, 0) if pending is None else pending.place.tolist()
    if count:
        earlier = pending.tokens[: len(q), :, :count].to(k.dtype)
        keys, sums, news = earlier.split((k.shape[-1], g.shape[-1], v.shape[-1]), -1)
        g = g + sums[..., -1, :]
        faded = keys * (g.unsqueeze(-2) - sums).exp()  # [N, H, count, K]
    decay, both = g.exp(), torch.stack((k, q), -2)
    rows = state.index_select(0, slots).to(k.dtype)
    known = (both * decay.unsqueeze(-2)) @ rows
    if count:
        known += both @ faded.mT @ news
    recalled, answered = known.unbind(-2)  # [N, H, V] each
    written = beta.unsqueeze(-1) * (v - recalled)
    if stays:
        pending.tokens[: len(q), :, count] = torch.cat((k, g, written), -1).to(pending.tokens.dtype)
    else:
        rows.mul_(decay.unsqueeze(-1)).addcmul_(k.unsqueeze(-1), written.unsqueeze(-2))
        if count:
            rows += faded.mT @ news
        state.index_copy_(0, slots.long(), rows.to(state.dtype))
    o = answered + (q * k).sum(-1, keepdim=True) * written
    if norm_weight is not None:
        o = F.rms_norm(o, norm_weight.shape, norm_weight.to(o.dtype), norm_eps) * norm_gate.to(o.dtype).sigmoid()
    return o.to(dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, g [N, H, K], v [N, H, V], beta [N, H], state [N, H, K, V]: S_t^T q = (decayed S)^T q + (q.k) written."""
    decayed = state * g.exp().unsqueeze(-1)
    recalled, answered = (torch.stack((k, q), -2) @ decayed).unbind(-2)  # [N, H, V] each
    written = beta.unsqueeze(-1) * (v - recalled)
    o = answered + (q * k).sum(-1, keepdim=True) * written
    return o, decayed + k.unsqueeze(-1) * written.unsqueeze(-2)
