"""Redis comes back empty and gives its ids again: an attempt from before settles no job but its own."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from redis.asyncio import Redis

import beequeue.worker.exchange
from beequeue import ConnectionLost, Job, LateFinish, OperationTimedOut, Queue, connect
from beequeue.worker.attempt import Attempt
from harness.server import Server
from tests.conftest import MakeQueue, Seen, until
from tests.observe import soon, takes_no_more
from tests.relay import Relay


class Stage:
    """Handlers that wait until the test lets them end, by the data of their job."""

    def __init__(self) -> None:
        self.started = Seen()
        self.gates: defaultdict[Any, asyncio.Event] = defaultdict(asyncio.Event)

    async def __call__(self, job: Job) -> Any:
        self.started(job.data)
        await self.gates[job.data].wait()
        return job.data


async def wipe(server: Server, *queues: Queue) -> None:
    """Restarts Redis, which loses everything; returns when every queue is back."""
    before = [queue.reconnects for queue in queues]
    server.stop()
    server.start()
    await until(lambda: all(queue.reconnects >= count + 2 for queue, count in zip(queues, before, strict=True)))


@pytest.mark.parametrize("shared", [False, True], ids=["own connection", "shared connection"])
async def test_an_old_attempt_leaves_a_new_job_with_its_id_alone(
    own_server: Server, make_queue: MakeQueue, shared: bool
) -> None:
    """it ends as a late finish; the new job is reported by its own worker alone, and keeps its own result"""
    url, stage = own_server.url, Stage()
    client = await connect(url, reconnect=soon) if shared else None
    first = make_queue(redis=client or url, get_events=False, reconnect=soon, stall_interval=40, stalled_check_interval=0)
    await first.ready()
    second = make_queue(redis=url, get_events=False, stall_interval=60_000, reconnect=soon)
    producer = await make_queue(redis=url, is_worker=False, reconnect=soon).ready()
    old = await producer.create_job("old").save()
    first.process(stage)
    await stage.started.reaches(1)
    await wipe(own_server, first, producer)
    job = await producer.create_job("new").save()
    assert job.id == old.id
    second.process(stage)
    await stage.started.reaches(2)
    async with Redis.from_url(url, decode_responses=True) as redis:
        await redis.sadd(producer.to_key("stalling"), str(job.id))
        assert first._consumer is not None
        heartbeat = first._consumer._heartbeat
        for _ in range(2):  # the second report comes when the first has been answered
            sign = heartbeat._sign_at
            await until(lambda sign=sign: heartbeat._sign_at > sign)  # type: ignore[misc]
        stage.gates["old"].set()
        await until(lambda: first.late_finishes)
        assert await redis.lrange(producer.to_key("active"), 0, -1) == [job.id]
        assert await redis.smembers(producer.to_key("stalling")) == {job.id}
    stage.gates["new"].set()
    assert await job.result(8_000) == "new"
    assert len(make_queue.claim(LateFinish)) == 1
    make_queue.claim(ConnectionLost)
    again = await producer.create_job("again").save()
    stage.gates["again"].set()
    assert await again.result(8_000) == "again"
    if client is not None:
        await first.close()
        await client.close()


async def test_a_settlement_that_waits_for_redis_is_withheld(
    own_server: Server, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """the handler ended while Redis was away; when it is back, another worker runs the new job. Redis owes no answer"""
    monkeypatch.setattr(beequeue.worker.exchange, "MOST_UNANSWERED", 1)
    stage = Stage()
    async with Relay(own_server.url) as relay:
        worker = await make_queue(redis=relay.url, get_events=False, reconnect=soon).ready()
        other = make_queue(redis=own_server.url, get_events=False, reconnect=soon)
        producer = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
        await producer.create_job("old").save()
        worker.process(stage)
        await stage.started.reaches(1)
        relay.lead_to("unix:///nowhere/redis.sock")
        own_server.stop()
        await until(
            lambda: (
                worker.client.connection.link is None
                and worker._connections.takes is not None
                and worker._connections.takes.link is None
            )
        )
        stage.gates["old"].set()
        await until(lambda: worker.client.connection._waiting)
        own_server.start()
        job = await producer.create_job("new").save()
        other.process(stage)
        await stage.started.reaches(2)
        relay.lead_to(own_server.url)
        await until(lambda: worker.late_finishes == 1)
        assert await producer.check_health() == (0, 1, 0, 0, 0, 1)
        stage.gates["new"].set()
        assert await job.result(8_000) == "new"
        assert len(make_queue.claim(LateFinish)) == 1
        make_queue.claim(ConnectionLost)
        await other.close()
        stage.gates["next"].set()
        assert await (await producer.create_job("next").save()).result(8_000) == "next"
        await worker.close()


async def test_one_of_several_attempts_that_end_together_is_withheld(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """the others are settled, though they shared its command"""
    stage = Stage()
    async with Relay(url) as relay:
        worker = await make_queue(redis=relay.url, get_events=False, reconnect=soon).ready()
        producer = await make_queue(is_worker=False).ready()
        jobs = [producer.create_job(data) for data in ("first", "stranger", "third")]
        await producer.save_all(jobs)
        worker.process(stage, 3)
        await stage.started.reaches(3)
        relay.lead_to("unix:///nowhere/redis.sock")
        for line in relay.lines:
            line.cut()
        await until(
            lambda: (
                worker.client.connection.link is None
                and worker._connections.takes is not None
                and worker._connections.takes.link is None
            )
        )
        for job in jobs:
            stage.gates[job.data].set()
        await until(lambda: len(worker.client.connection._waiting) == 1)
        another = b'{"data":"new","options":{"timestamp":7,"stacktraces":[]},"status":"created","progress":0}'
        await redis.hset(producer.to_key("jobs"), "2", another)
        relay.lead_to(url)
        assert [await jobs[0].result(8_000), await jobs[2].result(8_000)] == ["first", "third"]
        await until(lambda: worker.late_finishes == 1)
        assert await redis.lrange(producer.to_key("active"), 0, -1) == ["2"]
        assert (await redis.hget(producer.to_key("jobs"), "2")).encode() == another
        assert worker.running == 0
        assert len(make_queue.claim(LateFinish)) == 1
        make_queue.claim(ConnectionLost)
        await worker.close()


async def test_a_command_built_again_after_a_lost_reply_leaves_the_next_attempt_alone(
    make_queue: MakeQueue, url: str, redis: Any
) -> None:
    """two failures shared a command; since then one id was reused, and another worker runs the other job again"""
    both, again = asyncio.Event(), asyncio.Event()
    started, retrying = Seen(), Seen()

    async def fail(job: Job) -> None:
        started()
        await both.wait()
        raise ValueError

    async def succeed(job: Job) -> str:
        started()
        await again.wait()
        return "done"

    async with Relay(url) as relay:
        worker = await make_queue(redis=relay.url, get_events=False, reconnect=soon).ready()
        worker.on("retrying", lambda job, error: retrying(job.id, job.uncertain))
        producer = await make_queue(is_worker=False).ready()
        jobs = [producer.create_job(data).retries(3) for data in ("mine", "stranger")]
        await producer.save_all(jobs)
        worker.process(fail, 2)
        await started.reaches(2)
        for role in ("command", "take"):
            relay.hold(role)
        both.set()
        await until(lambda: redis.llen(producer.to_key("waiting")))
        make_queue(get_events=False).process(succeed)
        await started.reaches(3)
        await redis.lrem(producer.to_key("waiting"), 0, "2")
        another = b'{"data":"new","options":{"timestamp":7,"stacktraces":[]},"status":"created","progress":0}'
        await redis.hset(producer.to_key("jobs"), "2", another)
        for line in relay.lines:
            line.cut()
        for role in ("command", "take"):
            relay.release(role)
        assert sorted(await retrying.reaches(2)) == [("1", True), ("2", True)]
        assert await producer.check_health() == (0, 1, 0, 0, 0, 2)
        again.set()
        assert await jobs[0].result(8_000) == "done"
        assert await producer.check_health() == (0, 0, 1, 0, 0, 2)
        make_queue.claim(ConnectionLost)
        await worker.close()


async def test_a_worker_that_closes_hands_back_only_its_own_jobs(own_server: Server, make_queue: MakeQueue) -> None:
    stage = Stage()
    first = await make_queue(redis=own_server.url, get_events=False, reconnect=soon).ready()
    second = make_queue(redis=own_server.url, get_events=False)
    producer = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    await producer.create_job("old").save()
    first.process(stage)
    await stage.started.reaches(1)
    await wipe(own_server, first, producer)
    job = await producer.create_job("new").save()
    second.process(stage)
    await stage.started.reaches(2)
    make_queue.queues.remove(first)
    with pytest.raises(OperationTimedOut):
        await first.close(1)
    assert await producer.check_health() == (0, 1, 0, 0, 0, 1)
    stage.gates["new"].set()
    assert await job.result(8_000) == "new"
    make_queue.claim(ConnectionLost)


async def test_close_ends_with_the_handler_of_a_job_that_is_gone(own_server: Server, make_queue: MakeQueue) -> None:
    """it does not wait until its time-out for an answer that never comes"""
    stage = Stage()
    worker = await make_queue(redis=own_server.url, get_events=False, reconnect=soon).ready()
    await worker.create_job("old").save()
    worker.process(stage)
    await stage.started.reaches(1)
    await wipe(own_server, worker)
    make_queue.queues.remove(worker)
    async with asyncio.timeout(8):
        closing = asyncio.create_task(worker.close(30_000))
        await until(lambda: takes_no_more(worker))
        stage.gates["old"].set()
        await closing
    assert len(make_queue.claim(LateFinish)) == 1
    make_queue.claim(ConnectionLost)


async def test_a_job_that_is_still_there_is_settled(own_server: Server, make_queue: MakeQueue) -> None:
    """a lost connection to a Redis that lives, or a refusal to tell, changes nothing"""
    stage = Stage()
    worker = await make_queue(redis=own_server.url, get_events=False, reconnect=soon).ready()
    producer = await make_queue(redis=own_server.url, is_worker=False).ready()
    jobs = [producer.create_job(data) for data in ("here", "refused")]
    await producer.save_all(jobs)
    worker.process(stage, 2)
    await stage.started.reaches(2)
    async with Redis.from_url(own_server.url) as redis:
        for job, refuse in zip(jobs, (False, True), strict=True):
            if refuse:
                await redis.rename(producer.to_key("jobs"), "away")
                await redis.set(producer.to_key("jobs"), "no hash")
            before = worker.reconnects
            assert worker._connections.takes is not None
            for connection in (worker._connections.takes, worker.client.connection):
                assert connection.link is not None
                connection.link.drop("by the test")
            await until(lambda before=before: worker.reconnects == before + 2)  # type: ignore[misc]
            if refuse:
                await redis.rename("away", producer.to_key("jobs"))
            stage.gates[job.data].set()
            assert await job.result(8_000) == job.data
    assert worker.late_finishes == 0
    make_queue.claim(ConnectionLost)


async def test_the_slot_of_an_old_attempt_is_given_back(own_server: Server, make_queue: MakeQueue) -> None:
    """a worker with one slot goes on"""
    stage = Stage()
    queue = make_queue(redis=own_server.url, get_events=False, reconnect=soon)
    await queue.create_job("old").save()
    queue.process(stage)
    await stage.started.reaches(1)
    await wipe(own_server, queue)
    await queue.create_job("next").save()
    stage.gates["old"].set()
    assert await stage.started.reaches(2) == [("old",), ("next",)]
    stage.gates["next"].set()
    await until(lambda: queue.running == 0)
    assert len(make_queue.claim(LateFinish)) == 1
    make_queue.claim(ConnectionLost)


def test_the_time_of_creation_identifies_a_job() -> None:
    taken = b'{"data":1,"options":{"timestamp":7,"stacktraces":[]},"status":"created","progress":0}'
    attempt = Attempt("1", taken)
    assert attempt.is_stored_as(taken)
    assert attempt.is_stored_as(taken.replace(b"created", b"retrying"))
    assert not attempt.is_stored_as(taken.replace(b"7", b"8"))
    assert not attempt.is_stored_as(b"no job")
    assert not attempt.is_stored_as(None)
    assert Attempt("1", b"no job").is_stored_as(b"no job")
