"""Where sequences are cut into segments of chunks that are scanned at once."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# Programs that an H100 runs at once, and chunks below which a segment is not worth its first pass.
PROGRAMS, SHORTEST = 132, 8


@dataclass(frozen=True)
class Segments:
    """Segment s has the chunks `bounds[s]` to `bounds[s + 1]`; sequence n the segments `of_sequence[n]` to
    `of_sequence[n + 1]`. `opens` and `closes` [segments]: the sequence that begins, or ends, with the segment, or -1;
    `early` and `late` list the segments that have one after them, or before them, in their sequence. All int32.
    """

    bounds: Tensor
    of_sequence: Tensor
    opens: Tensor
    closes: Tensor
    early: Tensor
    late: Tensor

    @property
    def count(self) -> int:
        return len(self.opens)


@lru_cache(maxsize=64)
def segments_of(per_sequence: tuple[int, ...], programs_each: int, device: torch.device) -> Segments:
    """Segments of near-equal length for sequences of so many chunks; one segment takes `programs_each` programs."""
    longest = longest_segment(per_sequence, programs_each)
    bounds, of_sequence = [0], [0]
    for chunks in per_sequence:
        count = max(1, -(-chunks // longest))
        bounds += [bounds[-1] + chunks * (part + 1) // count for part in range(count)]
        of_sequence.append(of_sequence[-1] + count)
    opens, closes = [-1] * of_sequence[-1], [-1] * of_sequence[-1]
    for sequence, (first, end) in enumerate(pairwise(of_sequence)):
        opens[first] = closes[end - 1] = sequence
    early = [segment for segment, sequence in enumerate(closes) if sequence < 0]
    late = [segment for segment, sequence in enumerate(opens) if sequence < 0]
    columns = (bounds, of_sequence, opens, closes, early, late)
    return Segments(*(torch.tensor(column, dtype=torch.int32).to(device) for column in columns))


def longest_segment(per_sequence: tuple[int, ...], programs_each: int) -> int:
    """Chunks that a segment may have: as few as leave every segment its programs at once; where there are more
    sequences than that, twice a fair share of all chunks."""
    room = PROGRAMS // programs_each
    if len(per_sequence) > room:
        return max(SHORTEST, 2 * -(-sum(per_sequence) * programs_each // PROGRAMS))
    longest = SHORTEST
    while sum(max(1, -(-chunks // longest)) for chunks in per_sequence) > room:
        longest += 1
    return longest
