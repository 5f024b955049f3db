"""`causal_conv1d_decode_` for NVIDIA GPUs: one token for each of N sequences, their last inputs moved on in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.conv import check_conv_decode
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.conv import activated, channel_blocks, present, tapped, taps_of


@triton.jit
def conv_decode_kernel(
    x, weight, state, slots, y, stride, slot_stride, channel_stride, tap_stride, D,
    W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program for BD channels of one sequence."""
    parts = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // parts).to(tl.int64)
    channel = tl.program_id(0) % parts * BD + tl.arange(0, BD)
    slot = tl.load(slots + sequence).to(tl.int64)
    known = present(channel, D, slot >= 0)
    taps = taps_of(weight, channel, D, W)
    state += slot * slot_stride + channel * channel_stride
    new = tl.load(x + sequence * stride + channel, mask=known, other=0.0)
    x1 = tl.load(state + (W - 2) * tap_stride, mask=known, other=0.0)
    x2, x3 = x1, x1
    if W > 2:
        x2 = tl.load(state + (W - 3) * tap_stride, mask=known, other=0.0)
        tl.store(state + (W - 3) * tap_stride, x1, mask=known)
    if W > 3:
        x3 = tl.load(state, mask=known, other=0.0)
        tl.store(state, x2, mask=known)
    tl.store(state + (W - 2) * tap_stride, new.to(state.dtype.element_ty), mask=known)
    total = tapped(taps, new.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32), W)
    tl.store(y + sequence * D + channel, activated(total, SILU).to(y.dtype.element_ty), mask=channel < D)


@torch.no_grad()
def causal_conv1d_decode_(
    x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, *, activation: str | None = "silu"
) -> Tensor:
    """Same arguments, shapes and errors as `deltarl.kernels.conv.causal_conv1d_decode_`; W is 2, 3 or 4, x of 16 or 32
    bits. Fit for CUDA graphs: nothing is read on the host."""
    check_conv_decode(x, weight, state, slots, activation)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts, sizes = channel_blocks(x.shape[1], CONFIGS["conv_decode"])
    if len(x):
        conv_decode_kernel[(len(x) * parts,)](
            x, weight.contiguous(), state, slots, y, x.stride(0), *state.stride(), x.shape[1],
            W=weight.shape[1], SILU=activation == "silu", **sizes,
        )  # fmt: skip
    return y
