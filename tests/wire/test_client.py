"""The command connection, shared between queues and closed by its owner; errors that calls raise, and errors reported."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest

import beequeue
from beequeue import (
    Client,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Job,
    JobFailed,
    OperationTimedOut,
    Queue,
    QueueClosed,
    WrongLoop,
)
from beequeue.job import now_ms
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import beequeue_tasks, clients, present, soon

# --- shared -----------------------------------------------------------------------------------------------------------


async def test_queues_share_a_connection_for_commands(own_server: Server, make_queue: MakeQueue) -> None:
    """SH-01, SH-02, SH-03, SH-05, C-14: takes and events have connections of their own; a producer without events has none"""
    async with await beequeue.connect(own_server.url) as shared:
        producers = [make_queue(f"queue-{number}", shared, is_worker=False, get_events=False) for number in range(3)]
        for producer in producers:
            assert (await producer.create_job({}).save()).id == "1"
        assert len(await clients(own_server)) == 1
        workers = [make_queue(f"queue-{number}", shared) for number in range(3)]
        done = Seen()
        for worker in workers:
            assert worker.client is shared
            worker.on("job succeeded", done)
            await worker.ready()
            worker.process(echo)
        assert len(await clients(own_server)) == 1 + 3 * 2
        await done.reaches(3)
        await workers[0].close()
        await until(lambda: present(own_server, 1 + 2 * 2))
        for queue in (*producers[1:], *workers[1:]):
            await queue.create_job({}).save()
        await done.reaches(7)
        for queue in (*producers, *workers):
            await queue.close()
        await until(lambda: present(own_server, 1))
        await shared.ping()
    await until(lambda: present(own_server, 0))


@pytest.mark.parametrize(
    ("shares", "quits", "closed"),
    [
        (False, None, True),
        (False, True, True),
        (False, False, False),
        (True, None, False),
        (True, False, False),
        (True, True, True),
    ],
)
async def test_the_owner_closes_the_command_connection(
    own_server: Server, make_queue: MakeQueue, shares: bool, quits: bool | None, closed: bool
) -> None:
    """C-16, CL-16, CL-17, SH-04, SH-05, CL-01: the queue closes its other connections in any case"""
    shared = await beequeue.connect(own_server.url)
    setting: dict[str, Any] = {} if quits is None else {"quit_command_client": quits}
    queue = await make_queue(redis=shared if shares else own_server.url, **setting).ready()
    assert len(await clients(own_server)) == (3 if shares else 4)
    await queue.close()
    client = queue.client
    if closed:
        with pytest.raises(QueueClosed, match="^closed$"):
            await client.ping()
    else:
        await client.ping()
    await until(lambda: present(own_server, (0 if shares else 1) + (0 if closed else 1)))
    await shared.close()
    await client.close()
    await until(lambda: present(own_server, 0))


async def test_an_error_of_a_shared_connection_is_reported_by_every_queue(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """SH-06, QK-12, CL-24: once by each, however many there are, and never by a closed one"""
    async with await beequeue.connect(own_server.url, reconnect=soon) as shared:
        queues = [make_queue(f"queue-{number}", shared, is_worker=False, get_events=False) for number in range(12)]
        heard = Seen()
        for number, queue in enumerate(queues):
            await queue.ready()
            queue.on("error", lambda error, number=number: heard(number, error))
        await queues[0].close()
        await _kill_all(own_server, own_redis)
        await until(lambda: shared.connection.reconnects == 1)
        assert [number for number, _ in heard.calls] == list(range(1, 12))
        assert len({id(error) for _, error in heard.calls}) == 1
        assert "command connection" in str(heard.calls[0][1])
        for queue in queues:
            await queue.close()
        assert len(make_queue.claim(ConnectionLost)) == 11
        await _kill_all(own_server, own_redis)
        await until(lambda: shared.connection.reconnects == 2)
        assert len(heard.calls) == 11
        assert make_queue.errors == []
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [str(heard.calls[0][1])]


async def test_connect_waits_until_redis_is_up(own_server: Server, make_queue: MakeQueue, caplog: Any) -> None:
    """SH-07, QK-04"""
    own_server.stop()
    connecting = asyncio.create_task(beequeue.connect(own_server.url, reconnect=soon))
    with caplog.at_level(logging.WARNING):
        await until(lambda: caplog.text.count("next attempt in 10 ms") >= 3)
    assert not connecting.done()
    own_server.start()
    async with await connecting as shared:
        assert isinstance(shared, Client)
        queue = make_queue(redis=shared)
        assert (await queue.create_job({}).save()).id == "1"
        await queue.close()


async def test_a_cancelled_connect_leaves_no_attempt_behind(own_server: Server) -> None:
    """SH-07: nobody else could close it"""
    own_server.stop()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(beequeue.connect(own_server.url, reconnect=soon), 0.05)
    assert beequeue_tasks() == []


async def test_a_refused_connect_raises() -> None:
    """ER-02: a shared connection raises the refusal and shows no password"""
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        with pytest.raises(ConnectionRefused) as caught:
            await beequeue.connect({"path": str(server.socket), "password": "guess"})
        assert "guess" not in str(caught.value)
        async with await beequeue.connect({"path": str(server.socket), "password": "secret"}) as shared:
            await shared.ping()


async def test_a_queue_whose_shared_connection_is_closed_says_so(own_server: Server, make_queue: MakeQueue) -> None:
    """SH-04: closed by one queue, it is closed for the others too, which can still be closed"""
    shared = await beequeue.connect(own_server.url)
    one, other = make_queue("one", shared, quit_command_client=True), make_queue("other", shared)
    assert (await other.check_health()).waiting == 0
    await one.ready()
    await one.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await other.check_health()
    await other.close()
    await until(lambda: present(own_server, 0))


def test_a_shared_connection_of_another_loop_is_refused(url: str, name: str) -> None:
    """SH-01: with a clear error; the queue can be closed nevertheless"""

    async def use_elsewhere(shared: Client) -> None:
        with pytest.raises(WrongLoop, match="belongs to the event loop that opened it"):
            Queue(name, shared)
        queue = Queue(name, shared, auto_connect=False)
        for _ in range(2):
            with pytest.raises(WrongLoop, match="belongs to the event loop that opened it"):
                await queue.connect()
        await queue.close()

    with asyncio.Runner() as runner:
        shared = runner.run(beequeue.connect(url))
        with asyncio.Runner() as other:
            other.run(use_elsewhere(shared))
        runner.run(shared.close())


# --- errors: raised or reported ---------------------------------------------------------------------------------------


async def test_errors_that_the_awaited_call_raises(make_queue: MakeQueue, redis: Any) -> None:
    """ER-02: Redis's refusals, a wrong kind, empty progress, time-outs, `closed`; none of them is also reported"""
    queue = make_queue()
    stuck = asyncio.Event()

    async def handler(job: Job) -> None:
        await stuck.wait()

    await redis.set(queue.to_key("waiting"), "not a list")
    with pytest.raises(CommandError, match="WRONGTYPE"):
        await queue.create_job({}).save()
    await redis.delete(queue.to_key("waiting"))
    with pytest.raises(ValueError, match="Improper queue type 'wait'"):
        await queue.get_jobs("wait")
    job = await queue.create_job({}).save()
    with pytest.raises(ValueError, match="^Progress cannot be empty$"):
        await job.report_progress(None)
    queue.process(handler)
    with pytest.raises(TimeoutError):
        await job.result(timeout=20)
    with pytest.raises(OperationTimedOut):
        await queue.close(10)
    with pytest.raises(QueueClosed, match="^closed$"):
        await job.remove()
    make_queue.queues.remove(queue)
    assert make_queue.errors == []
    await make_queue().destroy()


