"""A worker's slots: the end of each job gives its slot back, and the worker stops taking when it must."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

import beequeue
from beequeue import CommandError, ConnectionLost, Job, JobFailed, OperationTimedOut, OutcomeNotRecorded, Queue, QueueClosed
from beequeue.store.scripts import SCRIPTS
from beequeue.worker.attempt import Attempt
from beequeue.worker.consumer import Consumer
from harness.server import Server
from tests.conftest import MakeQueue, Seen, until
from tests.observe import Spoken, soon, takes_no_more
from tests.relay import Line, Relay


async def hold(queue: Queue, data: Any = "held") -> tuple[Job, asyncio.Event]:
    """Returns a job that runs in the only slot until the event is set; later jobs end at once."""
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> Any:
        started()
        await gate.wait()
        return job.data

    job = await queue.create_job(data).save()
    queue.process(handler)
    await started.reaches(1)
    return job, gate


def takes(spoken: Spoken) -> list[bytes]:
    """Returns how many jobs each of the settlements asks for."""
    script = SCRIPTS["finish"].sha.encode()
    return [command[3 + int(command[2])] for _, command in spoken.commands if command[:2] == [b"EVALSHA", script]]


async def test_a_settlement_that_is_refused_as_a_whole_frees_its_slot(own_server: Server, make_queue: MakeQueue) -> None:
    queue = make_queue(redis=own_server.url, stall_interval=60_000)
    _, gate = await hold(queue)
    redis: Any
    async with Redis.from_url(own_server.url) as redis:
        await redis.execute_command("ACL SETUSER default -evalsha")
        gate.set()
        await until(lambda: make_queue.errors)
        await redis.execute_command("ACL SETUSER default +evalsha")
    assert await (await queue.create_job("next").save()).result() == "next"
    make_queue.claim(CommandError)
    assert len(make_queue.claim(OutcomeNotRecorded)) == 1


async def test_a_fault_in_the_package_frees_its_slot(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """its job fails for good, and the error names it"""
    queue = make_queue(stall_interval=60_000)
    job, gate = await hold(queue)
    assert queue._consumer is not None

    def decide(*_: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("ours")

    monkeypatch.setattr(queue._consumer, "_decide", decide)
    gate.set()
    message = f"job {job.id} fails for good: its settlement cannot be made: RuntimeError: ours"
    with pytest.raises(JobFailed) as failed:
        await job.result()
    assert str(failed.value) == message
    assert await job.is_in_set("failed")
    assert await (await queue.create_job("next").save()).result() == "next"
    assert [str(error) for error in make_queue.errors] == [message]
    make_queue.errors.clear()


async def test_a_fault_in_the_package_when_a_take_ends_runs_no_job_twice(
    make_queue: MakeQueue,
) -> None:
    """the connection is opened again, and the worker goes on"""
    queue, ran = make_queue(get_events=False, reconnect=soon, stall_interval=60_000), Seen()
    queue.process(lambda job: ran(job.id), 2)
    await until(lambda: queue._consumer and queue._consumer._exchange._take)
    assert queue._consumer is not None
    exchange = queue._consumer._exchange
    begin = exchange._begin

    def begin_and_fail(attempts: list[Attempt]) -> None:
        exchange._begin = begin
        begin(attempts)
        raise RuntimeError("ours")

    exchange._begin = begin_and_fail
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    await queue.create_job("x").save()
    await until(lambda: make_queue.claim(ConnectionLost))
    await queue.create_job("y").save()
    assert await ran.reaches(2) == [("1",), ("2",)]
    await until(lambda: queue.running == 0)
    assert exchange._free == 2


async def test_a_job_that_is_handed_back_leaves_stalling(make_queue: MakeQueue, redis: Any) -> None:
    """in the step in which it leaves `active`"""
    queue = make_queue(stall_interval=60_000)
    job, _ = await hold(queue)
    await redis.sadd(queue.to_key("stalling"), job.id)
    with pytest.raises(OperationTimedOut):
        await queue.close(1)
    make_queue.queues.remove(queue)
    other = make_queue(is_worker=False)
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == [job.id]
    assert not await redis.exists(queue.to_key("stalling"), queue.to_key("active"))
    await other.close()


async def test_the_wait_after_a_refused_take_starts_again_from_its_shortest(make_queue: MakeQueue, redis: Any) -> None:
    """when a take was answered in between"""
    queue = make_queue(initial_redis_failure_retry_delay=10)
    times: list[float] = []
    queue.on("error", lambda error: times.append(asyncio.get_running_loop().time()))
    await redis.set(queue.to_key("waiting"), "no list")
    started, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    queue.process(handler)
    await until(lambda: len(times) >= 6)  # the next wait is 320 ms
    await redis.delete(queue.to_key("waiting"))
    await queue.create_job({}).save()
    await started.reaches(1)
    times.clear()
    await redis.set(queue.to_key("waiting"), "no list")
    gate.set()
    await until(lambda: len(times) >= 3)  # the settlement's take, and two more
    assert times[2] - times[1] < 0.25
    await redis.delete(queue.to_key("waiting"))
    make_queue.claim(CommandError)


async def test_a_closing_worker_takes_nothing_with_its_last_settlement(make_queue: MakeQueue, url: str) -> None:
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, get_events=False, stall_interval=60_000)
        _, gate = await hold(queue)
        spoken = Spoken(relay)
        closing = asyncio.create_task(queue.close())
        await until(partial(takes_no_more, queue))
        gate.set()
        await closing
        assert takes(spoken) == [b"0"]


async def test_a_repeated_settlement_takes_nothing(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """the stall check brings back the jobs of the lost reply; more jobs would only be stranded too"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, get_events=False, reconnect=soon, stall_interval=60_000)
        job, gate = await hold(queue)
        spoken = Spoken(relay)
        relay.hold("command")
        gate.set()
        await until(lambda: redis.sismember(queue.to_key("succeeded"), job.id))
        next(line for line in relay.lines if line.role == "command").cut()
        relay.release("command")
        await until(lambda: queue.reconnects and queue.running == 0 and len(takes(spoken)) == 2)
        assert takes(spoken) == [b"1", b"0"]
        make_queue.claim(ConnectionLost)
        await queue.close()


