"""A job whose data arrives over a slow link: its worker reports it meanwhile, and no other worker runs it."""

from __future__ import annotations

import asyncio
from typing import Any

from beequeue import Job, Queue
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import takes_no_more
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
        assert await checker.check_stalled_jobs() == 0  # it fills `stalling`; a report may follow at once
        await until(lambda: _is_reported(redis, stalling, job_id), 3)


async def _is_reported(redis: Any, stalling: str, job_id: str) -> bool:
    return not await redis.sismember(stalling, job_id)


async def test_jobs_that_arrive_slowly_are_reported(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """from the moment that Redis has moved them, though one take brings several; so each runs once"""
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
        large = [await checker.create_job(LARGE).save() for _ in range(2)]
        worker.process(handler, 4)
        assert await holding.held.reaches(1) == [("take",)]
        for job in large:
            await survives(checker, redis, str(job.id))
        holding.gate.set()
        for job in large:
            assert await job.result(10_000) == len(LARGE)
            assert [job_id for (job_id,) in started.calls].count(job.id) == 1
        await worker.close()


async def test_a_job_that_a_settlement_brings_slowly_is_reported(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """likewise"""
    checker = await make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0).ready()
    started, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> int:
        started(job.id)
        if len(job.data) < HEAD:
            await gate.wait()
        return len(job.data)

    async with Relay(url) as relay:
        worker = await make_queue(
            redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False
        ).ready()
        small = await checker.create_job("small").save()
        worker.process(handler)
        await started.reaches(1)
        holding = Holding(relay)
        large = await checker.create_job(LARGE).save()
        gate.set()
        await holding.held.reaches(1)
        await survives(checker, redis, str(large.id))
        holding.gate.set()
        assert await small.result(10_000) == 5
        assert await large.result(10_000) == len(LARGE)
        assert [job_id for (job_id,) in started.calls].count(large.id) == 1
        await worker.close()


async def test_a_closing_worker_hands_back_a_large_job_unread(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """it was taken by a settlement just before"""
    started, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> None:
        started(job.id)
        await gate.wait()

    async with Relay(url) as relay:
        producer, worker = make_queue(is_worker=False), make_queue(redis=relay.url, get_events=False)
        await producer.create_job("small").save()
        worker.process(handler)
        await started.reaches(1)
        large = await producer.create_job(LARGE).save()
        relay.hold("command")
        gate.set()
        await until(lambda: _is_active(redis, producer, str(large.id)))
        closing = asyncio.create_task(worker.close())
        await until(lambda: takes_no_more(worker))
        relay.release("command")
        await closing
    assert await redis.lrange(producer.to_key("waiting"), 0, -1) == [large.id]
    assert len(started.calls) == 1


async def _is_active(redis: Any, queue: Queue, job_id: str) -> bool:
    return job_id in await redis.lrange(queue.to_key("active"), 0, -1)


async def _has_active(redis: Any, queue: Queue, count: int) -> bool:
    return bool(await redis.llen(queue.to_key("active")) == count)


async def test_a_take_does_not_bring_the_large_jobs_of_other_workers(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """which are among the newest in active; it still finds its own"""
    producer = await make_queue(is_worker=False).ready()
    async with Relay(url) as relay:
        worker = await make_queue(redis=relay.url, get_events=False).ready()
        for _ in range(2):
            large = await producer.create_job(LARGE).save()
            await redis.lmove(producer.to_key("waiting"), producer.to_key("active"), "RIGHT", "LEFT")
        holding = Holding(relay)
        worker.process(echo, 2)
        small = [await producer.create_job(number).save() for number in range(3)]
        assert [await job.result(10_000) for job in small] == [0, 1, 2]
        assert holding.held.calls == []
        await worker.close()
    assert await redis.lindex(producer.to_key("active"), 0) == large.id


async def test_a_take_brings_no_more_after_64_kb(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """the others wait for another take, or another worker"""
    producer = await make_queue(is_worker=False).ready()
    async with Relay(url) as relay:
        worker = await make_queue(redis=relay.url, get_events=False).ready()
        jobs = [await producer.create_job("x" * 30_000).save() for _ in range(6)]
        relay.hold("take")
        worker.process(echo, 6)
        await until(lambda: _has_active(redis, producer, 3))  # one by the take, the others in one step
        relay.release("take")
        for job in jobs:
            assert len(await job.result(10_000)) == 30_000
        await worker.close()
