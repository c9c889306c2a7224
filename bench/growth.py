"""Whether beequeue stays as fast, and its jobs as small, in a large queue. Measures beequeue only, with one server a level.

The levels take turns, so a machine that is slow for a minute slows all of them. A worker that keeps its jobs fills a level;
the timed drains remove theirs, so a level does not grow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import redis

from bench.measures import BATCH, GROWTH_BOUND
from bench.paired import Setup, own_queue, own_server, rate, store
from bench.programs import python_program
from bench.summary import Summary, paired_ratios, summarise


@dataclass(frozen=True)
class Level:
    """One quantity at one size of the queue. `ratios` compares it with the smallest size."""

    title: str
    unit: str
    jobs: int
    values: list[float]
    ratios: list[float]
    higher_is_better: bool

    @property
    def ratio(self) -> Summary | None:
        return summarise(self.ratios)

    @property
    def met(self) -> bool:
        """Whether this level is within the bound of the smallest one."""
        assert self.ratio is not None
        return self.ratio.median >= 1 - GROWTH_BOUND if self.higher_is_better else self.ratio.median <= 1 + GROWTH_BOUND


def run(setup: Setup) -> list[Level]:
    """Measures drains, enqueues and memory."""
    sizes = setup.sizes
    return [
        *_levels(setup, "drain at 10, beside finished jobs", sizes.finished, _keep_finished, _timed_drain),
        *_levels(setup, "save_all, beside waiting jobs", sizes.waiting, _keep_waiting, _timed_save_all),
        *_memory(setup),
    ]


def _levels(
    setup: Setup,
    title: str,
    levels: Sequence[int],
    fill: Callable[[str, str, int], None],
    timed: Callable[[Setup, str, str], float],
) -> list[Level]:
    """Fills one queue for each level, then times the same work on each in turn."""
    rates: dict[int, list[float]] = {jobs: [] for jobs in levels}
    with ExitStack() as open_:
        places = []
        for jobs in levels:
            url = open_.enter_context(own_server(setup))
            queue = open_.enter_context(own_queue(url))
            fill(url, queue, jobs)
            places.append((jobs, url, queue))
        for number in range(setup.sizes.growth_rounds):
            for jobs, url, queue in places:
                rates[jobs].append(timed(setup, url, queue))
                told = f"{title}: {jobs:,}: {rates[jobs][-1]:,.0f} jobs/s"
                print(f"growth, round {number + 1} of {setup.sizes.growth_rounds}, {told}", file=sys.stderr, flush=True)
    smallest = rates[levels[0]]
    return [Level(title, "jobs/s", jobs, values, paired_ratios(values, smallest), True) for jobs, values in rates.items()]


def _drain(url: str, queue: str, jobs: int, concurrency: int, *, keep: bool) -> float:
    order = {"url": url, "queue": queue, "jobs": jobs, "concurrency": concurrency, "keep": keep}
    with python_program("drain", order) as worker:
        return rate(worker.result())


def _keep_finished(url: str, queue: str, jobs: int) -> None:
    store(url, queue, jobs)
    _drain(url, queue, jobs, 100, keep=True)


def _keep_waiting(url: str, queue: str, jobs: int) -> None:
    if jobs:
        store(url, queue, jobs)


def _timed_drain(setup: Setup, url: str, queue: str) -> float:
    store(url, queue, setup.sizes.drain)
    return _drain(url, queue, setup.sizes.drain, 10, keep=False)


def _timed_save_all(setup: Setup, url: str, queue: str) -> float:
    saved = rate(store(url, queue, setup.sizes.save_all))
    _drain(url, queue, setup.sizes.save_all, 100, keep=False)  # back to the level
    return saved


def _memory(setup: Setup) -> list[Level]:
    """The bytes that Redis uses for each waiting job."""
    title = "Redis's memory for a waiting job"
    values = []
    for jobs in setup.sizes.waiting_for_memory:
        with own_server(setup) as url, own_queue(url) as queue:
            store(url, queue, BATCH)  # pays for the queue itself and the scripts
            before = _used_memory(url)
            store(url, queue, jobs)
            values.append((_used_memory(url) - before) / jobs)
        print(f"growth, {title}: {jobs:,}: {values[-1]:.0f} bytes", file=sys.stderr, flush=True)
    pairs = zip(setup.sizes.waiting_for_memory, values, strict=True)
    return [Level(title, "bytes", jobs, [value], [value / values[0]], False) for jobs, value in pairs]


def _used_memory(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        used: int = client.info("memory")["used_memory"]
    return used