class FirstRead:
    """Holds back a relay's reply to the first script that takes jobs without a blocking take."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.spoken = Spoken(relay)
        self._hear = relay.said_on
        relay.said_on = self._hold

    def _hold(self, line: Line, data: bytes) -> None:
        self._hear(line, data)
        if self.asked:
            self.relay.hold("command")
            self.relay.said_on = self._hear

    @property
    def asked(self) -> list[bytes]:
        """How many jobs each of these scripts asks for."""
        script = SCRIPTS["take"].sha.encode()
        on_commands = [command for role, command in self.spoken.commands if role == "command"]
        return [command[-2] for command in on_commands if command[:2] == [b"EVALSHA", script]]


async def test_a_repeated_read_takes_nothing(own_server: Server, make_queue: MakeQueue) -> None:
    """the stall check brings back the jobs of the lost reply"""
    redis: Any
    async with Relay(own_server.url) as relay, Redis.from_url(own_server.url) as redis:
        queue = make_queue(
            redis=relay.url, get_events=False, reconnect=soon, initial_redis_failure_retry_delay=10, stall_interval=60_000
        )
        await queue.save_all(queue.create_job(number) for number in range(4))
        read = FirstRead(relay)
        await redis.config_set("maxmemory", 1)
        queue.process(Seen())
        await until(lambda: read.asked and redis.llen(queue.to_key("active")))
        await redis.delete(queue.to_key("waiting"))
        await redis.config_set("maxmemory", 0)
        next(line for line in relay.lines if line.role == "command").cut()
        relay.release("command")
        await until(lambda: len(read.asked) >= 2)
        assert read.asked[:2] == [b"1", b"0"]
        make_queue.claim(ConnectionLost)
        make_queue.claim(CommandError)
        await queue.close()


async def test_a_read_on_a_closed_connection_ends_the_taking(own_server: Server, make_queue: MakeQueue) -> None:
    """the owner of the shared connection has closed it: more takes would strand more jobs"""
    redis: Any
    async with Redis.from_url(own_server.url) as redis:
        shared = await beequeue.connect(own_server.url)
        queue = await make_queue(redis=shared, initial_redis_failure_retry_delay=10).ready()
        ran, others = Seen(), Seen()
        await redis.config_set("maxmemory", 1)
        queue.process(ran, 2)
        await until(lambda: make_queue.errors)
        await shared.close()
        await until(lambda: queue._consumer is not None and queue._consumer._exchange.cut_off)
        await redis.config_set("maxmemory", 0)
        other = make_queue(redis=own_server.url)
        other.process(others)
        await other.save_all(other.create_job(number) for number in range(4))
        await others.reaches(4)
        assert ran.calls == []
        make_queue.claim(CommandError)
        make_queue.claim(QueueClosed)
        make_queue.claim(ConnectionLost)
        make_queue.queues.remove(queue)
        await queue.close(1_000)


async def test_a_read_under_way_when_its_connection_is_closed_ends_the_taking(
    own_server: Server, make_queue: MakeQueue
) -> None:
    redis: Any
    async with Relay(own_server.url) as relay, Redis.from_url(own_server.url) as redis:
        shared = await beequeue.connect(relay.url)
        queue = await make_queue(redis=shared, get_events=False, initial_redis_failure_retry_delay=10).ready()
        await queue.save_all(queue.create_job(number) for number in range(4))
        await redis.config_set("maxmemory", 1)
        read = FirstRead(relay)
        queue.process(Seen())
        await until(lambda: read.asked)
        await redis.config_set("maxmemory", 0)
        await shared.close()
        assert queue._consumer is not None
        assert queue._consumer._exchange.cut_off
        make_queue.claim(CommandError)
        make_queue.claim(QueueClosed)
        make_queue.claim(ConnectionLost)
        make_queue.queues.remove(queue)
        await queue.close(1_000)


async def test_a_close_ends_the_wait_after_a_full_redis(own_server: Server, make_queue: MakeQueue) -> None:
    """it takes nothing when the wait would be over"""
    redis: Any
    async with Relay(own_server.url) as relay, Redis.from_url(own_server.url) as redis:
        queue = make_queue(redis=relay.url, get_events=False, initial_redis_failure_retry_delay=100)
        read = FirstRead(relay)
        gate, started = asyncio.Event(), Seen()

        async def handler(job: Job) -> None:
            started()
            await gate.wait()

        await queue.create_job("held").save()
        queue.process(handler, 2)
        await started.reaches(1)
        await redis.config_set("maxmemory", 1)
        assert queue._consumer is not None
        exchange = queue._consumer._exchange
        for client in await redis.client_list():  # ends its open take; the next one is refused
            if client["cmd"] == "brpoplpush":
                await redis.client_unblock(int(client["id"]))
        await until(lambda: exchange._refusal_timer)
        timer = exchange._refusal_timer
        assert timer is not None
        closing = asyncio.create_task(queue.close())
        await until(partial(takes_no_more, queue))
        await until(lambda: asyncio.get_running_loop().time() > timer.when() + 0.05)
        assert read.asked == []
        await redis.config_set("maxmemory", 0)
        gate.set()
        await closing
        make_queue.claim(CommandError)


async def test_an_attempt_that_never_began_does_not_count_as_running(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a close came before its turn: its job goes back"""
    monkeypatch.setattr(Consumer, "_start", lambda self, attempt, job: None)
    queue = make_queue(get_events=False)
    await queue.create_job("x").save()
    queue.process(Seen(), 1)
    await until(lambda: queue.running == 1)
    with pytest.raises(OperationTimedOut):
        await queue.close(1)
    make_queue.queues.remove(queue)
    make_queue(is_worker=False, get_events=False)
    assert queue.running == 0
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]


