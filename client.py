"""The client: keeps chains of jobs alive and prints, every few seconds, how many of their own events were lost."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import config
from beequeue import BeeQueueError, ConnectionLost, Queue, linear_backoff

log = logging.getLogger("harness")

MAYBE_SAVED_S = 5
"""how long a save that may have been applied waits for its job's end"""
GIVE_UP_S = 30
"""after which a job that was saved and did not end is taken for vanished; two stall checks fit in"""
WIND_DOWN_S = 2
"""how long the jobs under way have at the end"""


@dataclass
class Counts:
    numJobSaveSuccess: int = 0  # noqa: N815 - these five are the keys of the stats line
    numJobSaveError: int = 0  # noqa: N815
    numQueueSucceeded: int = 0  # noqa: N815
    numQueueFailed: int = 0  # noqa: N815
    numJobSucceeded: int = 0  # noqa: N815

    def stats(self, elapsed_s: float) -> dict[str, int | str]:
        """The stats line, before it is JSON."""
        lost = self.numQueueSucceeded - self.numJobSucceeded
        return {
            **asdict(self),
            "throughput": to_fixed(ratio(self.numQueueSucceeded + self.numQueueFailed, elapsed_s), 0),
            "numSucceededLost": lost,
            "succededLossPercent": to_fixed(ratio(lost * 100, self.numQueueSucceeded), 1),
        }


def ratio(dividend: float, divisor: float) -> float:
    """Division as in JavaScript, where 0 / 0 is NaN."""
    if divisor:
        return dividend / divisor
    return math.copysign(math.inf, dividend) if dividend else math.nan


def to_fixed(value: float, decimals: int) -> str:
    """JavaScript's `toFixed`: ties go up."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP))


class Chains:
    """Keeps `size` jobs alive: each end of a job, as the queue tells it, starts the next one."""

    def __init__(self, queue: Queue, size: int, counts: Counts) -> None:
        self.restarted = 0
        self._queue = queue
        self._size = size
        self._counts = counts
        self._saving = 0
        self._saved: dict[str, float] = {}  # id -> when; saved and not ended
        self._early: set[str] = set()  # ended before the reply to their save was handled: the race
        self._failed_in_a_row = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = 0.0
        self._stopping = False
        self._idle = asyncio.Event()

    @property
    def alive(self) -> int:
        return self._saving + len(self._saved) - len(self._early)

    @property
    def age_s(self) -> float:
        """Seconds since the chains were started; 0 before."""
        return time.monotonic() - self._started if self._started else 0.0

    def start(self) -> None:
        self._started = time.monotonic()
        self.fill()

    def fill(self) -> None:
        """Starts chains until all are alive."""
        while self.alive < self._size and not self._stopping:
            self._saving += 1
            task = asyncio.create_task(self._save())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not self.alive:
            self._idle.set()

    def ended(self, job_id: str) -> None:
        """A job of the queue has ended."""
        if self._saved.pop(job_id, None) is None:
            self._early.add(job_id)
        self.fill()

    def restart_vanished(self) -> None:
        """Gives up jobs that should have ended long ago: Redis, or a message, was lost."""
        horizon = time.monotonic() - GIVE_UP_S
        for job_id in [job_id for job_id, saved_at in self._saved.items() if saved_at < horizon]:
            self._vanished(job_id)

    async def wind_down(self) -> None:
        """Starts no more jobs, and lets those under way end."""
        self._stopping = True
        self.fill()
        try:
            await asyncio.wait_for(self._idle.wait(), WIND_DOWN_S)
        except TimeoutError:
            pass
        for task in self._tasks:
            task.cancel()

    async def _save(self) -> None:
        job = self._queue.create_job({"timestamp": int(time.time() * 1000)})
        job.on("succeeded", self._job_succeeded)
        job.on("unknown", lambda error: self._vanished(job.id))
        try:
            await job.save()
        except BeeQueueError as error:
            await self._save_failed(error)
        else:
            self._counts.numJobSaveSuccess += 1
            self._failed_in_a_row = 0
            assert job.id is not None
            if job.id in self._early:
                self._early.remove(job.id)
            else:
                self._saved[job.id] = time.monotonic()
        finally:
            self._saving -= 1
            if not self._saving:
                self._early.clear()  # ends of jobs that were given up: no save is left to claim them
            self.fill()

    async def _save_failed(self, error: BeeQueueError) -> None:
        self._counts.numJobSaveError += 1
        self._failed_in_a_row += 1
        if isinstance(error, ConnectionLost) and error.maybe_applied:
            await asyncio.sleep(MAYBE_SAVED_S)
            if self._early:
                self._early.pop()  # it was saved, has ended, and that end started the next job
                return
        else:
            await asyncio.sleep(linear_backoff(self._failed_in_a_row) / 1000)
        self.restarted += 1

    def _vanished(self, job_id: str | None) -> None:
        if self._saved.pop(job_id or "", None) is not None:
            self.restarted += 1
            self.fill()

    def _job_succeeded(self, result: Any) -> None:
        self._counts.numJobSucceeded += 1


async def run(queue: Queue, chains: Chains, print_stats: Callable[[], None], settings: config.Config) -> None:
    """Keeps the chains alive and prints stats, until `DURATION` is over."""
    await queue.ready()
    log.info("client: connected; %d chains, ordered_events=%s", settings.num_chains, settings.ordered_events)
    chains.start()
    elapsed = 0.0
    while not settings.duration or elapsed + settings.stats_interval < settings.duration:
        elapsed += settings.stats_interval
        await asyncio.sleep(elapsed - chains.age_s)
        chains.restart_vanished()
        print_stats()
    await asyncio.sleep(settings.duration - chains.age_s)


async def main(settings: config.Config) -> None:
    counts = Counts()
    queue = Queue(
        settings.queue_name,
        redis=settings.redis_url,
        is_worker=False,
        get_events=True,
        send_events=False,
        store_jobs=True,
        ordered_events=settings.ordered_events,
    )
    chains = Chains(queue, settings.num_chains, counts)

    @queue.on("job succeeded")
    def job_succeeded(job_id: str, result: Any) -> None:
        counts.numQueueSucceeded += 1
        chains.ended(job_id)

    @queue.on("job failed")
    def job_failed(job_id: str, error: Exception) -> None:
        counts.numQueueFailed += 1
        chains.ended(job_id)

    @queue.on("error")
    def warn(error: Exception) -> None:
        log.warning("client: %s", error)

    def print_stats() -> None:
        stats = counts.stats(chains.age_s)
        if settings.extended_stats:
            stats |= {"numTracked": len(queue.jobs), "rssKb": resident_kb(), "numRestarted": chains.restarted}
            stats |= {"numAlive": chains.alive, "numReconnects": queue.reconnects}
        print(json.dumps(stats, separators=(",", ":")), flush=True)

    running = asyncio.create_task(run(queue, chains, print_stats, settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    await asyncio.wait((running,))
    failure = None if running.cancelled() else running.exception()
    if chains.age_s:
        await chains.wind_down()
        print_stats()
    await queue.close()
    log.info("client: stopped")
    if failure is not None:
        raise failure


def resident_kb() -> int:
    """This process's resident memory (Linux)."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


if __name__ == "__main__":
    configuration = config.load()
    config.log_to_stderr()
    try:
        asyncio.run(main(configuration))
    except BeeQueueError as error:
        config.fail(f"client: {error}")
    except BrokenPipeError:  # whoever read the stats has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
