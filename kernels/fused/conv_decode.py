"""`causal_conv1d_decode_` for NVIDIA GPUs: one token for each of N sequences, their last inputs moved on in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.conv import check_conv_decode
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.conv import activated, channel_blocks, tapped, taps_of

SEQUENCES, MANY = 4, 64
"""A program takes so many sequences where there are many."""


@triton.jit(do_not_specialize=["N"])
def conv_decode_kernel(
    x, weight, state, slots, y, stride, slot_stride, channel_stride, tap_stride, N, D,
    W: tl.constexpr, SILU: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program for BD channels of BN sequences, which share the taps' loads."""
    parts = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // parts * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    channel = tl.program_id(0) % parts * BD + tl.arange(0, BD)
    slot = tl.load(slots + sequence, mask=sequence < N, other=-1).to(tl.int64)
    here = (sequence < N) & (channel < D)[None, :]
    known = here & (slot >= 0)
    w0, w1, w2, w3 = taps_of(weight, channel, D, W)
    taps = w0[None, :], w1[None, :], w2[None, :], w3[None, :]
    channel = channel[None, :]
    state += slot * slot_stride + channel * channel_stride
    new = tl.load(x + sequence * stride + channel, mask=known, other=0.0)
    x1 = tl.load(state + (W - 2) * tap_stride, mask=known, other=0.0)
    x2, x3 = x1, x1
    if W > 2:
        x2 = tl.load(state + (W - 3) * tap_stride, mask=known, other=0.0)
    if W > 3:
        x3 = tl.load(state, mask=known, other=0.0)
        tl.store(state, x2, mask=known)
    if W > 2:
        tl.store(state + (W - 3) * tap_stride, x1, mask=known)
    tl.store(state + (W - 2) * tap_stride, new.to(state.dtype.element_ty), mask=known)
    total = tapped(taps, new.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32), W)
    tl.store(y + sequence * D + channel, activated(total, SILU).to(y.dtype.element_ty), mask=here)


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
    together = SEQUENCES if len(x) >= MANY else 1
    if len(x):
        conv_decode_kernel[(triton.cdiv(len(x), together) * parts,)](
            x, weight.contiguous(), state, slots, y, x.stride(0), *state.stride(), *x.shape,
            W=weight.shape[1], SILU=activation == "silu", BN=together, **sizes,
        )  # fmt: skip
    return y
