"""Checksums of tensors, computed where they lie, that prove a copy."""

import functools
import hashlib
from collections.abc import Iterable, Mapping

import torch

PIECE = 1 << 22  # words that are summed at a time: 32 MB of products
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor, dtype: torch.dtype | None = None, piece: int = PIECE) -> torch.Tensor:
    """Position-weighted sum of a tensor's raw words, Σ (2i+1)·word_i mod 2⁶⁴: an int64 scalar on its device.

    Words are the elements' bits, after a cast to `dtype` where one is given. A change of one element always changes
    the sum, for its weight is odd; so does an exchange of two different elements of up to 4 bytes each:
    |w_i - w_j|·2|i - j| stays under 2⁶⁴ to 2³¹ elements. Nothing waits for the device.
    """
    flat = tensor.detach().reshape(-1)
    odd = odd_numbers(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), piece):
        part = flat[begin : begin + piece]
        part = part.to(dtype or part.dtype).contiguous()
        words = part.view(WORDS[part.element_size()])
        total += (words * odd[: len(words)]).sum()
        if begin:
            total += words.sum(dtype=torch.int64) * (2 * begin)
    return total


@functools.cache
def odd_numbers(device: torch.device) -> torch.Tensor:
    return torch.arange(PIECE, device=device).mul_(2).add_(1)


def checksums(tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """The checksum of each tensor named in `dtypes`, cast to that dtype; devices are waited for once, at the end."""
    sums = [checksum(tensors[name], dtype) for name, dtype in dtypes.items()]
    if len({total.device for total in sums}) > 1:
        sums = [total.cpu() for total in sums]
    values = torch.stack(sums).tolist() if sums else []
    return {name: value % (1 << 64) for name, value in zip(dtypes, values, strict=True)}


def digest(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]]) -> str:
    """One hex digest over (name, dtype, shape, checksum) of every tensor; their order does not matter."""
    lines = (f"{name} {dtype} {tuple(shape)} {value:016x}\n" for name, dtype, shape, value in sorted(entries))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
