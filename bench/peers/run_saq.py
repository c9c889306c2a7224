"""saq: with hiredis, and a ttl of -1, so that jobs leave nothing in Redis.

Its only bulk call waits for results, so 100 enqueue run at a time. A job has ended when after_process runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

from redis.asyncio import Redis
from result import Clock, order, report
from saq import Job, Queue, Worker
from saq.queue.redis import RedisQueue

ORDER = order()
IN_FLIGHT = 100
clock = Clock(ORDER["jobs"])
all_done = asyncio.Event()


async def noop(ctx: dict[str, Any], *, n: int) -> None:
    clock.job_started()


async def ended(ctx: dict[str, Any]) -> None:
    if clock.job_ended():
        all_done.set()


async def enqueue_one_by_one(queue: Queue, numbers: Iterator[int]) -> None:
    for n in numbers:
        await queue.enqueue(Job("noop", kwargs={"n": n}, ttl=-1))


async def enqueue() -> None:
    queue = RedisQueue(Redis.from_url(ORDER["url"]), name=ORDER["queue"])  # its own from_url knows no unix sockets
    await queue.connect()
    started = time.perf_counter()
    numbers = iter(range(ORDER["jobs"]))
    await asyncio.gather(*(enqueue_one_by_one(queue, numbers) for _ in range(IN_FLIGHT)))
    report("saq", ORDER["jobs"], time.perf_counter() - started)
    await queue.disconnect()


async def drain() -> None:
    queue = RedisQueue(Redis.from_url(ORDER["url"]), name=ORDER["queue"])  # its own from_url knows no unix sockets
    await queue.connect()
    worker = Worker(queue, functions=[noop], concurrency=ORDER["concurrency"], after_process=ended)
    running = asyncio.create_task(worker.start())
    await all_done.wait()
    report("saq", ORDER["jobs"], clock.seconds)
    running.cancel()
    await asyncio.wait([running])


if __name__ == "__main__":
    logging.disable()
    asyncio.run({"enqueue": enqueue, "drain": drain}[ORDER["step"]]())
