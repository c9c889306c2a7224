"""`python -m harness chart`: draws one picture of saved logs; needs the extra `chart`.

Reads the client's stats lines, ignores the prefixes of Compose and `make local`, and skips all other lines. The lines carry
no time, so a line's time is its number times the interval. Only the last line, printed when the run is stopped, may come
earlier; its time follows from `throughput`, which is jobs divided by seconds.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beequeue.escape import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is invisible on white."""
STYLES = ("-", (0, (5, 1.5)), "-.", (0, (1, 1.2)))
UNITS = ((3 * 3600, 3600, "hours"), (600, 60, "minutes"), (0, 1, "seconds"))
PANELS = {
    "counters": ("Jobs that succeeded", "jobs", 10),
    "lost": ("Lost events: the gap between the two", "events since the start", 10),
    "percent": ("Lost share", "% of the jobs since the start", 0.1),
    "rate": ("Speed", "jobs/s in each interval", 10),
    "memory": ("The client's resident memory", "MB", 10),
}
"""By panel: title, unit, and the least height of the axis."""
PIXELS_PER_INCH = 160
Line = dict[str, Any]
Points = list[tuple[float, float]]


class NoChart(Exception):
    """Nothing can be drawn; the message is the line to show."""


@dataclass(frozen=True)
class Log:
    """The stats lines of one run, and the time of each in seconds since the start."""

    name: str
    lines: list[Line]
    times: list[float]

    def counter(self, key: str) -> Points:
        """The values of a line's key, or of `lost` or `ended`, beginning with 0 at the start."""
        return [(0, 0), *((time, line[key]) for time, line in zip(self.times, self.lines, strict=True))]

    def loss_percent(self) -> Points:
        """The share of all jobs since the start; no points before the first job."""
        both = zip(self.counter("numQueueSucceeded"), self.counter("lost"), strict=True)
        return [(time, 100 * lost / jobs) for (time, jobs), (_, lost) in both if jobs]

    def rate(self) -> Points:
        """Jobs ended per second between neighbouring lines; none for a last line that follows at once."""
        steps = list(pairwise(self.counter("ended")))
        half = self.times[0] / 2
        return [(time, (now - then) / (time - before)) for (before, then), (time, now) in steps if time - before >= half]

    def memory_mb(self) -> Points:
        lines = zip(self.times, self.lines, strict=True)
        return [(time, line["rssKb"] * 1024 / 1e6) for time, line in lines if isinstance(line.get("rssKb"), int)]


def parse_line(text: str) -> Line | None:
    """The stats in a line of a log, plus `lost`, `ended` and `elapsed_s` (NaN if too coarse); None for other lines."""
    try:
        line, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
        succeeded, failed, heard = (index(line[key]) for key in ("numQueueSucceeded", "numQueueFailed", "numJobSucceeded"))
        throughput = float(line.get("throughput", "NaN"))
    except (ValueError, KeyError, TypeError):
        return None
    elapsed_s = (succeeded + failed) / throughput if throughput >= 100 else math.nan
    return {**line, "lost": succeeded - heard, "ended": succeeded + failed, "elapsed_s": elapsed_s}


def read(argument: str, interval_s: float) -> Log:
    """Reads the log that `NAME=path` or `path` names; raises `NoChart`."""
    name, equals, path = argument.partition("=")
    if not (equals and name) or Path(argument).exists():
        name, path = Path(argument).stem, argument
    try:
        lines = [line for text in Path(path).read_text(errors="replace").splitlines() if (line := parse_line(text))]
    except OSError as error:
        raise NoChart(f"{path}: {error.strerror}") from None
    if not lines:
        raise NoChart(f"{path}: contains no stats line")
    for number, (before, after) in enumerate(pairwise(lines), 2):
        if after["ended"] < before["ended"]:
            raise NoChart(f"{path}: the counters go back at stats line {number}; a chart needs one log for each run")
    times = [number * interval_s for number in range(1, len(lines) + 1)]
    if times[-1] - interval_s < lines[-1]["elapsed_s"] < times[-1]:
        times[-1] = lines[-1]["elapsed_s"]
    for time, line in list(zip(times, lines, strict=True))[-2:-1]:
        if abs(line["elapsed_s"] / time - 1) > 0.1:
            took = f"by its throughput, line {len(lines) - 1} came after {line['elapsed_s']:.3g} s, not {time:g} s"
            print(f"{escape(path)}: {took}; is the interval {interval_s:g} s right, and the log complete?", file=sys.stderr)
    return Log(name, lines, times)


def run(arguments: Sequence[str], output: str, interval: str) -> None:
    """Draws the logs into the file `output`; raises `NoChart`."""
    if Path(output).suffix.lower() not in (".png", ".svg"):
        raise NoChart(f"--output must end in .png or .svg, not {output!r}")
    if not (re.fullmatch(r"[0-9]*\.?[0-9]+", interval) and float(interval) > 0):
        raise NoChart(f"--interval must be a number of seconds greater than 0, not {interval!r}")
    logs = [read(argument, float(interval)) for argument in arguments]
    names = [log.name for log in logs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise NoChart(f"more than one log is called {twice[0]!r}; name them: NAME=file")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise NoChart("matplotlib is not installed: make chart, or pip install -e '.[chart]'") from None
    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    style |= {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.7}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}  # text stays text
    with matplotlib.rc_context(style):
        try:
            draw(logs, float(interval)).savefig(output, dpi=PIXELS_PER_INCH)
        except OSError as error:
            raise NoChart(f"{output}: {error.strerror}") from None
    print(escape(output))


