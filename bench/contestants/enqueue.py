"""A producer stores jobs that nobody takes.

The clock covers creating and saving all of them. The order's own keys: `jobs`, and either `batch` (jobs in each `save_all`,
one call after the other) or `in_flight` (single saves at a time).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import uvloop

from beequeue import Queue
from bench.contestants.result import order, report


async def save_in_batches(queue: Queue, jobs: int, batch: int) -> None:
    for first in range(0, jobs, batch):
        failed = await queue.save_all([queue.create_job({"n": n}) for n in range(first, min(first + batch, jobs))])
        for error in failed.values():
            raise error


async def save_one_by_one(queue: Queue, numbers: Iterator[int]) -> None:
    for n in numbers:
        await queue.create_job({"n": n}).save()


async def main() -> None:
    ordered = order()
    jobs: int = ordered["jobs"]
    async with Queue(
        ordered["queue"], ordered["url"], is_worker=False, get_events=False, send_events=False, store_jobs=False
    ) as queue:
        started = time.perf_counter()
        if "batch" in ordered:
            await save_in_batches(queue, jobs, ordered["batch"])
        else:
            numbers = iter(range(jobs))
            await asyncio.gather(*(save_one_by_one(queue, numbers) for _ in range(ordered["in_flight"])))
        report(jobs, time.perf_counter() - started)


uvloop.run(main())
