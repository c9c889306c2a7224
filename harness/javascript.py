"""Numbers as JavaScript divides and prints them: the stats line is compared with the original's."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal


def ratio(dividend: float, divisor: float) -> float:
    """JavaScript's `/`: 0 / 0 is NaN, and any other division by 0 is infinite."""
    if divisor:
        return dividend / divisor
    return math.copysign(math.inf, dividend) if dividend else math.nan


def to_fixed(value: float, decimals: int) -> str:
    """JavaScript's `toFixed`: ties go up."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP))
