"""The limit of stalls: a job that loses its worker too often fails, with a reason; each job has a count of its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import CommandError, Job, JobFailed, JobStalled, OperationTimedOut, Queue, UnreadableData
from beequeue.job import now_ms
from beequeue.store.store import STALLS_KEPT_MS, Taken
from harness.server import Server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import assert_says

DEEP = "[" * 1_000 + "]" * 1_000
"""Nested so deeply that some Pythons can read it, but not write it."""


async def lose(redis: Any, queue: Queue) -> int:
    """Takes the next job like a worker that then goes silent; returns the result of the check that finds it."""
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    return await find(redis, queue)


async def find(redis: Any, queue: Queue) -> int:
    """Makes two effective checks."""
    for _ in range(2):
        await redis.delete(queue.to_key("stallBlock"))
        found = await queue.check_stalled_jobs()
    return found


async def checked(queue: Queue) -> tuple[list[str], list[Taken]]:
    """Returns the ids that a check moves, and the jobs that have stalled too often, without settling them."""
    moved, often = [], []
    async for some_moved, some_often in queue._store.check_stalled(5_000, 0):
        moved += some_moved
        often += some_often
    return moved, often


async def counts(redis: Any, queue: Queue) -> dict[str, int]:
    return {job_id: int(stalls.split()[0]) for job_id, stalls in (await redis.hgetall(queue.to_key("stalls"))).items()}


@pytest.mark.parametrize(("limit", "times"), [(0, "0 times"), (1, "1 time"), (3, "3 times")])
async def test_a_job_that_stalls_too_often_fails(make_queue: MakeQueue, redis: Any, limit: int, times: str) -> None:
    """QK-35: like any other failure it is stored, published and told to listeners, however many retries it has"""
    queue = make_queue(max_stalls=limit)
    stalled, everywhere, here = Seen(), Seen(), Seen()
    queue.on("stalled", stalled)
    queue.on("job failed", everywhere)
    for event in ("failed", "failed:fatal"):
        queue.on(event, lambda job, error, event=event: here(event, job.id, type(error), str(error)))
    job = await queue.create_job("x").retries(5).save()
    for number in range(limit):
        assert await lose(redis, queue) == 1
        assert await counts(redis, queue) == {"1": number + 1}
    assert await lose(redis, queue) == 0
    message = f"job 1 stalled more than {times}"
    with pytest.raises(JobFailed) as caught:
        await job.result()
    assert_says(caught.value, message)
    assert [(job_id, str(error)) for job_id, error in everywhere.calls] == [("1", message)]
    assert here.calls == [(event, "1", JobStalled, message) for event in ("failed", "failed:fatal")]
    assert stalled.calls == [("1",)] * limit
    entry = json.loads(await redis.hget(queue.to_key("jobs"), "1"))
    assert (entry["status"], entry["options"]["retries"]) == ("failed", 5)
    assert entry["options"]["stacktraces"] == [f"beequeue.errors.JobStalled: {message}\n"]
    assert await queue.check_health() == (0, 0, 0, 1, 0, 1)
    await job.retry()
    assert await lose(redis, queue) == bool(limit)  # its count starts again
    assert await counts(redis, queue) == {"1": 1}


@pytest.mark.parametrize("limit", [None, 0])
async def test_an_ended_job_that_is_still_in_stalling_has_not_stalled(
    make_queue: MakeQueue, redis: Any, limit: int | None
) -> None:
    """ST-05: a job that is not in `active` has no worker to lose"""
    queue = make_queue(is_worker=False, max_stalls=limit)
    stalled = Seen()
    queue.on("stalled", stalled)
    await queue.create_job("x").save()
    await redis.lpop(queue.to_key("waiting"))
    await redis.sadd(queue.to_key("succeeded"), "1")
    await redis.sadd(queue.to_key("stalling"), "1")
    assert await queue.check_stalled_jobs() == 0
    assert await queue.check_health() == (0, 0, 1, 0, 0, 1)
    assert not await redis.exists(queue.to_key("stalling"))
    assert stalled.calls == []


async def test_a_failure_by_stalls_may_leave_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """with remove_on_failure; without send_events it is not published"""
    queue = make_queue(max_stalls=0, remove_on_failure=True, send_events=False)
    everywhere = Seen()
    queue.on("job failed", everywhere)
    await queue.create_job("x").save()
    assert await lose(redis, queue) == 0
    await redis.delete(queue.to_key("stallBlock"))
    await queue.check_stalled_jobs()
    assert not await redis.exists(*(queue.to_key(key) for key in ("jobs", "failed", "active", "stalling", "stalls")))
    assert everywhere.calls == []
    queue.jobs = {}


async def test_without_a_limit_nothing_is_counted(make_queue: MakeQueue, redis: Any) -> None:
    queue = make_queue()
    await queue.create_job("x").save()
    assert await lose(redis, queue) == 1
    assert not await redis.exists(queue.to_key("stalls"))


async def test_other_jobs_go_on(make_queue: MakeQueue, redis: Any) -> None:
    """of two jobs that stall together one has stalled before; with more jobs than a command takes"""
    queue = make_queue(max_stalls=1)
    await queue.create_job("bad").save()
    assert await lose(redis, queue) == 1
    assert await queue.save_all(queue.create_job(number) for number in range(1_025)) == {}
    await redis.rename(queue.to_key("waiting"), queue.to_key("active"))
    assert await find(redis, queue) == 1_025
    assert await queue.check_health() == (1_025, 0, 0, 1, 0, 1_026)
    assert set((await counts(redis, queue)).values()) == {1, 2}


async def settled(make_queue: MakeQueue) -> None:
    """The job ended, and is retried by hand."""
    worker = make_queue(stall_interval=60_000)
    job = await worker.get_job("job")
    assert job is not None
    worker.process(echo)
    await job.result()
    await worker.close()
    other = await make_queue(is_worker=False).get_job("job")
    assert other is not None
    await other.retry()


async def retried(make_queue: MakeQueue) -> None:
    """An attempt failed, and another will come."""
    worker = make_queue(stall_interval=60_000)

    async def fails_once(job: Job) -> None:
        if job.options["retries"]:
            raise ValueError("once")
        await asyncio.Event().wait()

    retrying = Seen()
    worker.on("job retrying", retrying)
    worker.process(fails_once)
    await retrying.reaches(1)
    await until(lambda: worker.running)
    with pytest.raises(OperationTimedOut):
        await worker.close(1)  # hands it back
    make_queue.queues.remove(worker)


async def removed(make_queue: MakeQueue) -> None:
    """Its id is reused."""
    queue, made_at = make_queue(is_worker=False), now_ms()
    await queue.remove_job("job")
    while now_ms() == made_at:
        await asyncio.sleep(0)
    await queue.create_job("x").retries(1).set_id("job").save()


@pytest.mark.parametrize("change", [settled, retried, removed])
async def test_a_count_belongs_to_one_job_and_one_attempt(make_queue: MakeQueue, redis: Any, change: Any) -> None:
    """even before the next check looks at the counts"""
    checker = make_queue(max_stalls=1, stall_interval=60_000, get_events=False)
    await checker.create_job("x").retries(1).set_id("job").save()
    assert await lose(redis, checker) == 1
    await change(make_queue)
    assert await counts(redis, checker) == {"job": 1}
    assert await redis.llen(checker.to_key("waiting")) == 1
    assert await lose(redis, checker) == 1
    assert await counts(redis, checker) == {"job": 1}


async def test_counts_of_ended_jobs_are_dropped(make_queue: MakeQueue, redis: Any) -> None:
    """by the next check; and all counts expire"""
    queue = make_queue(max_stalls=5, stalled_check_interval=0)
    jobs = [queue.create_job("x").set_id(job_id) for job_id in ("done", "removed", "waits")]
    for job in jobs:
        await job.save()
        await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    assert await find(redis, queue) == 3
    assert await counts(redis, queue) == {"done": 1, "removed": 1, "waits": 1}
    assert STALLS_KEPT_MS - 10_000 < await redis.pttl(queue.to_key("stalls")) <= STALLS_KEPT_MS
    await jobs[1].remove()
    await redis.lrem(queue.to_key("waiting"), 0, "waits")
    queue.process(echo)
    await jobs[0].result()
    await redis.delete(queue.to_key("stallBlock"))
    await queue.check_stalled_jobs()
    assert await counts(redis, queue) == {"waits": 1}
    await jobs[2].remove()
    await redis.delete(queue.to_key("stallBlock"))
    await queue.check_stalled_jobs()
    assert not await redis.exists(queue.to_key("stalls"))


async def test_a_checker_that_ended_too_soon_loses_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """a job that has stalled too often stays in `active` until it is settled: the next check finds it again"""
    queue, other = make_queue(max_stalls=0), make_queue(max_stalls=0)
    job = await queue.create_job("x").save()
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    for _ in range(2):
        await redis.delete(queue.to_key("stallBlock"))
        moved, too_often = await checked(queue)
    assert (moved, [taken.id for taken in too_often]) == ([], ["1"])
    assert await redis.lrange(queue.to_key("active"), 0, -1) == ["1"]
    await redis.delete(queue.to_key("stallBlock"))
    assert await (await other.ready()).check_stalled_jobs() == 0
    with pytest.raises(JobFailed, match="^job 1 stalled more than 0 times$"):
        await job.result()


async def test_a_worker_that_settles_in_time_wins(make_queue: MakeQueue, redis: Any) -> None:
    """it was slow, not gone; no event tells of a failure that did not happen"""
    queue = make_queue(max_stalls=0)
    failed = Seen()
    queue.on("failed", failed)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> str:
        started()
        await gate.wait()
        return "done"

    worker = make_queue(stall_interval=60_000, get_events=False)
    worker.process(handler)
    job = await queue.create_job("x").save()
    await started.reaches(1)
    for _ in range(2):
        await redis.delete(queue.to_key("stallBlock"))
        _, too_often = await checked(queue)
    gate.set()
    assert await job.result() == "done"
    await queue._stall_checker._fail(too_often[0])
    assert failed.calls == []
    assert await queue.check_health() == (0, 0, 1, 0, 0, 1)


async def test_a_new_job_with_the_id_of_one_that_stalled_too_often_goes_on(make_queue: MakeQueue, redis: Any) -> None:
    """its data has the same length; it is saved and taken after the old job was found, and before that is settled"""
    queue = await make_queue(max_stalls=0).ready()
    failed = Seen()
    queue.on("failed", failed)
    await queue.create_job("old").set_id("daily").save()
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    found = Taken("daily", (await redis.hget(queue.to_key("jobs"), "daily")).encode())
    await queue.remove_job("daily")
    await queue.create_job("new").set_id("daily").save()
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    await queue._stall_checker._fail(found)
    assert failed.calls == []
    assert (await queue.check_health())[:4] == (0, 1, 0, 0)
    assert '"new"' in await redis.hget(queue.to_key("jobs"), "daily")
    await queue.destroy()


@pytest.mark.parametrize("entry", ["no job", f'{{"data":{DEEP},"options":{{}}}}'], ids=["unreadable", "nested"])
async def test_an_entry_that_cannot_be_written_fails_too(make_queue: MakeQueue, redis: Any, entry: str) -> None:
    queue = await make_queue(max_stalls=0).ready()
    await redis.hset(queue.to_key("jobs"), "1", entry)
    await redis.lpush(queue.to_key("waiting"), "1")
    assert await lose(redis, queue) == 0
    assert await redis.smembers(queue.to_key("failed")) == {"1"}
    assert (DEEP if DEEP in entry else entry) in await redis.hget(queue.to_key("jobs"), "1")
    assert len(make_queue.claim(UnreadableData)) == (entry == "no job")


async def test_an_id_without_data_is_not_counted(make_queue: MakeQueue, redis: Any) -> None:
    queue = await make_queue(max_stalls=0).ready()
    await redis.lpush(queue.to_key("active"), "ghost")
    assert await find(redis, queue) == 1
    assert not await redis.exists(queue.to_key("stalls"))


# --- at maxmemory ----------------------------------------------------------------------------------------------------


async def test_a_full_redis_gets_its_stalled_jobs_back(own_server: Server, make_queue: MakeQueue) -> None:
    """at maxmemory: one is brought back, and one fails"""
    async with Redis.from_url(own_server.url, decode_responses=True) as redis:
        queue = make_queue(redis=own_server.url, max_stalls=1)
        await queue.create_job("x").save()
        await queue.create_job("x").save()
        assert await lose(redis, queue) == 1
        await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "LEFT", "LEFT")
        await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "LEFT", "LEFT")
        await full(redis, queue)
        assert await find(redis, queue) == 1
        assert await queue.check_health() == (1, 0, 0, 1, 0, 2)
        await redis.config_set("maxmemory", 0)
        await queue.destroy()


async def test_a_full_redis_raises_its_delayed_jobs(own_server: Server, make_queue: MakeQueue) -> None:
    """at maxmemory: more than one page of them"""
    async with Redis.from_url(own_server.url, decode_responses=True) as redis:
        queue = await make_queue(redis=own_server.url).ready()
        jobs = [queue.create_job("x").delay_until(now_ms() + 60_000) for _ in range(1_001)]
        assert await queue.save_all(jobs) == {}
        await full(redis, queue)
        assert await queue._store.raise_delayed(now_ms() + 60_001, 0) == (1_001, -1)
        assert await queue.check_health() == (1_001, 0, 0, 0, 0, 1_001)
        await redis.config_set("maxmemory", 0)
        await queue.destroy()


async def full(redis: Any, queue: Queue) -> None:
    """Puts Redis at maxmemory from now on."""
    await redis.config_set("maxmemory", 1)
    with pytest.raises(CommandError, match="^OOM "):
        await queue.create_job({}).save()