async def test_jobs_that_fail_report_no_error(make_queue: MakeQueue, name: str) -> None:
    """ER-04, P-25: by an exception, in a thread, by a time-out, by a result that JSON cannot carry, once or for good"""
    queue, threads = make_queue(), make_queue(f"{name}-threads")
    failed = Seen()

    async def handler(job: Job) -> Any:
        if job.data == "slow":
            await asyncio.sleep(60)
        if job.data == "unserialisable":
            return object()
        raise ValueError(job.data)

    def in_thread(job: Job) -> None:
        raise ValueError(job.data)

    for worker in (queue, threads):
        worker.on("failed", failed)
    queue.process(handler)
    threads.process(in_thread)
    jobs = [queue.create_job("slow").timeout(10), queue.create_job("unserialisable"), queue.create_job("x").retries(1)]
    for job in (*jobs, threads.create_job("y")):
        await job.save()
        with pytest.raises(JobFailed):
            await job.result()
    await failed.reaches(5)
    assert make_queue.errors == []


async def test_successful_calls_report_no_error(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """ER-07: saves, bulk saves, delays, retries, progress and stall checks on each kind of queue; every queue closes"""
    async with await beequeue.connect(own_server.url) as shared:
        queues = [
            make_queue("q", setting, ordered_events=ordered, activate_delayed_jobs=True, stall_interval=1000)
            for setting in (shared, own_server.url)
            for ordered in (True, False)
        ]

        async def handler(job: Job) -> Any:
            await job.report_progress(50)
            if job.options["retries"]:
                raise ValueError("not yet")
            return job.data

        done = Seen()
        queues[0].on("job succeeded", done)
        for queue in queues:
            await queue.ready()
            queue.process(handler, 2)
            await queue.check_stalled_jobs(10)
        for queue in queues:
            jobs = [queue.create_job(number).retries(1).backoff("fixed", 20) for number in range(5)]
            assert await queue.save_all(jobs) == {}
            await queue.create_job("now").retries(0).save()
            await queue.create_job("later").retries(0).delay_until(now_ms() + 50).save()
        await done.reaches(len(queues) * 7)
        assert (await queues[0].check_health()).succeeded == len(queues) * 7
        for queue in queues:
            await queue.close()
            assert repr(queue).startswith("<Queue q closed ")
    assert make_queue.errors == []
    await until(lambda: present(own_server, 0))


async def _kill_all(server: Server, redis: Any) -> None:
    for client in await clients(server):
        await redis.client_kill_filter(_id=client["id"])
