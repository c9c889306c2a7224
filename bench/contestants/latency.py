"""A producer sends one job at a time to a worker in another process.

Each job's clock runs from before its `save` to its own `succeeded`. Reports percentiles in microseconds. The order's own keys:
`jobs`, and `warm_up`, the number of jobs before them that are not counted.
"""

from __future__ import annotations

import asyncio
import time

import uvloop

from beequeue import Queue
from bench.contestants.result import order, report


async def main() -> None:
    ordered = order()
    jobs: int = ordered["jobs"]
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    async with Queue(
        ordered["queue"], ordered["url"], is_worker=False, get_events=True, send_events=False, store_jobs=True
    ) as queue:
        for n in range(ordered["warm_up"] + jobs):
            heard: asyncio.Future[None] = loop.create_future()
            job = queue.create_job({"n": n})
            job.on("succeeded", lambda result, heard=heard: heard.set_result(None))
            started = time.perf_counter()
            await job.save()
            await heard
            latencies.append(time.perf_counter() - started)
        latencies = sorted(latencies[ordered["warm_up"] :])
        report(jobs, sum(latencies), p50_us=latencies[jobs // 2] * 1e6, p99_us=latencies[jobs * 99 // 100] * 1e6)


uvloop.run(main())
