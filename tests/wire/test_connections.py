"""The life of connections: lost, refused and back, shared between queues, closed by their owner."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

import beequeue
import beequeue.worker.consumer
from beequeue import (
    Client,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Job,
    JobFailed,
    OperationTimedOut,
    OutcomeNotRecorded,
    Queue,
    QueueClosed,
    WrongLoop,
)
from beequeue.job import now_ms
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import ONLOOKER, beequeue_tasks, clients, present, soon
from tests.relay import Relay


@pytest.fixture
async def own_redis(own_server: Server) -> AsyncIterator[Any]:
    """A plain client of `own_server`."""
    async with Redis.from_url(own_server.url, decode_responses=True, client_name=ONLOOKER) as client:
        yield client


# --- lost and refused -------------------------------------------------------------------------------------------------


async def test_each_lost_connection_is_reported(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """C-22, RC-07: one by one, and each comes back; a running job succeeds nevertheless"""
    queue = make_queue(redis=own_server.url, reconnect=soon)
    gate, started, failed = asyncio.Event(), Seen(), Seen()
    queue.on("failed", failed)

    async def handler(job: Job) -> str:
        started()
        await gate.wait()
        return "in spite of it"

    queue.process(handler, 2)
    job = await queue.create_job({}).save()
    await started.reaches(1)
    for number, client in enumerate(await clients(own_server), 1):
        await own_redis.client_kill_filter(_id=client["id"])
        await until(partial(_has_reconnected, queue, number))
        assert len(make_queue.errors) == number
    gate.set()
    assert await job.result() == "in spite of it"
    assert failed.calls == []
    lost = [str(error) for error in make_queue.claim(ConnectionLost)]
    assert sorted(message.split(" to ")[0] for message in lost) == [
        f"{role} connection" for role in ("command", "event", "take")
    ]


async def test_a_refusal_after_the_first_connect_is_reported(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """C-22, R-12: each attempt reports its refusal, and the next one follows nevertheless"""
    queue = await make_queue(redis=own_server.url, reconnect=soon).ready()
    before = await clients(own_server)
    await own_redis.config_set("requirepass", "secret")
    for client in before:
        await own_redis.client_kill_filter(_id=client["id"])
    await until(lambda: sum(isinstance(error, ConnectionRefused) for error in make_queue.errors) >= 9)
    await own_redis.config_set("requirepass", "")
    assert (await queue.create_job({}).save()).id == "1"
    await until(lambda: queue.reconnects == 3)
    assert len(make_queue.claim(ConnectionRefused)) >= 9
    assert len(make_queue.claim(ConnectionLost)) == 3


async def test_each_outage_begins_with_the_first_wait(own_server: Server, make_queue: MakeQueue) -> None:
    """RC-05: however long the outage before it was"""
    asked: list[int] = []

    def reconnect(attempt: int) -> int:
        asked.append(attempt)
        return 10

    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=reconnect).ready()
    for outage in (1, 2):
        asked.clear()
        own_server.stop()
        await until(lambda: 4 in asked)
        own_server.start()
        await until(partial(_has_reconnected, queue, outage))
        assert asked[0] == 1
    assert len(make_queue.claim(ConnectionLost)) == 2


async def test_commands_issued_while_down_wait(own_server: Server, make_queue: MakeQueue) -> None:
    """RC-05: and run when Redis is back"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    job = queue.create_job({})
    saving, fetching = asyncio.create_task(job.save()), asyncio.create_task(queue.get_job("1"))
    counting = asyncio.create_task(queue.check_health())
    own_server.start()
    assert (await saving).id == "1"
    assert await fetching is job
    assert (await counting).waiting in (0, 1)  # on another connection
    assert len(make_queue.claim(ConnectionLost)) == 2


@pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])
async def test_a_call_cancelled_while_down_does_nothing_later(own_server: Server, make_queue: MakeQueue, ordered: bool) -> None:
    """a job whose save was cancelled can be saved again; no call stays in the way of later ones"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon, ordered_events=ordered).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    jobs = [queue.create_job(number).set_id(f"job {number}") for number in range(250)]
    failed = queue.create_job().set_id("ended")
    failed.id = "ended"
    calls = {
        "save": jobs[0].save(),
        "save_all": queue.save_all(jobs[1:]),
        "retry": failed.retry(),
        "remove_job": queue.remove_job("kept"),
        "get_job": queue.get_job("kept"),
        "from_id": Job.from_id(queue, "kept"),
        "is_in_set": failed.is_in_set("waiting"),
        "report_progress": failed.report_progress(1),
        "get_jobs": queue.get_jobs("waiting"),
        "check_health": queue.check_health(),
        "clean": queue.clean("failed"),
    }
    tasks = [asyncio.create_task(call) for call in calls.values()]
    await asyncio.wait(tasks, timeout=0.05)
    for task in tasks:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))
    assert queue.jobs == {}
    assert not any(job.saving for job in jobs)
    own_server.start()
    assert (await queue.create_job("kept").set_id("kept").save()).id == "kept"
    assert (await queue.check_health()).waiting == 1
    async with Redis.from_url(own_server.url, decode_responses=True) as onlooker:
        assert not any("lpos" in name or "sscan" in name for name in await onlooker.info("commandstats"))
    assert await queue.save_all(jobs) == {}
    assert (await queue.check_health()).waiting == 251
    assert len(make_queue.claim(ConnectionLost)) == 2


async def test_safe_commands_are_repeated_and_others_raise(make_queue: MakeQueue, redis: Any, url: str, name: str) -> None:
    """RC-05: commands in flight when one of the two connections is lost"""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        stored = await queue.create_job("stored").set_id("stored").save()
        for role in ("event", "command"):
            relay.hold(role)
        risky: dict[str, Any] = {
            "save": queue.create_job({}).save(),
            "retry": stored.retry(),
            "report_progress": stored.report_progress(1),
            "destroy": make_queue(f"{name}-elsewhere", redis=queue.client, is_worker=False, get_events=False).destroy(),
        }
        safe: dict[str, Any] = {
            "get_job": queue.get_job("stored"),
            "from_id": Job.from_id(queue, "stored"),
            "is_in_set": stored.is_in_set("waiting"),
            "remove_job": queue.remove_job("unheard of"),
            "get_jobs": queue.get_jobs("failed"),
            "check_health": queue.check_health(),
            "check_stalled_jobs": queue.check_stalled_jobs(),
            "clean": queue.clean("failed"),
        }
        calls: dict[str, asyncio.Task[Any]] = {name: asyncio.create_task(call) for name, call in (risky | safe).items()}
        await until(lambda: redis.exists(queue.to_key("stallBlock")))
        await until(lambda: redis.hexists(queue.to_key("jobs"), "1"))
        await until(lambda: all(b"PUBLISH" in line.said for line in relay.lines if line.role == "event"))
        await until(lambda: any(b"-elsewhere:stalls" in line.said for line in relay.lines))
        assert not any(call.done() for call in calls.values())
        for line in relay.lines:
            line.cut()
        for role in ("event", "command"):
            relay.release(role)
        for name in risky:
            with pytest.raises(ConnectionLost) as caught:
                await calls[name]
            assert caught.value.maybe_applied, name
        assert await calls["get_job"] is stored
        fetched = await calls["from_id"]
        assert fetched is not None
        assert fetched.data == "stored"
        assert await calls["is_in_set"] is True
        assert await calls["remove_job"] is queue
        assert await calls["get_jobs"] == []
        assert (await calls["check_health"]).waiting == 2
        assert await calls["check_stalled_jobs"] == 0
        assert await calls["clean"] == 0
        make_queue.claim(ConnectionLost)
        await queue.close()


async def test_a_closed_queue_does_not_reconnect(
    own_server: Server, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RC-06: closed while Redis is down and a handler runs, it does not come back with Redis"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.05)
    queue = make_queue(redis=own_server.url, reconnect=soon)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    queue.process(handler, 2)
    await queue.create_job({}).save()
    await started.reaches(1)
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 3)
    with pytest.raises(OperationTimedOut):
        await queue.close(10)
    make_queue.queues.remove(queue)
    assert len(make_queue.claim(ConnectionLost)) == 3
    make_queue.claim(OutcomeNotRecorded)  # the jobs it holds could not be handed back
    own_server.start()
    await make_queue("later", redis=own_server.url, is_worker=False, get_events=False).ready()
    assert await present(own_server, 1)
    assert queue.reconnects == 0


async def test_a_closing_worker_whose_take_is_lost_takes_no_more(
    own_server: Server, own_redis: Any, make_queue: MakeQueue
) -> None:
    """RC-06, CL-07: a job saved after that runs once, on another worker"""
    queue, producer = make_queue(redis=own_server.url, reconnect=soon), make_queue(redis=own_server.url, is_worker=False)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> str:
        started(job.data)
        await gate.wait()
        return "first worker"

    queue.process(handler, 2)
    first = await producer.create_job("first").save()
    await started.reaches(1)
    blocked = await _blocked(own_redis)
    closing = asyncio.create_task(queue.close())
    await own_redis.client_kill_filter(_id=blocked)
    await until(lambda: _negated(own_redis.client_list(client_id=[blocked])))
    second = await producer.create_job("second").save()
    gate.set()
    await closing
    assert await first.result() == "first worker"
    assert started.calls == [("first",)]
    make_queue(redis=own_server.url).process(echo)
    assert await second.result() == "second"
    make_queue.claim(ConnectionLost)


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


# --- helpers ----------------------------------------------------------------------------------------------------------


async def _blocked(redis: Any) -> str:
    """The id of the only connection that waits for a job."""

    async def listed() -> list[str]:
        return [client["id"] for client in await redis.client_list() if "b" in client["flags"]]

    await until(listed)
    (blocked,) = await listed()
    return blocked


async def _kill_all(server: Server, redis: Any) -> None:
    for client in await clients(server):
        await redis.client_kill_filter(_id=client["id"])


def _has_reconnected(queue: Queue, times: int) -> bool:
    return queue.reconnects == times


async def _negated(awaitable: Any) -> bool:
    return not await awaitable
