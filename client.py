"""The client: keeps chains of jobs alive and prints, every few seconds, how many of their own events were lost."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import time
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from typing import Any

import uvloop

import config
from beequeue import BeeQueueError, ConnectionLost, Queue, linear_backoff

COUNTERS = ("numJobSaveSuccess", "numJobSaveError", "numQueueSucceeded", "numQueueFailed", "numJobSucceeded")
MAYBE_SAVED_S = 5  # how long a save that may have been applied waits for its job's end
GIVE_UP_S = 30  # after which a saved job that has not ended is taken for vanished; two stall checks fit in
WIND_DOWN_S = 2  # how long the jobs under way have at the end
BUCKETS_PER_E = 32  # a latency is kept to 3 %

log = logging.getLogger("harness")


class Chains:
    """`size` jobs alive at any time: each end of a job, as the queue tells it, starts the next one."""

    def __init__(self, queue: Queue, size: int) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.restarted = 0
        self.latencies = Latencies()
        self._queue = queue
        self._size = size
        self._stopping = False
        self._failures = 0
        self._vanished_jobs = 0  # and not told of
        self._saving: set[asyncio.Task[None] | None] = set()
        self._saved: dict[str | None, float] = {}  # id -> when; saved and not ended
        self._early: set[str | None] = set()  # ended before the reply to their save was handled: the race
        queue.on("job succeeded", lambda job_id, result: self._ended(job_id, "numQueueSucceeded"))
        queue.on("job failed", lambda job_id, error: self._ended(job_id, "numQueueFailed"))

    @property
    def alive(self) -> int:
        return len(self._saving) + len(self._saved) - len(self._early)

    def fill(self) -> None:
        while self.alive < self._size and not self._stopping:
            self._saving.add(asyncio.create_task(self._save()))

    def give_up_vanished(self) -> None:
        """Starts chains anew whose job should have ended long ago: Redis, or a message, was lost."""
        horizon = time.monotonic() - GIVE_UP_S
        for job_id in [job_id for job_id, saved_at in self._saved.items() if saved_at < horizon]:
            self._vanished(job_id)
        if self._vanished_jobs:
            log.warning("client: %d jobs had vanished or ended unseen; their chains were started anew", self._vanished_jobs)
            self._vanished_jobs = 0

    async def wind_down(self) -> None:
        self._stopping = True
        deadline = time.monotonic() + WIND_DOWN_S
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _save(self) -> None:
        job = self._queue.create_job({"timestamp": int(time.time() * 1000)})
        job.on("succeeded", partial(self._job_succeeded, time.monotonic()))
        try:
            await job.save()
        except BeeQueueError as error:
            await self._save_failed(error)
        else:
            if self._failures:
                log.info("client: saves work again")
            self._failures = 0
            self.counts["numJobSaveSuccess"] += 1
            job.on("unknown", partial(self._vanished, job.id))
            if job.id in self._early:
                self._early.remove(job.id)
            else:
                self._saved[job.id] = time.monotonic()
        self._saving.discard(asyncio.current_task())
        if not self._saving:
            self._early.clear()  # ends of jobs that were given up: no save is left that could claim them
        self.fill()

    async def _save_failed(self, error: BeeQueueError) -> None:
        self.counts["numJobSaveError"] += 1
        self._failures += 1
        if self._failures == 1:
            log.warning("client: a save failed: %s", error)
        if isinstance(error, ConnectionLost) and error.maybe_applied:
            await asyncio.sleep(MAYBE_SAVED_S)
            if self._early:
                self._early.pop()  # it was applied, and its end has started the next job
                return
        else:
            await asyncio.sleep(linear_backoff(self._failures) / 1000)
        self.restarted += 1

    def _ended(self, job_id: str, counter: str) -> None:
        self.counts[counter] += 1
        if self._saved.pop(job_id, None) is None:
            self._early.add(job_id)
        self.fill()

    def _vanished(self, job_id: str | None, error: BeeQueueError | None = None) -> None:
        if self._saved.pop(job_id, None) is not None:
            self._vanished_jobs += 1
            self.restarted += 1
            self.fill()

    def _job_succeeded(self, save_called: float, result: Any) -> None:
        self.counts["numJobSucceeded"] += 1
        self.latencies.add(time.monotonic() - save_called)


class Latencies:
    """How long jobs took from save to their own event; in few buckets, since a client may run for days."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._buckets[math.floor(math.log(seconds) * BUCKETS_PER_E)] += 1

    def percentile_ms(self, share: float) -> float | None:
        """None before the first."""
        left = share * self._buckets.total()
        for bucket, count in sorted(self._buckets.items()):
            left -= count
            if left <= 0:
                return float(f"{1000 * math.exp((bucket + 0.5) / BUCKETS_PER_E):.3g}")
        return None


def stats(counts: dict[str, int], elapsed_s: float) -> dict[str, int | str]:
    """The stats line, before it is JSON."""
    succeeded = counts["numQueueSucceeded"]
    lost = succeeded - counts["numJobSucceeded"]
    return {
        **counts,
        "throughput": to_fixed(ratio(succeeded + counts["numQueueFailed"], elapsed_s), 0),
        "numSucceededLost": lost,
        "succededLossPercent": to_fixed(ratio(lost * 100, succeeded), 1),
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


def resident_kb() -> int:
    """This process's resident memory (Linux)."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def run(queue: Queue, settings: config.Config) -> None:
    """Runs the chains until `DURATION` is over, or until it is cancelled."""
    await queue.ready()
    log.info("client: connected; %d chains, ordered_events=%s", settings.num_chains, settings.ordered_events)
    chains = Chains(queue, settings.num_chains)
    started = time.monotonic()

    def print_stats() -> None:
        line: dict[str, Any] = stats(chains.counts, time.monotonic() - started)
        if settings.extended_stats:
            line |= {"numTracked": len(queue.jobs), "rssKb": resident_kb(), "numRestarted": chains.restarted}
            line |= {"numAlive": chains.alive, "numReconnects": queue.reconnects}
            line |= {"p50Ms": chains.latencies.percentile_ms(0.5), "p99Ms": chains.latencies.percentile_ms(0.99)}
        print(json.dumps(line, separators=(",", ":")), flush=True)

    chains.fill()
    tick, end = started, started + (settings.duration or math.inf)
    try:
        while (tick := tick + settings.stats_interval) < end:
            await asyncio.sleep(tick - time.monotonic())
            chains.give_up_vanished()
            print_stats()
        await asyncio.sleep(end - time.monotonic())
    finally:
        try:
            await chains.wind_down()
        finally:  # a second signal cuts it short
            print_stats()


async def main(settings: config.Config) -> None:
    queue = Queue(
        settings.queue_name,
        redis=settings.redis_url,
        is_worker=False,
        get_events=True,
        send_events=False,
        store_jobs=True,
        ordered_events=settings.ordered_events,
    )
    queue.on("error", lambda error: log.warning("client: %s", error))
    running = asyncio.create_task(run(queue, settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    await asyncio.wait((running,))
    failure = None if running.cancelled() else running.exception()
    await queue.close()
    log.info("client: stopped")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    configuration = config.load()
    config.log_to_stderr()
    try:
        uvloop.run(main(configuration))
    except BeeQueueError as error:
        config.fail(f"client: {error}")
    except BrokenPipeError:  # whoever read the stats has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
