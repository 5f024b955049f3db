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
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"x must be [B, T, D] and weight [D, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    batch, tokens, channels = x.shape
    left = weight.shape[1] - 1
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    if initial_state is None:
        context = x.new_zeros(len(lengths), left, channels)
    elif initial_state.shape != (len(lengths), channels, left):
        expected = (len(lengths), channels, left)
        raise ValueError(f"initial_state must be {expected}, got {tuple(initial_state.shape)}")
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
        taps = weight.to(dtype).unbind(1)
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
    for w, tap in enumerate(weight.to(dtype).unbind(1)):
        total.addcmul_(x[:, w : w + tokens], tap)
    return total
