"""Causal depthwise short convolution, in plain torch, with its own backward.

    y_t = act(sum_w weight[:, w] * x_{t - W + 1 + w})        act = SiLU or none

W is 4: on a CPU four shifted multiply-adds over [B, T, D] are faster than a grouped `conv1d`, and need no transposes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltarl.kernels.inputs import sequence_lengths


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, D] in x's dtype, and the last W-1 inputs of each sequence [N, D, W-1] if asked for.

    x [B, T, D], weight [D, W], `initial_state` [N, D, W-1] (zeros unless given). Packed input has B = 1 and
    `cu_seqlens` int [N + 1]; no sequence sees another's inputs. Raises ValueError on shapes that do not fit.
    """
    lengths = check_conv(x, weight, activation, cu_seqlens, initial_state)
    tokens, channels, left = *x.shape[1:], weight.shape[1] - 1
    if initial_state is None:
        context = x.new_zeros(len(lengths), left, channels)
    else:
        context = initial_state.to(x.dtype).transpose(1, 2)

    if cu_seqlens is None:
        extended = torch.cat((context, x), 1)
        y = _ShiftedSum.apply(extended, weight, activation)
        tails = extended[:, tokens:]
    else:
        pieces = [torch.cat(pair) for pair in zip(context, x[0].split(lengths), strict=True)]
        extended = torch.cat(pieces).unsqueeze(0)
        y = _ShiftedSum.apply(F.pad(extended, (0, 0, 0, left)), weight, activation)
        y = torch.cat([piece[: len(piece) - left] for piece in y[0].split([len(p) for p in pieces])]).unsqueeze(0)
        tails = torch.stack([piece[len(piece) - left :] for piece in pieces])
    return y, tails.transpose(1, 2) if output_final_state else None


@torch.no_grad()
def causal_conv1d_decode_(
    x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, *, activation: str | None = "silu"
) -> Tensor:
    """One token for each of N sequences, whose last W-1 inputs live in a pool and move on by one in place.

    x [N, D], weight [D, W], `state` [slots, D, W-1], oldest input first; `slots` [N] distinct indices, or -1 for
    padding: its y is 0, and no state changes. Returns y [N, D] in x's dtype. Raises ValueError on shapes that do not
    fit.
    """
    check_conv_decode(x, weight, state, slots, activation)
    if len(slots) and slots.min() < 0:
        valid = slots >= 0
        y = torch.zeros_like(x)
        y[valid] = causal_conv1d_decode_(x[valid], weight, state, slots[valid], activation=activation)
        return y
    slots = slots.long()
    by_tap = state.transpose(1, 2)
    inputs = torch.cat((by_tap.index_select(0, slots), x.unsqueeze(1)), 1)
    by_tap.index_copy_(0, slots, inputs[:, 1:].to(state.dtype))
    total = _shifted_sum(inputs, weight).squeeze(1)
    return (F.silu(total) if activation else total).to(x.dtype)


def check_conv(
    x: Tensor, weight: Tensor, activation: str | None, cu_seqlens: Tensor | None, initial_state: Tensor | None
) -> list[int]:
    """The lengths of the sequences. Raises ValueError, naming what does not fit, unless `causal_conv1d` can take these
    together."""
    check_activation(activation)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"x must be [B, T, D] and weight [D, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, tokens, channels = x.shape
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    expected = (len(lengths), channels, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, got {tuple(initial_state.shape)}")
    return lengths


def check_conv_decode(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, activation: str | None) -> None:
    """Raises ValueError, naming what does not fit, unless `causal_conv1d_decode_` can take these together."""
    check_activation(activation)
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"x must be [N, D] and weight [D, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    channels, left = x.shape[1], weight.shape[1] - 1
    if state.shape[1:] != (channels, left) or slots.shape != x.shape[:1]:
        raise ValueError(
            f"state must be [slots, {channels}, {left}] and slots [{len(x)}], got {tuple(state.shape)} and "
            f"{tuple(slots.shape)}"
        )


def check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


class _ShiftedSum(torch.autograd.Function):
    """y[:, t] = act(sum_w weight[:, w] * x[:, t + w]) for x [B, T + W - 1, D], weight [D, W]; sums in fp32 or wider."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, activation: str | None) -> Tensor:
        total = _shifted_sum(x, weight)
        ctx.save_for_backward(x, weight, total if activation else None)
        return (F.silu(total) if activation else total).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, total = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        dtotal = dy.to(dtype)
        if total is not None:
            dtotal = torch.ops.aten.silu_backward(dtotal, total)
        taps = _taps(weight, dtype)
        tokens = dy.shape[1]
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        dweight = []
        for w, tap in enumerate(taps):
            dx[:, w : w + tokens].addcmul_(dtotal, tap)
            dweight.append((dtotal * x[:, w : w + tokens]).sum((0, 1)))
        return dx.to(x.dtype), torch.stack(dweight, 1).to(weight.dtype), None


def _shifted_sum(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[1] - weight.shape[1] + 1
    x = x.to(dtype)
    total = torch.zeros(x.shape[0], tokens, x.shape[2], dtype=dtype, device=x.device)
    for w, tap in enumerate(_taps(weight, dtype)):
        total.addcmul_(x[:, w : w + tokens], tap)
    return total


def _taps(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The columns of weight, each in one piece: read once per token."""
    return weight.to(dtype).t().contiguous().unbind()
