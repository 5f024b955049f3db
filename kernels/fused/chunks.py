"""Where the chunks of a batch lie: tables on the device that every kernel reads, made once per shape."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """`row` [chunks] the first token of each chunk in the flattened batch, `size` [chunks] its tokens (1 to 64), and
    `bounds` [N + 1]: sequence n has the chunks bounds[n] to bounds[n + 1]. All int32; `sequence` [chunks], int64: which
    sequence a chunk is of. `per_sequence` counts them."""

    row: Tensor
    size: Tensor
    bounds: Tensor
    sequence: Tensor
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
    return Chunks(*tables, sequence.to(device), tuple(per_sequence.tolist()))


@lru_cache(maxsize=8)
def spans(device: torch.device) -> Tensor:
    """fp16 [13, 64, 64], 0 and 1, of which row i says what tokens j to sum for token i:

    0 to 5 between i and the middle of i's block of 64, 32, 16, 8, 4 and 2; 6 from the start to i; 7 after i to the end;
    8 from i to the end. And 9 to 12: whether i and j lie in different halves of one block of 16, 8, 4 and 2.
    """
    i, j = torch.arange(CHUNK).unsqueeze(1), torch.arange(CHUNK)

    def to_middle(half: int) -> Tensor:
        late = i // half % 2 == 1
        return (i // half == j // half) & torch.where(late, j <= i, j > i)

    halvings = [to_middle(32 >> level) for level in range(6)]
    halves = [(i ^ j) // (32 >> level) == 1 for level in range(2, 6)]
    return torch.stack((*halvings, j <= i, j > i, j >= i, *halves)).to(device, torch.float16)
