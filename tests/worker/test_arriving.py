"""A job whose data arrives over a slow link: its worker reports it meanwhile, and no other worker runs it."""

from __future__ import annotations

import asyncio
from typing import Any

from beequeue import Job, Queue
from tests.conftest import MakeQueue, Seen, until
from tests.relay import Line, Relay

INTERVAL_MS = 400
LARGE = "x" * 100_000
HEAD = 1_000
"""How much of a large reply comes through."""


class Holding:
    """Passes on the beginning of a large reply, and keeps the rest on that connection until `gate` opens."""

    def __init__(self, relay: Relay) -> None:
        self.gate = asyncio.Event()
        self.held = Seen()
        relay.distort = self

    async def __call__(self, line: Line, data: bytes) -> bytes:
        if b"x" * HEAD not in data or self.gate.is_set():
            return data
        await line.pass_back(data[:HEAD])
        self.held(line.role)
        await self.gate.wait()
        return data[HEAD:]


async def survives(checker: Queue, redis: Any, job_id: str, checks: int = 3) -> None:
    """Puts all active jobs in `stalling` so many times, and waits each time until this one has been reported."""
    stalling = checker.to_key("stalling")
    for _ in range(checks):
        await redis.delete(checker.to_key("stallBlock"))
        assert await checker.check_stalled_jobs() == 0
        assert await redis.sismember(stalling, job_id)
        await until(lambda: _is_reported(redis, stalling, job_id), 3)


async def _is_reported(redis: Any, stalling: str, job_id: str) -> bool:
    return not await redis.sismember(stalling, job_id)


async def test_a_job_that_arrives_slowly_is_reported(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """from the moment its worker knows its id; so it runs once"""
    checker = await make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0).ready()
    started = Seen()

    async def handler(job: Job) -> int:
        started(job.id)
        return len(job.data)

    async with Relay(url) as relay:
        holding = Holding(relay)
        worker = await make_queue(
            redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False
        ).ready()
        large = await checker.create_job(LARGE).save()
        worker.process(handler)
        assert await holding.held.reaches(1) == [("take",)]
        await survives(checker, redis, str(large.id))
        holding.gate.set()
        assert await large.result(10_000) == len(LARGE)
        assert [job_id for (job_id,) in started.calls].count(large.id) == 1
        await worker.close()
