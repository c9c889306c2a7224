"""Hostile data, or a listener that raises, cost one error: no connection, no endless wait, no other job's event."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from beequeue import (
    CommandError,
    ConnectionLost,
    Job,
    JobFailed,
    LateFinish,
    ListenerFailed,
    OutcomeNotRecorded,
    OutcomeUnknown,
    UnreadableData,
)
from beequeue.producer.tracker import Tracker
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import soon
from tests.relay import Relay

DEEP = "[" * 990 + "]" * 990


@pytest.mark.parametrize("event", ["failed", "retrying"])
async def test_a_failure_with_a_deep_message_cuts_nothing(make_queue: MakeQueue, redis: Any, event: str) -> None:
    queue = await make_queue(is_worker=False).ready()
    told = Seen()
    queue.on(f"job {event}", told)
    queue.on("job succeeded", told)
    await redis.publish(queue.to_key("events"), f'{{"id":"99","event":"{event}","data":{DEEP}}}')
    await redis.publish(queue.to_key("events"), '{"id":"7","event":"succeeded","data":1}')
    (first, second) = await told.reaches(2)
    assert (first[0], type(first[1]), second) == ("99", JobFailed, ("7", 1))
    assert (await queue.create_job({}).save()).id == "1"
    assert queue.reconnects == 0


async def test_a_fault_in_reading_a_message_cuts_nothing(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """whatever the fault is"""
    queue = await make_queue(is_worker=False).ready()

    def read(self: Tracker, payload: bytes) -> None:
        raise KeyError("nobody expects this")

    monkeypatch.setattr(Tracker, "read", read)
    await redis.publish(queue.to_key("events"), "x")
    await until(lambda: make_queue.errors)
    assert [str(error) for error in make_queue.claim(UnreadableData)] == [
        "a message on the events channel: KeyError: 'nobody expects this'; b'x'"
    ]
    assert queue.reconnects == 0


@pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])
async def test_a_failed_job_with_a_deep_stack_trace_is_fetched(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    queue = await make_queue(is_worker=False, ordered_events=ordered).ready()
    entry = '{"data":1,"options":{"timestamp":1,"stacktraces":[' + DEEP + ']},"status":"failed"}'
    await redis.hset(queue.to_key("jobs"), "x", entry)
    await redis.sadd(queue.to_key("failed"), "x")
    async with asyncio.timeout(5):
        job = await queue.get_job("x")
        assert job is not None
        with pytest.raises(JobFailed, match="^$"):
            await job.result()


async def test_a_job_that_cannot_be_decoded_for_another_reason_raises(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """instead of waiting without end"""
    queue = await make_queue(is_worker=False).ready()
    await redis.hset(queue.to_key("jobs"), "x", "{}")

    def decode(*_: Any) -> Job:
        raise KeyError("nobody expects this")

    monkeypatch.setattr(Job, "decode", decode)
    async with asyncio.timeout(5):
        with pytest.raises(UnreadableData, match="^the stored job x cannot be read: KeyError: 'nobody expects this'$"):
            await queue.get_job("x")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("raised", [Unspeakable, GeneratorExit])
async def test_a_listener_takes_no_other_jobs_events_with_it(
    make_queue: MakeQueue, redis: Any, raised: type[BaseException]
) -> None:
    """when messages come in one read, even if the exception has no text or is no `Exception`"""
    queue = await make_queue(is_worker=False).ready()
    first, second = await queue.create_job(1).save(), await queue.create_job(2).save()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # asyncio reports a GeneratorExit

    def listener(result: Any) -> None:
        raise raised

    first.on("succeeded", listener)
    async with redis.pipeline(transaction=True) as pipeline:
        for job in (first, second):
            pipeline.publish(queue.to_key("events"), f'{{"id":"{job.id}","event":"succeeded","data":{job.id}}}')
        await pipeline.execute()
    assert await second.result(5_000) == 2
    failures = make_queue.claim(ListenerFailed)
    assert [str(failure) for failure in failures] == (
        ["a listener of 'succeeded of job 1' raised Unspeakable: Unspeakable"] if raised is Unspeakable else []
    )


@pytest.mark.parametrize("role", ["take", "event", "command"])
@pytest.mark.parametrize("reply", [b"+OK\r\n", b":1\r\n", b"*1\r\n:1\r\n"])
async def test_a_reply_too_many_ends_its_connection_alone(make_queue: MakeQueue, url: str, role: str, reply: bytes) -> None:
    """it gives each later reply to another command; the next connection works"""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, reconnect=soon, stall_interval=500).ready()
        queue.process(echo, 2)
        await until(lambda: any(b"BRPOPLPUSH" in line.said for line in relay.lines))
        await next(line for line in relay.lines if line.role == role).pass_back(reply)
        for number in range(3):
            async with asyncio.timeout(10):
                with suppress(ConnectionLost, OutcomeUnknown):
                    job = await queue.create_job(number).save()
                    assert await job.result() == number
        async with asyncio.timeout(10):
            assert await (await queue.create_job("next").save()).result() == "next"
        await queue.close()
    for kind in (ConnectionLost, OutcomeNotRecorded, LateFinish, CommandError):
        make_queue.claim(kind)
