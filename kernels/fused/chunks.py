"""Where the chunks of a batch lie: tables on the device that every kernel reads, made once per shape."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """`row` [chunks] the first token of each chunk in the flattened batch, `size` [chunks] its tokens (1 to 64), and
    `bounds` [N + 1]: sequence n has the chunks bounds[n] to bounds[n + 1]. All int32. `per_sequence` counts them."""

    row: Tensor
    size: Tensor
    bounds: Tensor
    per_sequence: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.row)


@lru_cache(maxsize=64)
def chunks_of(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    """The chunks of sequences that lie one after the other."""
    length = torch.tensor(lengths)
    per_sequence = (length + CHUNK - 1) // CHUNK
    bounds = torch.cat((length.new_zeros(1), per_sequence.cumsum(0)))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), per_sequence)
    before = (torch.arange(len(sequence)) - bounds[sequence]) * CHUNK
    row = (length.cumsum(0) - length)[sequence] + before
    size = (length[sequence] - before).clamp(max=CHUNK)
    tables = (x.to(device, torch.int32) for x in (row, size, bounds))
    return Chunks(*tables, tuple(per_sequence.tolist()))


@lru_cache(maxsize=8)
def spans(device: torch.device) -> Tensor:
    """fp16 [6, 64, 64], 0 and 1, of which row i says what tokens j to sum for token i:

    0 from the start to i; 1 after i to the end; 2 and 3 between i and the middle of i's block of 64 or 32; 4 from the
    start of i's block of 16 to i; 5 from i to the end.
    """
    i, j = torch.arange(CHUNK).unsqueeze(1), torch.arange(CHUNK)

    def between_and_middle(half: int) -> Tensor:
        late = i // half % 2 == 1
        return (i // half == j // half) & torch.where(late, j <= i, j > i)

    in_16 = (i // 16 == j // 16) & (j <= i)
    return torch.stack((j <= i, j > i, between_and_middle(32), between_and_middle(16), in_16, j >= i)).to(
        device, torch.float16
    )
