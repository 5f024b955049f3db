import math
import random

import pytest

from deltarl.rewards.stats import BUCKETS, LatencyHistogram


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_percentiles_are_those_of_the_sorted_values_within_a_bucket(spread):
    draw = random.Random(3)
    values = [max(math.exp(draw.gauss(math.log(2e-3), spread)), 1e-6) for _ in range(5000)]
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    values.sort()
    for share in (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = values[max(math.ceil(share * len(values)), 1) - 1]
        assert exact * (1 - 1e-9) <= histogram.percentile(share) <= exact * 10 ** (1 / 50) * (1 + 1e-9)
    assert histogram.percentile(1.0) == values[-1]


def test_any_duration_has_a_bucket():
    histogram = LatencyHistogram()
    for seconds in (0.0, 1e-9, 1e-6, 1.0, 9999.0, 1e4, 1e9):
        histogram.add(seconds)
    rows = histogram.rows()
    assert sum(count for _, _, count in rows) == histogram.total == 7
    assert rows[0] == pytest.approx((1e-6, 1e-6 * 10 ** (1 / 50), 3))
    assert rows[-1][2] == 3
    assert len(histogram.counts) == BUCKETS == 500


def test_no_percentile_of_nothing():
    with pytest.raises(ValueError, match="no duration"):
        LatencyHistogram().percentile(0.5)
