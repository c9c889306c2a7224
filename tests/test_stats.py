"""The stats line: keys, strings, and JavaScript's rounding."""

from __future__ import annotations

import json
import math

import pytest

from client import Counts, ratio, to_fixed


def test_keys_in_order_and_types() -> None:
    counts = Counts(3588, 0, 3586, 0, 3461)
    stats = counts.stats(3.0)
    assert json.dumps(stats, separators=(",", ":")) == (
        '{"numJobSaveSuccess":3588,"numJobSaveError":0,"numQueueSucceeded":3586,"numQueueFailed":0,'
        '"numJobSucceeded":3461,"throughput":"1195","numSucceededLost":125,"succededLossPercent":"3.5"}'
    )


def test_before_the_first_job() -> None:
    stats = Counts().stats(3.0)
    assert stats["throughput"] == "0"
    assert stats["succededLossPercent"] == "NaN"
    assert Counts().stats(0.0)["throughput"] == "NaN"


def test_failed_jobs_count_for_throughput_only() -> None:
    stats = Counts(numQueueSucceeded=4, numQueueFailed=2, numJobSucceeded=4).stats(2.0)
    assert stats["throughput"] == "3"
    assert stats["succededLossPercent"] == "0.0"


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (0.25, 1, "0.3"),  # a tie that doubles can express
        (2.5, 0, "3"),
        (0.5, 0, "1"),
        (1.005, 2, "1.00"),  # not a tie: the double is below
        (0.35, 1, "0.3"),  # likewise
        (0.45, 1, "0.5"),  # the double is above
        (1195.333, 0, "1195"),
        (99.95, 1, "100.0"),
        (-2.5, 0, "-3"),
        (0.0, 1, "0.0"),
        (math.nan, 1, "NaN"),
        (math.inf, 0, "Infinity"),
    ],
)
def test_to_fixed(value: float, decimals: int, expected: str) -> None:
    assert to_fixed(value, decimals) == expected


def test_ratio() -> None:
    assert ratio(1, 4) == 0.25
    assert ratio(1, 0) == math.inf
    assert math.isnan(ratio(0, 0))
