"""Medians, spreads and ratios of the measured values. Pure.

A ratio is taken within each round and then summarised. The two runs of a round follow each other, so a machine that is slow
for a minute slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """One quantity over the rounds."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary | None:
    """The median, the lowest and the highest value; None without values."""
    if not values:
        return None
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours divided by theirs, round by round; empty if theirs were not measured."""
    if not theirs:
        return []
    return [our / their for our, their in zip(ours, theirs, strict=True)]
