"""Medians, spreads and ratios of what was measured. Pure.

A ratio is taken within each round, whose two runs stood next to each other in time, and only then summarised: a machine that
is slow for a minute slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """What became of one quantity over the rounds."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary | None:
    """The median, the least and the greatest value; None without values."""
    if not values:
        return None
    return Summary(statistics.median(values), min(values), max(values))


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours to theirs, round by round; nothing where theirs were not measured."""
    if not theirs:
        return []
    return [our / their for our, their in zip(ours, theirs, strict=True)]