def draw(logs: Sequence[Log], interval_s: float) -> Figure:
    """Draws five panels. Each has one curve for each log; the first has two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.8), layout="constrained")
    axes = dict(zip(PANELS, figure.subplot_mosaic("AB;CD;EE", height_ratios=(1.2, 1, 0.9)).values(), strict=True))
    longest = max(log.times[-1] for log in logs)
    unit_s, unit = next((size, name) for least, size, name in UNITS if longest >= least)
    for key, (title, label, least) in PANELS.items():
        axes[key].set(title=title, ylabel=label, xlabel=unit, xlim=(0, longest / unit_s), ylim=(0, least))
        axes[key].yaxis.set_major_formatter(lambda value, position: f"{value:,.10g}")
    axes["memory"].set_xlabel(f"{unit} since the start (number of the stats line × {interval_s:g} s)")
    for number, log in enumerate(logs):
        for key, points, look in _curves(log, number):
            axes[key].plot([time / unit_s for time, _ in points], [value for _, value in points], **look)
            edges = [*axes[key].get_ylim(), *(1.05 * value for _, value in points)]
            axes[key].set_ylim(min(edges), max(edges))
    note = "wide: events of the queue\nnarrow: events of the jobs themselves"
    axes["counters"].text(0.03, 0.97, note, transform=axes["counters"].transAxes, va="top")
    _enlarge_the_end(axes["counters"], logs)
    _name_memory(axes["memory"], logs)
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "frameon": False, "handlelength": 3.5}
    legend = figure.legend(axes["lost"].lines, ["."] * len(logs), **place)
    for text, log in zip(legend.get_texts(), logs, strict=True):  # the legend would leave out a label that begins with "_"
        text.set_parse_math(False)
        text.set_text(f"{log.name}: {log.lines[-1]['lost']:,} of {log.lines[-1]['numQueueSucceeded']:,} lost")
    return figure


def _curves(log: Log, number: int) -> list[tuple[str, Points, dict[str, Any]]]:
    """The panel, the points and the style of each curve of a log."""
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
    look = {"color": colour, "linestyle": style, "linewidth": 1.8, "marker": "o" if len(log.lines) < 3 else ""}
    look |= {"clip_on": False, "zorder": 3}  # a curve at 0 lies on the axis
    return [
        ("counters", log.counter("numQueueSucceeded"), {"color": colour, "alpha": 0.3, "linewidth": 6}),
        ("counters", log.counter("numJobSucceeded"), look),
        ("lost", log.counter("lost"), look),
        ("percent", log.loss_percent(), look),
        ("rate", log.rate(), look),
        ("memory", log.memory_mb(), look),
    ]


def _enlarge_the_end(axes: Axes, logs: Sequence[Log]) -> None:
    """Adds an inset with the last moments of the log that lost most, where its two counters can be told apart."""
    worst, log = max(enumerate(logs), key=lambda item: item[1].lines[-1]["lost"])
    end, jobs, lost = log.times[-1], log.lines[-1]["numQueueSucceeded"], log.lines[-1]["lost"]
    if lost <= 0:
        return
    share = min(3 * lost / jobs, 1)
    inset = axes.inset_axes((0.6, 0.1, 0.37, 0.4), xticks=[], yticks=[])
    inset.spines[:].set_visible(True)
    for _, points, look in _curves(log, worst)[:2]:
        inset.plot([time for time, _ in points], [value for _, value in points], **{**look, "clip_on": True})
    inset.set(xlim=(end * (1 - share), end), ylim=(jobs * (1 - 1.4 * share), jobs * (1 + 0.1 * share)))
    middle, top = end * (1 - share / 6), jobs * (1 - share / 6)
    inset.annotate("", (middle, top), (middle, top - lost), arrowprops={"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0})
    inset.text(0.97, 0.06, f"{lost:,} lost", transform=inset.transAxes, ha="right")
    inset.text(0.03, 0.97, f"the last {float(f'{share * end:.2g}'):g} s", transform=inset.transAxes, va="top")


def _name_memory(axes: Axes, logs: Sequence[Log]) -> None:
    """Names the logs without memory figures, and limits the axis to the range of the others."""
    if known := [value for log in logs for _, value in log.memory_mb()]:
        axes.set_ylim(bottom=0.8 * min(known))
    else:
        axes.set_yticks([])
    if silent := [log.name for log in logs if not log.memory_mb()]:
        note = f"not in the log of {', '.join(silent)}: EXTENDED_STATS was off"
        axes.text(0.5, 0.08, note, transform=axes.transAxes, ha="center", parse_math=False)
