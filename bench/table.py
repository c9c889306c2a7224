"""The results as Markdown, and as one JSON object. Pure.

A cell shows the median of the rounds and, in brackets, the lowest and the highest value. A missed target is marked; it is
not an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.growth import Level
from bench.measures import GROWTH_BOUND, OURS, PEER_FACTOR, ROWS, Row
from bench.paired import Samples
from bench.peers import PeerResult, best_python_drain
from bench.summary import Summary, paired_ratios, summarise


@dataclass
class Results:
    """All results of one run of the benchmark."""

    machine: dict[str, str]
    rounds: int
    samples: Samples = field(default_factory=dict)
    growth: list[Level] = field(default_factory=list)
    peers: list[PeerResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Contestant -> reason."""
    failed: dict[str, str] = field(default_factory=dict)
    """Measure -> reason."""


def number(value: float) -> str:
    """A number with its significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(summary: Summary | None, form: str = "") -> str:
    """`median (low–high)`, or a dash."""
    if summary is None:
        return "–"
    shown = [format(value, form) if form else number(value) for value in (summary.median, summary.low, summary.high)]
    return f"{shown[0]} ({shown[1]}–{shown[2]})" if summary.low != summary.high else shown[0]


def verdict(bound: str, met: bool | None) -> str:
    return bound if met is None else f"{bound} {'met' if met else '**missed**'}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text too."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def render(results: Results) -> str:
    """All results, one table after the other."""
    parts = ["\n".join(f"{label + ':':<10} {value}" for label, value in results.machine.items())]
    if results.samples:
        columns = ("measure", "unit", OURS, "Node", f"ratio (median of {results.rounds})", "target")
        parts.append(markdown(columns, (_paired_line(row, results.samples[row.key]) for row in measured(results))))
    if results.growth:
        head = ("growth, ours only", "jobs", "unit", OURS, "ratio to the fewest", "flat within 10 %")
        parts.append(markdown(head, map(_growth_line, results.growth)))
    if results.peers:
        others = (
            "other queues, measured once",
            "version",
            "at once",
            "jobs",
            "drain, jobs/s",
            "enqueue, jobs/s",
            "ours drains",
        )
        parts += [markdown(others, _peer_lines(results.peers)), _peer_verdict(results.peers)]
    parts += [f"{name} is left out: {reason}" for name, reason in results.left_out.items()]
    parts += [f"{name} was not measured: {reason}" for name, reason in results.failed.items()]
    return "\n\n".join(part for part in parts if part)


def measured(results: Results) -> list[Row]:
    return [row for row in ROWS if row.key in results.samples]


def ratio_of(row: Row, sides: Mapping[str, list[float]]) -> Summary | None:
    """The ratio of a row, summarised over its rounds."""
    return summarise(paired_ratios(sides[OURS], sides.get(row.baseline, [])))


def _paired_line(row: Row, sides: Mapping[str, list[float]]) -> tuple[str, ...]:
    ratio = ratio_of(row, sides)
    bound = "" if row.target is None else f"{'≥' if row.higher_is_better else '≤'} {row.target:.2f}"
    met = None if ratio is None else row.met(ratio.median)
    ours, theirs = (cell(summarise(sides.get(side, []))) for side in (OURS, row.baseline))
    return row.title, row.unit, ours, theirs, cell(ratio, ".2f"), verdict(bound, met)


def _growth_line(level: Level) -> tuple[str, ...]:
    bound = f"≥ {1 - GROWTH_BOUND:.2f}" if level.higher_is_better else f"≤ {1 + GROWTH_BOUND:.2f}"
    values, ratio = cell(summarise(level.values)), cell(level.ratio, ".2f")
    return level.title, f"{level.jobs:,}", level.unit, values, ratio, verdict(bound, level.met)


def _peer_lines(peers: Sequence[PeerResult]) -> Iterable[tuple[str, ...]]:
    ours = next(peer for peer in peers if peer.name == OURS)
    for peer in peers:
        times = f"{ours.drain / peer.drain:.1f} ×" if peer is not ours else ""
        counts = str(peer.concurrency), f"{peer.jobs:,}"
        yield f"{peer.name} ({peer.language})", peer.version, *counts, number(peer.drain), number(peer.enqueue), times


def _peer_verdict(peers: Sequence[PeerResult]) -> str:
    ours = next(peer for peer in peers if peer.name == OURS)
    best = best_python_drain(peers)
    if best is None:
        return ""
    times = ours.drain / best.drain
    bound = verdict(f"≥ {PEER_FACTOR}", times >= PEER_FACTOR)
    return f"Python's fastest other drain is {best.name}'s; ours is {times:.1f} × that (target {bound})"


def as_json(results: Results) -> dict[str, Any]:
    """Every value of every round, with the summaries of the tables."""
    return {
        "machine": results.machine,
        "rounds": results.rounds,
        "rows": [_row_as_json(row, results.samples[row.key]) for row in measured(results)],
        "growth": [{**vars(level), "met": level.met} for level in results.growth],
        "peers": [vars(peer) for peer in results.peers],
        "left_out": results.left_out,
        "failed": results.failed,
    }


def _row_as_json(row: Row, sides: Mapping[str, list[float]]) -> dict[str, Any]:
    ratio = ratio_of(row, sides)
    values = {side: {"values": sides[side], **_summary_as_json(summarise(sides[side]))} for side in sides}
    met = None if ratio is None else row.met(ratio.median)
    return {**vars(row), "sides": values, "ratio": _summary_as_json(ratio) or None, "met": met}


def _summary_as_json(summary: Summary | None) -> dict[str, float]:
    return {} if summary is None else dict(vars(summary))
