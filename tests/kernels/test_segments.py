"""Where the scan cuts sequences."""

import pytest
import torch

from deltarl.kernels.fused.segments import PROGRAMS, SHORTEST, longest_segment, segments_of

SHAPES = [
    ((512,), 16),
    ((2048,), 32),
    ((128,), 16),
    ((3,), 1),
    ((512, *(1,) * 20), 16),
    ((0, 7, 0, 300, 0), 4),
    ((16,) * 32, 8),
    ((64,) * 32, 64),
]


@pytest.mark.parametrize(("per_sequence", "programs_each"), SHAPES)
def test_segments_tile_each_sequence_in_near_equal_parts(per_sequence, programs_each):
    found = segments_of(per_sequence, programs_each, torch.device("cpu"))
    bounds, of_sequence = found.bounds.tolist(), found.of_sequence.tolist()
    edge = 0
    for sequence, chunks in enumerate(per_sequence):
        first, end = of_sequence[sequence : sequence + 2]
        lengths = [bounds[s + 1] - bounds[s] for s in range(first, end)]
        assert bounds[first] == edge and sum(lengths) == chunks
        assert max(lengths) - min(lengths) <= 1
        assert found.opens[first] == found.closes[end - 1] == sequence
        edge += chunks
    assert of_sequence[-1] == found.count == len(bounds) - 1
    assert found.early.tolist() == [s for s in range(found.count) if s + 1 not in of_sequence]
    assert found.late.tolist() == [s for s in range(found.count) if s not in of_sequence]


@pytest.mark.parametrize(("per_sequence", "programs_each"), [s for s in SHAPES if len(s[0]) * s[1] <= PROGRAMS])
def test_segments_run_at_once_where_the_sequences_alone_would(per_sequence, programs_each):
    assert segments_of(per_sequence, programs_each, torch.device("cpu")).count * programs_each <= PROGRAMS


def test_few_heads_are_cut_and_many_or_short_sequences_are_not():
    assert segments_of((512,), 16, torch.device("cpu")).count == 8
    assert segments_of((16,) * 32, 8, torch.device("cpu")).count == 32
    assert longest_segment((SHORTEST,), 1) == SHORTEST
