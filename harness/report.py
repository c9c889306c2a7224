"""The findings of a comparison: a table, a sentence, an exit code. Pure: values in, text out.

A run is one start of the client. Memory is compared over its second half, because in the first half a process grows anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OK, CURE_LOST, NO_RACE, CURE_SLOWER = 0, 1, 3, 4
"""Exit codes; 2 means that nothing could be compared."""
SLOWER = 0.95
"""The cure costs speed if its speed ratio is below this in every round."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Two stats lines with `EXTENDED_STATS`: the one at half-time and the last one."""

    half: Line
    last: Line

    @property
    def jobs_per_s(self) -> float:
        return float(self.last["throughput"])


@dataclass(frozen=True)
class Row:
    """All runs of one contestant."""

    name: str
    runs: Sequence[Run]

    def total(self, key: str) -> int:
        return sum(run.last[key] for run in self.runs)

    def growth(self, key: str) -> int:
        """The growth between the two lines, summed over the runs."""
        return sum(run.last[key] - run.half[key] for run in self.runs)

    def middle(self, key: str) -> float:
        """The median of the runs' last values."""
        return float(median(run.last[key] for run in self.runs))

    @property
    def jobs(self) -> int:
        return self.total("numQueueSucceeded")

    @property
    def lost(self) -> int:
        return self.total("numSucceededLost")

    @property
    def lost_percent(self) -> float:
        return 100 * self.lost / self.jobs

    @property
    def bytes_per_lost_job(self) -> float | None:
        """Growth of memory for each job lost in the second halves; None if none was lost then."""
        lost = self.growth("numSucceededLost")
        return 1024 * self.growth("rssKb") / lost if lost else None

    def figures(self) -> dict[str, float]:
        """The row of the table: counts are sums over the runs, rates and times are medians, memory is a mean."""
        count = len(self.runs)
        return {
            "jobs": self.jobs,
            "lost": self.lost,
            "lost %": self.lost_percent,
            "jobs/s": median(run.jobs_per_s for run in self.runs),
            "p50 ms": self.middle("p50Ms"),
            "p99 ms": self.middle("p99Ms"),
            "bindings left": self.total("numTracked"),
            "MB half-time": sum(run.half["rssKb"] for run in self.runs) * 1024e-6 / count,
            "MB end": sum(run.last["rssKb"] for run in self.runs) * 1024e-6 / count,
            "MB/1M jobs": self.growth("rssKb") * 1024 / self.growth("numQueueSucceeded"),
        }


FORMATS = dict.fromkeys(("jobs", "lost", "jobs/s", "bindings left"), ",.0f") | {
    "lost %": ".2f",
    "p50 ms": ".2f",
    "p99 ms": ".2f",
}


def table(rows: Sequence[Row]) -> str:
    """One line for each contestant, below a line of titles."""
    figures = [row.figures() for row in rows]
    columns = [["", *(row.name for row in rows)]]
    columns += [[key, *(format(each[key], FORMATS.get(key, ".1f")) for each in figures)] for key in figures[0]]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(f"{first:<{widths[0]}}" + _right(rest, widths[1:]) for first, *rest in lines)


def _right(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


@dataclass(frozen=True)
class Ratio:
    """The cure's speed divided by the other's, taken round by round."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} times the speed ({self.lowest:.2f} to {self.highest:.2f})"


def speed_ratio(two_sockets: Row, one_socket: Row) -> Ratio:
    ratios = [one.jobs_per_s / two.jobs_per_s for two, one in zip(two_sockets.runs, one_socket.runs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def verdict(two_sockets: Row, one_socket: Row) -> tuple[int, str]:
    """The exit code, and the finding in one sentence."""
    ratio = speed_ratio(two_sockets, one_socket)
    if one_socket.lost:
        return CURE_LOST, f"The cure failed: on one socket {_of(one_socket)} missed their own event."
    if not two_sockets.lost:
        more = "try more time, or more chains"
        return NO_RACE, f"The race did not show: on two sockets none of {two_sockets.jobs:,} jobs missed its own event; {more}."
    size = two_sockets.bytes_per_lost_job
    each = f", {size / 1000:.1f} kB each" if size and size > 0 else ""
    found = f"on two sockets {_of(two_sockets)} missed their own event and stay in memory{each}"
    if ratio.highest < SLOWER:
        return CURE_SLOWER, f"The cure costs speed: {found}; on one socket none missed it, but at {ratio}."
    return OK, f"The race, and its cure: {found}; on one socket none of {one_socket.jobs:,} missed it, at {ratio}."


def _of(row: Row) -> str:
    return f"{row.lost:,} of {row.jobs:,} jobs ({row.lost_percent:.2f} %)"


def as_json(rows: Sequence[Row], conditions: dict[str, Any]) -> dict[str, Any]:
    """Everything for machines. A row's keys are the table's titles; the first two rows are compared."""
    code, sentence = verdict(*rows[:2])
    return {
        "conditions": conditions,
        "rows": [
            {
                "name": row.name,
                **row.figures(),
                "bytesPerLostJob": row.bytes_per_lost_job,
                "runs": [vars(run) for run in row.runs],
            }
            for row in rows
        ],
        "speedRatio": vars(speed_ratio(*rows[:2])),
        "verdict": sentence,
        "exitCode": code,
    }
