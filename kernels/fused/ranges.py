"""Gradients of outputs in the range of fp16, so that a backward pass can multiply in fp16: three bits more than bf16's.

Gradients of the inputs are linear in those of the outputs. Each head of each sequence has a power of two of its own,
which brings its largest gradient to between 1/16 and 1/8 as it is read: sums over 100,000 tokens stay below 65504, and
what is 2000 times smaller than the largest still has all its bits. Neither rounding nor NaN passes from one sequence to
another.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs
from deltarl.kernels.fused.chunks import CHUNK
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.launch import launch
from deltarl.kernels.fused.tiles import load_rows


@triton.jit(do_not_specialize=["H"])
def largest_kernel(x, chunk_row, chunk_size, largest, H, C: tl.constexpr, D: tl.constexpr):
    """The largest |x| of each head of each chunk, [chunks, H], of contiguous x [rows, H, D]."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
    rows = load_rows(x + head * D, tl.load(chunk_row + chunk), H * D, valid, C, D)
    tl.store(largest + chunk * H + head, tl.max(tl.max(tl.abs(rows), 1), 0))


@dataclass(frozen=True)
class Scaled:
    """`do` [B, T, H, V], which kernels divide by `by_chunk` [chunks, H] as they read it, and `dfinal` [N, H, K, V],
    divided by `by_sequence` [N, H]: powers of two that the gradients made from both are to be multiplied by."""

    do: Tensor
    dfinal: Tensor | None
    by_chunk: Tensor
    by_sequence: Tensor


def into_range(x: Inputs, do: Tensor, dfinal: Tensor | None) -> Scaled:
    """`do` contiguous [B, T, H, V], `dfinal` [N, H, K, V]."""
    chunks, config = x.options.chunks, CONFIGS["ranges"]
    largest = x.tiles(dtype=torch.float32)
    launch(
        largest_kernel, (x.heads, chunks.count),
        do, chunks.row, chunks.size, largest, H=x.heads, C=CHUNK, D=x.value, **config.launch(),
    )  # fmt: skip
    of_sequence = largest.new_zeros(len(chunks.per_sequence), x.heads)
    of_sequence.scatter_reduce_(0, chunks.sequence.unsqueeze(1).expand_as(largest), largest, "amax")
    if dfinal is not None:
        of_sequence = torch.maximum(of_sequence, dfinal.abs().amax((2, 3)))
    # A float's bits from the 23rd on are its power of two + 127: these stay within 1 to 254 after the shifts by 4.
    power = (of_sequence.view(torch.int32) >> 23).clamp(5, 249)
    by_sequence, factor = (bits.bitwise_left_shift(23).view(torch.float32) for bits in (power + 4, 250 - power))
    dfinal = None if dfinal is None else dfinal * factor[..., None, None]
    return Scaled(do, dfinal, by_sequence[chunks.sequence], by_sequence)
