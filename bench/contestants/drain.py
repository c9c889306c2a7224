"""One worker process empties a queue of stored no-op jobs.

The clock runs from the first job's handler to the last job's `succeeded`, which is emitted once Redis has confirmed the
finish. The order's own keys: `jobs`, `concurrency`, and `keep`, with which the finished jobs stay in Redis.
"""

from __future__ import annotations

import asyncio
import time

import uvloop

from beequeue import Job, Queue
from bench.contestants.result import order, report


async def main() -> None:
    ordered = order()
    jobs: int = ordered["jobs"]
    queue = Queue(
        ordered["queue"],
        ordered["url"],
        is_worker=True,
        get_events=False,
        send_events=True,
        store_jobs=False,
        remove_on_success=not ordered.get("keep", False),
    )
    all_done = asyncio.Event()
    started = ended = 0.0
    succeeded = 0

    async def handler(job: Job) -> None:
        nonlocal started
        if not started:
            started = time.perf_counter()

    def count(job: Job, result: object) -> None:
        nonlocal succeeded, ended
        succeeded += 1
        if succeeded == jobs:
            ended = time.perf_counter()
            all_done.set()

    queue.on("succeeded", count)
    await queue.ready()
    queue.process(handler, concurrency=ordered["concurrency"])
    await all_done.wait()
    report(jobs, ended - started)
    await queue.close()


uvloop.run(main())
