"""Percentiles of many latencies in little memory: a client may run for days."""

from __future__ import annotations

import math
from collections import Counter

BUCKETS_PER_E = 32
"""Buckets for each factor of e; a latency is accurate to 3 %."""


class Latencies:
    """Counts latencies in logarithmic buckets."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._buckets[math.floor(math.log(seconds) * BUCKETS_PER_E)] += 1

    def percentile_ms(self, share: float) -> float | None:
        """The latency that `share` (0 to 1) of those added do not exceed; None if none was added."""
        left = share * self._buckets.total()
        for bucket, count in sorted(self._buckets.items()):
            left -= count
            if left <= 0:
                return float(f"{1000 * math.exp((bucket + 0.5) / BUCKETS_PER_E):.3g}")
        return None
