"""How long verifications take, in memory that does not grow with their number."""

import bisect
import itertools
import math

SHORTEST = 1e-6
LONGEST = 1e4
PER_DECADE = 50
BUCKETS = round(math.log10(LONGEST / SHORTEST) * PER_DECADE)


class LatencyHistogram:
    """Durations counted in 500 buckets, evenly spaced in the logarithm from 1 µs to 10 000 s.

    Neighbouring edges differ by a factor 10^(1/50) = 1.047, which bounds the relative error of a percentile. Shorter
    and longer durations fall into the first and the last bucket. Not locked: its owner is.
    """

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        bucket = int(math.log10(seconds / SHORTEST) * PER_DECADE) if seconds > SHORTEST else 0
        self.counts[bucket if bucket < BUCKETS else -1] += 1
        self.total += 1
        if seconds > self.longest:
            self.longest = seconds

    def percentile(self, share: float) -> float:
        """Seconds that `share` (0 to 1) of the durations stay within: the edge above the nearest rank, at most the
        longest duration seen. Raises ValueError when nothing was counted."""
        if self.total == 0:
            raise ValueError("no duration was counted yet")
        rank = max(math.ceil(share * self.total), 1)
        bucket = bisect.bisect_left(list(itertools.accumulate(self.counts)), rank)
        return min(_edge(bucket + 1), self.longest)

    def rows(self) -> list[tuple[float, float, int]]:
        """(from seconds, to seconds, count) of each bucket that is not empty, in rising order."""
        return [(_edge(bucket), _edge(bucket + 1), count) for bucket, count in enumerate(self.counts) if count]


def _edge(bucket: int) -> float:
    return SHORTEST * 10 ** (bucket / PER_DECADE)