async def test_the_read_that_follows_a_take_is_bounded(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """it reads no job after one that fills its limit of bytes"""
    heard = 0

    async def count(line: Line, data: bytes) -> bytes:
        nonlocal heard
        heard += len(data) if line.role == "take" else 0
        return data

    async with Relay(url) as relay:
        queue, done = make_queue(redis=relay.url, get_events=False, stall_interval=60_000), Seen()
        producer = make_queue(is_worker=False, get_events=False)
        for job_id in ("a", "b", "c"):
            await redis.hset(queue.to_key("jobs"), job_id, producer.create_job("x" * 100_000).to_data())
            await redis.lpush(queue.to_key("active"), job_id)
        queue.on("succeeded", done)
        queue.process(Seen())
        await until(lambda: any(b"BRPOPLPUSH" in line.said for line in relay.lines))
        relay.distort = count
        await producer.create_job("y" * 5_000).save()
        await done.reaches(1)
        assert 5_000 < heard < 50_000
        await queue.close()


async def test_jobs_that_come_together_are_reported_before_the_first_one_begins(make_queue: MakeQueue) -> None:
    """whose handler may block the loop"""
    queue, begun = make_queue(), Seen()

    async def handler(job: Job) -> None:
        assert queue._consumer is not None
        begun(sorted(attempt.id for attempt in queue._consumer._exchange.reported()))

    await queue.save_all(queue.create_job(number) for number in range(5))
    queue.process(handler, 5)
    assert (await begun.reaches(5))[0] == (["1", "2", "3", "4", "5"],)


async def test_a_job_that_a_settlement_brings_is_reported_before_listeners_are_called(make_queue: MakeQueue) -> None:
    """a listener may block the loop"""
    queue, told = make_queue(), Seen()

    def listen(job: Job, result: Any) -> None:
        assert queue._consumer is not None
        told(job.id, sorted(attempt.id for attempt in queue._consumer._exchange.reported()))

    queue.on("succeeded", listen)
    await queue.save_all(queue.create_job(number) for number in range(2))
    queue.process(Seen())
    assert await told.reaches(2) == [("1", ["2"]), ("2", [])]
