"""A worker's slots: each is given back however its job ends, and what takes jobs knows when to stop."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import CommandError, ConnectionLost, Job, OperationTimedOut, OutcomeNotRecorded, Queue
from beequeue.store import SCRIPTS
from harness.server import Server
from tests.conftest import MakeQueue, Seen, until
from tests.observe import Spoken, soon, takes_no_more
from tests.relay import Relay


async def hold(queue: Queue, data: Any = "held") -> tuple[Job, asyncio.Event]:
    """A job that runs, in the only slot, until the event is set; later ones end at once."""
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
    """How many jobs each of the settlements asks for."""
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


async def test_a_fault_of_ours_frees_its_slot(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue(stall_interval=60_000)
    _, gate = await hold(queue)
    assert queue._consumer is not None

    def decide(*_: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("ours")

    monkeypatch.setattr(queue._consumer, "_decide", decide)
    gate.set()
    await until(lambda: make_queue.errors)
    assert await (await queue.create_job("next").save()).result() == "next"
    assert len(make_queue.claim(RuntimeError)) == 1


async def test_a_job_that_is_handed_back_is_asked_after_no_more(make_queue: MakeQueue, redis: Any) -> None:
    """its id leaves `stalling` with `active`"""
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


async def test_the_wait_after_a_refused_take_begins_anew(make_queue: MakeQueue, redis: Any) -> None:
    """when a take has been answered in between"""
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
    """what the lost reply had taken comes back by the stall check; more of them would only be stranded too"""
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
