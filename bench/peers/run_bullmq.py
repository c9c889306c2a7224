"""bullmq for Python: addBulk saves a thousand jobs at a time, and jobs are removed when they complete."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bullmq import Queue, Worker
from result import Clock, order, report

ORDER = order()
BATCH = 1_000
OPTIONS = {"removeOnComplete": True}


async def enqueue() -> None:
    queue = Queue(ORDER["queue"], {"connection": ORDER["url"]})
    started = time.perf_counter()
    for first in range(0, ORDER["jobs"], BATCH):
        numbers = range(first, min(first + BATCH, ORDER["jobs"]))
        await queue.addBulk([{"name": "noop", "data": {"n": n}, "opts": OPTIONS} for n in numbers])
    report("bullmq", ORDER["jobs"], time.perf_counter() - started)
    await queue.close()


async def drain() -> None:
    clock = Clock(ORDER["jobs"])
    all_done = asyncio.Event()

    async def noop(job: Any, token: str) -> None:
        clock.job_started()

    def completed(job: Any, result: Any) -> None:
        if clock.job_ended():
            all_done.set()

    worker = Worker(ORDER["queue"], noop, {"connection": ORDER["url"], "concurrency": ORDER["concurrency"], "autorun": False})
    worker.on("completed", completed)
    running = asyncio.create_task(worker.run())
    await all_done.wait()
    report("bullmq", ORDER["jobs"], clock.seconds)
    running.cancel()


if __name__ == "__main__":
    asyncio.run({"enqueue": enqueue, "drain": drain}[ORDER["step"]]())
