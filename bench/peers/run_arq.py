"""arq: keeps no results, and polls often for many jobs, because its default reads 100 jobs every half second.

It has no bulk call, so 100 enqueue_job run at a time. A job has ended when its hook after_job_end runs, after the write to
Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings
from arq.worker import Worker
from result import Clock, order, report

ORDER = order()
SETTINGS = RedisSettings.from_dsn(ORDER["url"])
IN_FLIGHT = 100
clock = Clock(ORDER["jobs"])


async def noop(ctx: dict[str, Any], n: int) -> None:
    clock.job_started()


async def ended(ctx: dict[str, Any]) -> None:
    clock.job_ended()


async def enqueue_one_by_one(pool: ArqRedis, numbers: Iterator[int]) -> None:
    for n in numbers:
        await pool.enqueue_job("noop", n)


async def enqueue() -> None:
    pool = await create_pool(SETTINGS, default_queue_name=ORDER["queue"])
    started = time.perf_counter()
    numbers = iter(range(ORDER["jobs"]))
    await asyncio.gather(*(enqueue_one_by_one(pool, numbers) for _ in range(IN_FLIGHT)))
    report("arq", ORDER["jobs"], time.perf_counter() - started)
    await pool.aclose()


async def drain() -> None:
    worker = Worker(
        functions=[noop],
        queue_name=ORDER["queue"],
        redis_settings=SETTINGS,
        burst=True,
        after_job_end=ended,
        handle_signals=False,
        max_jobs=ORDER["concurrency"],
        keep_result=0,
        poll_delay=0.001,
        queue_read_limit=1_000,
        log_results=False,
    )
    await worker.async_run()
    report("arq", ORDER["jobs"], clock.seconds)
    await worker.close()


if __name__ == "__main__":
    logging.disable()
    asyncio.run({"enqueue": enqueue, "drain": drain}[ORDER["step"]]())
