"""Calls under way when their queue closes: what was sent is answered, within the time-out of `close()`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from beequeue import ConnectionLost, Job, OperationTimedOut, Queue, QueueClosed
from beequeue.producer.saver import JOBS_IN_FLIGHT
from harness.server import Server
from tests.conftest import MakeQueue, until
from tests.observe import Spoken, soon
from tests.relay import Relay

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])

LONG_MS = 600_000
"""A time-out that no test waits for."""


def closes(queue: Queue) -> bool:
    """Whether `close()` has begun to refuse calls."""
    return repr(queue).startswith(f"<Queue {queue.name} closed")


async def save_all(queue: Queue) -> Any:
    return await queue.save_all([queue.create_job(number) for number in range(JOBS_IN_FLIGHT + 2)])


CALLS: dict[str, Callable[[Queue, Job], Awaitable[Any]]] = {
    "save": lambda queue, job: queue.create_job({}).save(),
    "save_all, with more than it sends at once": lambda queue, job: save_all(queue),
    "get_job": lambda queue, job: queue.get_job("own"),
    "from_id": lambda queue, job: Job.from_id(queue, "own"),
    "get_jobs": lambda queue, job: queue.get_jobs("succeeded"),
    "remove_job": lambda queue, job: queue.remove_job("own"),
    "retry": lambda queue, job: job.retry(),
    "is_in_set": lambda queue, job: job.is_in_set("waiting"),
    "report_progress": lambda queue, job: job.report_progress(1),
    "clean": lambda queue, job: queue.clean("failed"),
    "check_health": lambda queue, job: queue.check_health(),
    "check_stalled_jobs": lambda queue, job: queue.check_stalled_jobs(),
    "destroy": lambda queue, job: queue.destroy(),
}


@both_orderings
async def test_ten_thousand_saves_in_flight(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """CL-19: Each is stored, and its caller gets the answer."""
    queue = await make_queue(is_worker=False, ordered_events=ordered).ready()
    saving = [asyncio.ensure_future(queue.create_job(number).save()) for number in range(10_000)]
    await asyncio.sleep(0)  # each is sent
    await queue.close()
    assert all(each.done() for each in saving)
    assert len({job.id for job in await asyncio.gather(*saving)}) == 10_000
    assert await redis.llen(queue.to_key("waiting")) == 10_000


@both_orderings
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_in_flight_is_answered(
    make_queue: MakeQueue, url: str, ordered: bool, call: Callable[[Queue, Job], Awaitable[Any]]
) -> None:
    """CL-19: New calls raise while close() waits for it."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        job = await queue.create_job({}).set_id("own").save()
        spoken = Spoken(relay)
        for role in ("event", "command"):
            relay.hold(role)
        calling = asyncio.ensure_future(call(queue, job))
        await until(lambda: spoken.names)
        closing = asyncio.create_task(queue.close(LONG_MS))
        await until(lambda: closes(queue))
        with pytest.raises(QueueClosed):
            await queue.create_job({}).save()
        assert not closing.done()
        for role in ("event", "command"):
            relay.release(role)
        await closing
        assert calling.done()
        result = await calling
        if isinstance(result, dict):
            assert result == {}


async def test_a_redis_that_does_not_answer(make_queue: MakeQueue, url: str) -> None:
    """QK-32, CL-11: After the time-out close() raises, and the save may have been applied."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        relay.hold("event")
        saving = asyncio.ensure_future(queue.create_job({}).save())
        await until(lambda: spoken.names)
        make_queue.queues.remove(queue)
        with pytest.raises(OperationTimedOut):
            await queue.close(20)
        with pytest.raises(ConnectionLost) as lost:
            await saving
        assert lost.value.maybe_applied
    await make_queue().destroy()


async def test_a_connection_that_is_lost_ends_the_wait(make_queue: MakeQueue, url: str) -> None:
    """Also for commands that would be repeated once the connection is back."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=lambda attempt: LONG_MS).ready()
        spoken = Spoken(relay)
        relay.hold("event")
        saving = asyncio.ensure_future(queue.create_job({}).save())
        fetching = asyncio.ensure_future(queue.get_job("1"))
        await until(lambda: len(spoken.names) == 2)
        closing = asyncio.create_task(queue.close(LONG_MS))
        await until(lambda: closes(queue))
        for line in relay.lines:
            line.cut()
        async with asyncio.timeout(5):
            await closing
        with pytest.raises(ConnectionLost) as lost:
            await saving
        assert lost.value.maybe_applied
        with pytest.raises(QueueClosed):
            await fetching
    make_queue.claim(ConnectionLost)


@pytest.mark.parametrize("was_up", [True, False])
async def test_what_was_never_sent_is_refused_at_once(own_server: Server, make_queue: MakeQueue, was_up: bool) -> None:
    """CL-04: While Redis is down, or was never up."""
    queue = make_queue(redis=own_server.url, is_worker=False, reconnect=soon)
    if was_up:
        await queue.ready()
    own_server.stop()
    if was_up:
        await until(lambda: len(make_queue.claim(ConnectionLost)) or queue.client.connection.link is None)
    saving = asyncio.ensure_future(queue.create_job({}).save())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await queue.close(LONG_MS)
    with pytest.raises(QueueClosed):
        await saving
    own_server.start()
    make_queue.claim(ConnectionLost)


async def test_nobody_waits_for_a_call_that_was_cancelled(make_queue: MakeQueue, url: str) -> None:
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        relay.hold("event")
        saving = asyncio.ensure_future(queue.create_job({}).save())
        await until(lambda: spoken.names)
        saving.cancel()
        async with asyncio.timeout(5):
            await queue.close(LONG_MS)
