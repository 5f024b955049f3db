"""What every KDA operator does to its raw inputs before the recurrence: shape checks, gates, norms.

Gates (Kimi Linear, arXiv 2510.26692, and its released code):

    softplus   g = -exp(A_log) * softplus(raw + dt_bias)              Kimi-Linear-48B
    bounded    g = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias))
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltarl.kernels.pending import Pending, check_pending

L2_EPS = 1e-6


@dataclass(frozen=True)
class Prepared:
    """Inputs of the bare recurrence, in fp32 (fp64 if q is): q already scaled, g the log-decay, beta in [0, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def decay_of(log_decay: Tensor) -> Tensor:
    """exp, with what is below exp(-60) made zero: denormal numbers slow a CPU down a hundredfold."""
    return F.threshold(log_decay, -60.0, -torch.inf).exp()


def log_decay(raw: Tensor, A_log: Tensor, dt_bias: Tensor | None, gate_lower_bound: float | None) -> Tensor:
    """Log-decay (<= 0) of shape [..., H, K] from the raw projection [..., H, K], A_log [H], dt_bias [H*K]."""
    heads, width = raw.shape[-2:]
    rate = A_log.to(raw.dtype).reshape(heads, 1).exp()
    if dt_bias is not None:
        raw = raw + dt_bias.to(raw.dtype).reshape(heads, width)
    if gate_lower_bound is None:
        return -rate * F.softplus(raw)
    return gate_lower_bound * torch.sigmoid(rate * raw)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    gate_lower_bound: float | None,
    scale: float | None,
    use_qk_l2norm: bool,
) -> Prepared:
    """Casts to the computing dtype and applies gate, sigmoid, l2-norm and scale. Raises ValueError on bad shapes."""
    check_arguments(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if A_log is not None:
        g = log_decay(g, A_log, dt_bias, gate_lower_bound)
        beta = beta.sigmoid()
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    if v.shape[2] > q.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    return Prepared(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, g, beta)


def sequence_lengths(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    """Lengths of the packed sequences; raises ValueError unless they tile one row of `tokens` tokens."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if batch != 1 or not lengths or bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(
            f"packed input is one row whose cu_seqlens rise from 0 to its length; got batch {batch}, "
            f"{tokens} tokens, cu_seqlens {bounds[:4]}...{bounds[-1:]}"
        )
    return lengths


def initial_or_zero(state: Tensor | None, count: int, like: Prepared) -> Tensor:
    """The initial state [count, H, K, V] in the computing dtype; zeros where none is given."""
    heads, key, value = *like.k.shape[-2:], like.v.shape[-1]
    if state is None:
        return like.k.new_zeros(count, heads, key, value)
    if state.shape != (count, heads, key, value):
        raise ValueError(f"initial_state must be {(count, heads, key, value)}, got {tuple(state.shape)}")
    return state.to(like.k.dtype)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    gate_lower_bound: float | None,
) -> None:
    """Raises ValueError, naming the shapes, unless an operator can take these together."""
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [B, T, H, K], got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] < q.shape[2] or v.shape[2] % max(1, q.shape[2]):
        raise ValueError(
            f"v must be [B, T, HV, V] with HV a multiple of q's heads, got {tuple(v.shape)} for q {tuple(q.shape)}"
        )
    if g.ndim != 4 or g.shape[:3] != v.shape[:3] or g.shape[3] not in (1, q.shape[3]) or beta.shape != v.shape[:3]:
        raise ValueError(
            f"g must be [B, T, HV, K] and beta [B, T, HV], got {tuple(g.shape)} and {tuple(beta.shape)} "
            f"for q {tuple(q.shape)} and v {tuple(v.shape)}"
        )
    if A_log is None and (dt_bias is not None or gate_lower_bound is not None):
        raise ValueError("dt_bias and gate_lower_bound belong to the raw gate: pass A_log as well")
    if gate_lower_bound is not None and gate_lower_bound >= 0:
        raise ValueError(f"gate_lower_bound must be negative, got {gate_lower_bound}")


def check_decoding(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    slots: Tensor,
    norm_weight: Tensor | None,
    norm_gate: Tensor | None,
    pending: Pending | None,
) -> None:
    """Raises ValueError unless states, slots, the output's norm (both or neither given) and pending tokens fit
    q [N, H, K], v [N, HV, V] and g [N, HV, K or 1]."""
    expected = (*v.shape[1:2], *q.shape[2:], *v.shape[2:])
    if state.shape[1:] != expected or slots.shape != v.shape[:1]:
        raise ValueError(
            f"state must be [slots, {', '.join(map(str, expected))}] and slots [{len(v)}], "
            f"got {tuple(state.shape)} and {tuple(slots.shape)}"
        )
    if (norm_weight is None) != (norm_gate is None):
        raise ValueError("norm_weight and norm_gate belong together: pass both, or neither")
    if norm_weight is not None and (norm_weight.shape != v.shape[-1:] or norm_gate.shape != v.shape):
        raise ValueError(
            f"norm_weight must be [V] and norm_gate [N, HV, V], got {tuple(norm_weight.shape)} and "
            f"{tuple(norm_gate.shape)} for v {tuple(v.shape)}"
        )
    if pending is not None:
        check_pending(pending, *v.shape[:2], q.shape[-1] + g.shape[-1] + v.shape[-1])
