"""The stats line: keys, strings, and JavaScript's rounding."""

from __future__ import annotations

import json
import math

import pytest

from client import COUNTERS, stats
from harness.javascript import ratio, to_fixed


def counts(*values: int) -> dict[str, int]:
    return dict(zip(COUNTERS, values, strict=True))


def test_keys_in_order_and_types() -> None:
    assert json.dumps(stats(counts(3588, 0, 3586, 0, 3461), 3.0), separators=(",", ":")) == (
        '{"numJobSaveSuccess":3588,"numJobSaveError":0,"numQueueSucceeded":3586,"numQueueFailed":0,'
        '"numJobSucceeded":3461,"throughput":"1195","numSucceededLost":125,"succededLossPercent":"3.5"}'
    )


def test_before_the_first_job() -> None:
    none = counts(0, 0, 0, 0, 0)
    assert stats(none, 3.0)["throughput"] == "0"
    assert stats(none, 3.0)["succededLossPercent"] == "NaN"
    assert stats(none, 0.0)["throughput"] == "NaN"


def test_failed_jobs_count_for_throughput_only() -> None:
    line = stats(counts(6, 0, 4, 2, 4), 2.0)
    assert line["throughput"] == "3"
    assert line["succededLossPercent"] == "0.0"


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
