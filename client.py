"""The client: keeps chains of jobs alive and prints, every few seconds, how many jobs missed their own event."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from functools import partial
from typing import Any

from beequeue import BeeQueueError, Queue
from config import Config
from harness import program
from harness.alive import Alive
from harness.javascript import ratio, to_fixed
from harness.latencies import Latencies
from harness.memory import resident_kb

COUNTERS = ("numJobSaveSuccess", "numJobSaveError", "numQueueSucceeded", "numQueueFailed", "numJobSucceeded")

log = logging.getLogger("harness")


class Chains:
    """Keeps `size` jobs alive: when the queue reports that a job has ended, the next one starts."""

    def __init__(self, queue: Queue, size: int) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.latencies = Latencies()
        self.alive = Alive(size, self._save_a_job)
        self._queue = queue
        queue.on("job succeeded", lambda job_id, result: self._ended("numQueueSucceeded", job_id))
        queue.on("job failed", lambda job_id, error: self._ended("numQueueFailed", job_id))

    async def _save_a_job(self) -> str | None:
        job = self._queue.create_job({"timestamp": int(time.time() * 1000)})
        job.on("succeeded", partial(self._job_succeeded, time.monotonic()))
        try:
            await job.save()
        except BeeQueueError:
            self.counts["numJobSaveError"] += 1
            raise
        self.counts["numJobSaveSuccess"] += 1
        job.on("unknown", partial(self.alive.vanished, job.id))
        return job.id

    def _ended(self, counter: str, job_id: str) -> None:
        """The queue's own event: it needs no binding of id to job, so the race cannot lose it."""
        self.counts[counter] += 1
        self.alive.ended(job_id)

    def _job_succeeded(self, saved_at: float, result: Any) -> None:
        """The job's own event: with two sockets it is lost when it overtakes the reply to the save."""
        self.counts["numJobSucceeded"] += 1
        self.latencies.add(time.monotonic() - saved_at)


def stats(counts: dict[str, int], elapsed_s: float) -> dict[str, Any]:
    """The stats line, before it is JSON."""
    succeeded = counts["numQueueSucceeded"]
    lost = succeeded - counts["numJobSucceeded"]
    return {
        **counts,
        "throughput": to_fixed(ratio(succeeded + counts["numQueueFailed"], elapsed_s), 0),
        "numSucceededLost": lost,
        "succededLossPercent": to_fixed(ratio(lost * 100, succeeded), 1),
    }


async def run(queue: Queue, settings: Config) -> None:
    """Runs the chains until `DURATION` is over, or until it is cancelled."""
    await queue.ready()
    log.info("client: connected; %d chains, ordered_events=%s", settings.num_chains, settings.ordered_events)
    chains = Chains(queue, settings.num_chains)
    started = time.monotonic()

    def print_stats() -> None:
        line = stats(chains.counts, time.monotonic() - started)
        if settings.extended_stats:
            line |= {"numTracked": len(queue.jobs), "rssKb": resident_kb(), "numRestarted": chains.alive.restarted}
            line |= {"numAlive": chains.alive.count, "numReconnects": queue.reconnects}
            line |= {"p50Ms": chains.latencies.percentile_ms(0.5), "p99Ms": chains.latencies.percentile_ms(0.99)}
        print(json.dumps(line, separators=(",", ":")), flush=True)

    chains.alive.fill()
    tick, end = started, started + (settings.duration or math.inf)
    try:
        while (tick := tick + settings.stats_interval) < end:
            await asyncio.sleep(tick - time.monotonic())
            chains.alive.give_up_vanished()
            print_stats()
        await asyncio.sleep(end - time.monotonic())
    finally:
        try:
            await chains.alive.wind_down()
        finally:  # also when a second signal cuts the wait short
            print_stats()


async def main(settings: Config) -> None:
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
    await program.run_until_signal(queue, run(queue, settings))


if __name__ == "__main__":
    program.start("client", main)
