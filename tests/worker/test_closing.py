"""Closing a queue: the order, the longest time, the fate of its jobs, and the error that is raised."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import logging
import threading
import warnings
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

import beequeue
import beequeue.worker.consumer
from beequeue import (
    BeeQueueError,
    CommandError,
    ConnectionLost,
    Job,
    JobFailed,
    OperationTimedOut,
    OutcomeNotRecorded,
    Queue,
    QueueClosed,
)
from beequeue.job import now_ms
from beequeue.queue import first_error_wins
from beequeue.store.scripts import SCRIPTS
from beequeue.wire.connection import Connection
from beequeue.worker.consumer import Consumer
from harness.server import Server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import beequeue_tasks, clients, freeze, present, said, soon, takes_no_more, thaw
from tests.relay import Line, Relay
from tests.wire.test_opening import every_call

TOO_LONG_MS = 2**31 + 1_000
"""Node's timers take this for 1 ms."""


class Work:
    """A handler that shows when it has begun, and waits until the test lets it end."""

    def __init__(self) -> None:
        self.started = Seen()
        self.gate = asyncio.Event()

    async def __call__(self, job: Job) -> Any:
        self.started(job.id)
        await self.gate.wait()
        if type(job.data) is str:
            raise ValueError(job.data)
        return job.data


# --- connections ------------------------------------------------------------------------------------------------------


async def test_a_ready_worker_closes_all_three_connections(own_server: Server, make_queue: MakeQueue) -> None:
    """CL-01, CL-22: also the one that waits for a job, without an `error`"""
    queue = make_queue(redis=own_server.url)
    queue.process(echo)
    await (await queue.create_job({}).save()).result()
    await until(lambda: blocked(own_server))
    assert len(await clients(own_server)) == 3
    await queue.close()
    await until(lambda: present(own_server, 0))
    assert "closed" in repr(queue)
    assert make_queue.errors == []


@pytest.mark.parametrize("process", [False, True])
async def test_closing_right_after_construction(own_server: Server, make_queue: MakeQueue, process: bool) -> None:
    """CL-04, CL-14: works twice, reports no `error`, and leaves no connection"""
    queue = make_queue(redis=own_server.url)
    if process:
        queue.process(echo)
    await queue.close()
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await queue.ready()
    await make_queue("later", redis=own_server.url, is_worker=False, get_events=False).ready()
    await until(lambda: present(own_server, 1))
    assert make_queue.errors == []


@pytest.mark.parametrize("role", ["command", "event", "take"])
async def test_a_connection_that_cannot_be_closed_raises(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """CL-05, CL-03: from close() and from every further call; the other connections are closed"""
    queue = await make_queue().ready()
    error = BeeQueueError("mine")
    closed = watch_closing(queue, monkeypatch, {role: error})
    for _ in range(2):
        with pytest.raises(BeeQueueError, match="^mine$") as caught:
            await queue.close()
        assert caught.value is error
    assert sorted(closed) == ["command", "event", "take"]
    with pytest.raises(QueueClosed):
        await queue.check_health()
    make_queue.queues.remove(queue)
    assert make_queue.errors == []


@every_call
async def test_after_it_every_call_raises(make_queue: MakeQueue, call: Callable[[Queue], Awaitable[Any]]) -> None:
    """CL-19"""
    queue = await make_queue().ready()
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await call(queue)


async def test_after_it_a_queue_is_neither_opened_nor_processed_again(own_server: Server, make_queue: MakeQueue) -> None:
    """CL-19, QK-02: whether it was open before or not; process() raises as soon as close() has been called"""
    for connects in (True, False):
        queue = make_queue(redis=own_server.url, auto_connect=connects)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(QueueClosed, match="^closed$"):
            queue.process(echo)
        await closing
        for opening in (queue.connect, queue.ready, queue.__aenter__):
            with pytest.raises(QueueClosed, match="^closed$"):
                await opening()
        with pytest.raises(QueueClosed, match="^closed$"):
            queue.process(echo)
        with pytest.raises(QueueClosed, match="^closed$"):
            await queue.run(echo)
    await until(lambda: present(own_server, 0))


# --- the clocks -------------------------------------------------------------------------------------------------------


async def test_the_repeated_stall_check_ends(make_queue: MakeQueue, redis: Any, name: str) -> None:
    """CL-10, CL-15, ST-19: while another queue's goes on, and without an `error`"""
    queue, other = make_queue(), make_queue(f"{name}-other")
    for each in (queue, other):
        await each.check_stalled_jobs(10)
    block, others = queue.to_key("stallBlock"), other.to_key("stallBlock")
    for _ in range(2):
        await redis.delete(block)
        await until(lambda: redis.exists(block))
    await queue.close()
    await redis.delete(block)
    for _ in range(4):
        await redis.delete(others)
        await until(lambda: redis.exists(others))
    assert await redis.exists(block) == 0
    assert make_queue.errors == []


async def test_what_happens_in_which_order(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """CL-20: it pauses; clocks stop; takes end, uncut; handlers end; the jobs that are left go back; connections close"""
    work = Work()
    clocks = {"activate_delayed_jobs": True, "near_term_window": 10}
    queue, other = (make_queue(name, redis=own_server.url, **clocks) for name in ("q", "other"))
    for number in range(2):
        await queue.create_job(number).save()
    queue.process(work, 3)
    for each in (queue, other):
        await each.check_stalled_jobs(10)
    await work.started.reaches(2)
    await until(lambda: blocked(own_server))
    before = await clients(own_server)

    closing = asyncio.create_task(queue.close(700))
    await asyncio.sleep(0)
    assert (queue.paused, queue.is_running()) == (True, False)
    assert "closing" in repr(queue)

    await until(lambda: unblocked(own_server))
    assert {client["id"] for client in await clients(own_server)} == {client["id"] for client in before}

    for each in (queue, other):
        await own_redis.zadd(each.to_key("delayed"), {"due": 1})
        await own_redis.delete(each.to_key("stallBlock"))
    await until(lambda: own_redis.exists(other.to_key("waiting")))
    await until(lambda: own_redis.exists(other.to_key("stallBlock")))
    assert await own_redis.zcard(queue.to_key("delayed")) == 1
    assert await own_redis.exists(queue.to_key("stallBlock")) == 0

    await queue.create_job("late").save()
    assert await own_redis.lrange(queue.to_key("active"), 0, -1) == ["2", "1"]
    assert queue.running == 2
    assert not closing.done()

    with pytest.raises(OperationTimedOut):
        await closing
    assert queue.running == 0
    assert await own_redis.lrange(queue.to_key("waiting"), 0, -1) == ["3", "2", "1"]
    assert await own_redis.exists(queue.to_key("active"), queue.to_key("stalling")) == 0
    await until(lambda: present(own_server, 3))
    make_queue.queues.remove(queue)
    assert len(work.started.calls) == 2


async def test_running_jobs_are_alive_while_close_waits(make_queue: MakeQueue, redis: Any) -> None:
    """CL-23: their ids leave `stalling` repeatedly; after close() the jobs that are left are in `waiting` at once"""
    queue, work = make_queue(stall_interval=40, stalled_check_interval=0), Work()
    queue.process(work)
    job = await queue.create_job({}).save()
    await work.started.reaches(1)
    closing = asyncio.create_task(queue.close(400))
    await until(lambda: queue.paused)
    for _ in range(3):
        await redis.sadd(queue.to_key("stalling"), job.id)
        await until(lambda: missing(redis, queue.to_key("stalling")))
    assert not closing.done()
    with pytest.raises(OperationTimedOut):
        await closing
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == [job.id]
    assert await redis.exists(queue.to_key("active"), queue.to_key("stalling")) == 0
    make_queue.queues.remove(queue)
    await make_queue().destroy()


# --- handlers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [1, "mine"], ids=["a result", "an exception"])
async def test_close_returns_however_a_running_job_ends(make_queue: MakeQueue, redis: Any, data: Any) -> None:
    """CL-12, CL-08: once its outcome is recorded"""
    queue, work = make_queue(), Work()
    queue.process(work)
    job = await queue.create_job(data).save()
    await work.started.reaches(1)
    closing = asyncio.create_task(queue.close(1_000))
    await until(lambda: queue.paused)
    work.gate.set()
    await closing
    ended = "failed" if data == "mine" else "succeeded"
    assert json.loads(await redis.hget(queue.to_key("jobs"), job.id))["status"] == ended
    assert await redis.smembers(queue.to_key(ended)) == {job.id}
    assert make_queue.errors == []


async def test_an_outcome_that_is_being_recorded_is_waited_for(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """CL-08: `succeeded` fires once, before close() returns"""
    async with Relay(url) as relay:
        worker, producer, work, done = make_queue(redis=relay.url), make_queue(is_worker=False), Work(), Seen()
        worker.on("succeeded", lambda job, result: done(result))
        worker.process(work)
        job = await producer.create_job(1).save()
        await work.started.reaches(1)
        relay.hold("command")
        work.gate.set()
        assert await job.result() == 1
        closing = asyncio.create_task(worker.close())
        await until(lambda: worker.paused)
        await producer.check_health()
        assert not closing.done()
        assert done.calls == []
        relay.release("command")
        await closing
        assert done.calls == [(1,)]


async def test_each_thread_that_ends_too_late_is_reported(make_queue: MakeQueue, redis: Any) -> None:
    """CL-13, CL-11: by an error of its own; nothing is written"""
    queue = make_queue()
    started, gates = Seen(), {1: threading.Event(), 2: threading.Event()}
    loop = asyncio.get_running_loop()

    def handler(job: Job) -> None:
        loop.call_soon_threadsafe(started, job.id)
        gates[job.data].wait(30)
        if job.data == 2:
            raise ValueError("mine")

    for number in gates:
        await queue.create_job(number).save()
    queue.process(handler, 2)
    await started.reaches(2)
    with pytest.raises(OperationTimedOut, match=r"^Operation timed out\.$"):
        await queue.close(10)
    before = [await redis.hgetall(queue.to_key("jobs")), await redis.lrange(queue.to_key("active"), 0, -1)]
    for gate in gates.values():
        gate.set()
    await until(lambda: len(make_queue.errors) == 2)
    errors = make_queue.claim(OutcomeNotRecorded)
    assert {str(error) for error in errors} == {
        "unable to update the status of succeeded job 1",
        "unable to update the status of failed job 2",
    }
    assert before == [await redis.hgetall(queue.to_key("jobs")), await redis.lrange(queue.to_key("active"), 0, -1)]
    assert before[1] == ["2", "1"]
    make_queue.queues.remove(queue)
    await make_queue().destroy()


async def test_how_long_handlers_have(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """CL-18: 5 s by default and with 0; in ms or as a timedelta"""
    given: list[float] = []
    drain = Consumer.drain

    async def watched(self: Consumer, client_id: Callable[[], int | None], timeout_s: float) -> bool:
        given.append(timeout_s)
        return await drain(self, client_id, timeout_s)

    monkeypatch.setattr(Consumer, "drain", watched)
    calls: list[dict[str, Any]] = [{}, {"timeout": 0}, {"timeout": 1_500}, {"timeout": timedelta(seconds=2)}]
    for arguments in calls:
        queue = make_queue()
        queue.process(echo)
        await (await queue.create_job({}).save()).result()
        await queue.close(**arguments)
    assert given == [5.0, 5.0, 1.5, 2.0]
    assert inspect.signature(Queue.close).parameters["timeout"].default == 5_000


@pytest.mark.parametrize("timeout", [-1, 1.5, "100", None, True, timedelta(seconds=-1)])
async def test_a_wrong_time_out_changes_nothing(make_queue: MakeQueue, timeout: Any) -> None:
    """CL-18"""
    queue = make_queue()
    with pytest.raises((TypeError, ValueError), match="^timeout must be "):
        await queue.close(timeout)
    assert queue.is_running()
    assert (await queue.create_job({}).save()).id == "1"


async def test_a_job_taken_but_not_started_goes_back(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """QK-31: to the tail of `waiting`, where it is taken next; its handler is not called"""
    async with Relay(url) as relay:
        worker, producer, work = make_queue(redis=relay.url, get_events=False), make_queue(is_worker=False), Work()
        worker.process(work)
        await until(lambda: any(b"BRPOPLPUSH" in line.said for line in relay.lines))
        relay.hold("take")  # the reply with the data
        await producer.create_job("taken").save()
        await until(lambda: redis.exists(producer.to_key("active")))
        await producer.create_job("behind").save()
        closing = asyncio.create_task(worker.close())
        await until(lambda: takes_no_more(worker))
        relay.release("take")
        await closing
    assert await redis.lrange(producer.to_key("waiting"), 0, -1) == ["2", "1"]
    assert await redis.exists(producer.to_key("active")) == 0
    assert work.started.calls == []


async def test_jobs_are_handed_back_once(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """the connection is cut before the reply, and another worker has the job by then: it is not taken away from that one"""
    async with Relay(url) as relay:
        worker, producer = make_queue(redis=relay.url, reconnect=soon), make_queue(is_worker=False)
        work, elsewhere = Work(), Work()
        other = make_queue()
        worker.process(work)
        job = await producer.create_job(1).save()
        await work.started.reaches(1)
        other.process(elsewhere)

        async def cut(line: Line, data: bytes) -> bytes:
            if SCRIPTS["hand_back"].sha.encode() in line.said and line.is_open:
                await elsewhere.started.reaches(1)
                line.cut()
            return data

        relay.distort = cut
        make_queue.queues.remove(worker)
        with pytest.raises(OperationTimedOut):
            await worker.close(50)
        assert said(relay, SCRIPTS["hand_back"].sha.encode()) == 1
        assert await redis.lrange(producer.to_key("active"), 0, -1) == [job.id]
        elsewhere.gate.set()
        assert await job.result() == 1
    make_queue.claim(ConnectionLost)
    assert [str(error) for error in make_queue.claim(OutcomeNotRecorded)] == [
        "jobs 1 are left to the stall check: the command connection was lost before Redis answered"
    ]


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
async def test_an_error_of_a_cancelled_handler_does_not_count(
    make_queue: MakeQueue, redis: Any, raised: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """past the time-out its job goes back, and the event loop reports nothing"""
    queue, started = make_queue(), Seen()

    async def handler(job: Job) -> None:
        started()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise raised("mine") from None

    job = await queue.create_job({}).save()
    queue.process(handler)
    await started.reaches(1)
    make_queue.queues.remove(queue)
    with pytest.raises(OperationTimedOut):
        await queue.close(10)
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == [job.id]
    assert not await redis.exists(queue.to_key("active"))
    gc.collect()
    assert caplog.messages == []


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_worker_that_nobody_closed_fails_no_job(make_queue: MakeQueue, redis: Any, url: str, kind: str) -> None:
    """`asyncio.run` cancels all tasks, as after Ctrl-C; the stall check brings the jobs back"""
    producer = make_queue(is_worker=False)
    jobs = [await producer.create_job({}).save() for _ in range(3)]
    gate = threading.Event()

    async def program() -> None:
        worker = Queue(producer.name, url, stall_interval=2_000)
        started, loop = Seen(), asyncio.get_running_loop()

        async def handler(job: Job) -> None:
            started()
            await asyncio.sleep(60)

        def plain_handler(job: Job) -> None:
            loop.call_soon_threadsafe(started)
            gate.wait(30)

        worker.process(handler if kind == "async" else plain_handler, 2)
        await started.reaches(2)

    def interrupted() -> None:
        # a loop of uvloop would not close here: it waits while another one runs
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(program())

    await asyncio.to_thread(interrupted)
    gate.set()
    assert await redis.lrange(producer.to_key("active"), 0, -1) == ["2", "1"]
    assert await producer.check_health() == (1, 2, 0, 0, 0, 3)
    assert [json.loads(entry)["status"] for entry in await redis.hvals(producer.to_key("jobs"))] == ["created"] * len(jobs)
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name == "beequeue heartbeat"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the worker leaves its sockets open
        gc.collect()


async def test_a_handler_that_closes_its_own_queue_gets_an_error_at_once(make_queue: MakeQueue) -> None:
    """QK-30: the queue goes on; a task that the handler leaves behind may close it"""
    queue, done = make_queue(), Seen()
    closing: list[asyncio.Task[None]] = []

    async def handler(job: Job) -> str:
        if job.data == "itself":
            await queue.close()
        closing.append(asyncio.create_task(queue.close()))
        return "closed behind it"

    queue.on("succeeded", lambda job, result: done(result))
    queue.process(handler)
    job = await queue.create_job("itself").save()
    with pytest.raises(JobFailed, match="cannot close its own queue"):
        await job.result()
    assert queue.is_running()
    await queue.create_job("by a task").save()
    assert await done.reaches(1) == [("closed behind it",)]
    await closing[0]
    assert not queue.is_running()


# --- although Redis is away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["stopped", "silent"])
@pytest.mark.parametrize(
    "phase", ["opening", "starting to process", "idle", "running", "running, a slot free", "in a thread", "settling"]
)
async def test_close_ends_soon_although_redis_is_away(
    own_server: Server, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, phase: str, away: str
) -> None:
    """QK-32: in each phase of a worker"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.1)
    work, loop, end_of_thread = Work(), asyncio.get_running_loop(), threading.Event()

    def in_thread(job: Job) -> None:
        loop.call_soon_threadsafe(work.started, job.id)
        end_of_thread.wait(30)

    def leave() -> None:
        (own_server.stop if away == "stopped" else lambda: freeze(own_server))()

    if phase == "opening":
        leave()
    queue = make_queue(redis=own_server.url, reconnect=soon, activate_delayed_jobs=True)
    if phase != "opening":
        await queue.ready()
    if phase == "starting to process":
        leave()
    queue.process(in_thread if phase == "in a thread" else work, 2 if phase == "running, a slot free" else 1)
    if phase not in ("opening", "starting to process"):
        await until(lambda: blocked(own_server))
        if phase != "idle":
            await queue.create_job({}).save()
            await work.started.reaches(1)
        leave()
    if phase == "settling":
        work.gate.set()
        await until(lambda: not queue.running)

    make_queue.queues.remove(queue)
    try:
        assert await duration_of_close(queue) < 2
        assert beequeue_tasks() == []
    finally:
        end_of_thread.set()
        if away == "silent":
            thaw(own_server)
    if phase == "in a thread":
        await until(lambda: any(isinstance(error, OutcomeNotRecorded) for error in make_queue.errors))
    for kind in (ConnectionLost, OutcomeNotRecorded):
        make_queue.claim(kind)


async def test_close_ends_soon_although_a_job_that_was_taken_is_not_answered(
    make_queue: MakeQueue, redis: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QK-32: Redis is silent; the job stays in active, for the stall check"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.1)
    async with Relay(url) as relay:
        worker, producer, work = make_queue(redis=relay.url, get_events=False), make_queue(is_worker=False), Work()
        worker.process(work)
        await until(lambda: any(b"BRPOPLPUSH" in line.said for line in relay.lines))
        relay.hold("take")
        relay.hold("command")
        job = await producer.create_job({}).save()
        await until(lambda: redis.exists(producer.to_key("active")))
        make_queue.queues.remove(worker)
        took = await duration_of_close(worker)
        make_queue.claim(ConnectionLost)
    assert await redis.lrange(producer.to_key("active"), 0, -1) == [job.id]
    assert work.started.calls == []
    assert took < 2


@pytest.mark.parametrize("refuses", ["", "requirepass", "maxclients"])
async def test_close_ends_soon_although_the_take_is_not_answered(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    """QK-32: its link is silent, Redis answers on the others, and may refuse new ones; the job that runs goes back"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.1)
    async with Relay(own_server.url) as relay:
        worker, work = await make_queue(redis=relay.url, get_events=False).ready(), Work()
        job = await make_queue(redis=own_server.url, is_worker=False).create_job({}).save()
        worker.process(work, 2)
        await work.started.reaches(1)
        await until(lambda: blocked(own_server))
        if refuses:
            await own_redis.config_set(refuses, "secret" if refuses == "requirepass" else len(await own_redis.client_list()))
        (line,) = [line for line in relay.lines if line.role == "take"]
        line.dead = True
        make_queue.queues.remove(worker)
        began = asyncio.get_running_loop().time()
        with pytest.raises(OperationTimedOut):
            async with asyncio.timeout(8):
                await worker.close(100)
        assert asyncio.get_running_loop().time() - began < 3
        assert await own_redis.lrange(worker.to_key("waiting"), 0, -1) == [job.id]
        if refuses:
            await own_redis.config_set(refuses, "" if refuses == "requirepass" else 1_000)


async def test_close_waits_for_a_job_that_arrives_slowly(
    make_queue: MakeQueue, redis: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """past its time-out, while data moves on the link: the job goes back to waiting"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.3)
    async with Relay(url) as relay:
        worker, producer, work = make_queue(redis=relay.url, get_events=False), make_queue(is_worker=False), Work()
        arriving = Seen()

        async def slowly(line: Line, data: bytes) -> bytes:
            if b"x" * 1_000 not in data:
                return data
            for at in range(10):
                await line.pass_back(data[1_000 * at : 1_000 * (at + 1)])
                arriving()
                await asyncio.sleep(0.1)
            return data[10_000:]

        relay.distort = slowly
        worker.process(work)
        job = await producer.create_job("x" * 50_000).save()
        await arriving.reaches(1)
        await worker.close(1)
        assert len(arriving.calls) == 10
    assert await redis.lrange(producer.to_key("waiting"), 0, -1) == [job.id]
    assert work.started.calls == []


async def test_close_ends_soon_although_its_shared_connection_is_closed(own_server: Server, make_queue: MakeQueue) -> None:
    """QK-32: without it nothing can end the take of an idle worker"""
    shared = await beequeue.connect(own_server.url)
    queue = make_queue(redis=shared)
    queue.process(echo)
    await until(lambda: blocked(own_server))
    await shared.close()
    make_queue.queues.remove(queue)
    assert await duration_of_close(queue) < 2
    await until(lambda: present(own_server, 0))


async def test_a_worker_whose_shared_connection_is_closed_takes_no_more(own_server: Server, make_queue: MakeQueue) -> None:
    """it could settle none of them: another worker takes them"""
    shared = await beequeue.connect(own_server.url)
    producer = make_queue(redis=own_server.url, is_worker=False)
    queue = make_queue(redis=shared)
    work = Work()
    await producer.create_job(1).save()
    queue.process(work, 2)
    await work.started.reaches(1)
    await shared.close()
    work.gate.set()
    await until(lambda: make_queue.errors)
    for number in range(4):
        await producer.create_job(number).save()
    other = make_queue(redis=own_server.url)
    ran = Seen()
    other.process(ran)
    await ran.reaches(3)
    # besides the job that it was running, it may hold the one that its open take has brought
    assert [job.id for (job,) in ran.calls][:3] == ["3", "4", "5"]
    assert len(work.started.calls) == 1
    assert [type(error.__cause__) for error in make_queue.claim(OutcomeNotRecorded)] == [QueueClosed]
    make_queue.queues.remove(queue)
    assert await duration_of_close(queue) < 2


async def test_close_ends_the_wait_after_a_refused_take(make_queue: MakeQueue, redis: Any) -> None:
    """QK-33: it does not wait out a delay of a minute"""
    queue = make_queue(initial_redis_failure_retry_delay=60_000)
    await redis.set(queue.to_key("waiting"), "not a list")
    queue.process(echo)
    await until(lambda: make_queue.errors)
    began = asyncio.get_running_loop().time()
    await queue.close()
    assert asyncio.get_running_loop().time() - began < 4
    assert len(make_queue.claim(CommandError)) == 1
    await redis.delete(queue.to_key("waiting"))


async def test_close_ends_the_wait_before_the_next_attempt_to_connect(own_server: Server, make_queue: MakeQueue) -> None:
    """QK-33"""
    queue = make_queue(redis=own_server.url, reconnect=lambda attempt: 60_000)
    queue.process(echo)
    await (await queue.create_job({}).save()).result()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 3)
    began = asyncio.get_running_loop().time()
    await queue.close()
    assert asyncio.get_running_loop().time() - began < 4
    assert len(make_queue.claim(ConnectionLost)) == 3


async def test_long_durations_do_not_end_at_once(make_queue: MakeQueue, redis: Any) -> None:
    """QK-34: of a job, its retry, its result, the clocks and close()"""
    settings: dict[str, Any] = dict.fromkeys(("stall_interval", "near_term_window", "stalled_check_interval"), TOO_LONG_MS)
    queue = make_queue(activate_delayed_jobs=True, auto_connect=False, **settings)
    work, raised = Work(), Seen()
    queue.on("raised jobs", raised)
    delayed, block = queue.to_key("delayed"), queue.to_key("stallBlock")
    await redis.zadd(delayed, {"a first look": 1})
    await queue.connect()
    await raised.reaches(1)
    await redis.zadd(delayed, {"a second one": 1})
    await queue.check_stalled_jobs(TOO_LONG_MS)
    assert await redis.pttl(block) > 2**31
    await redis.delete(block)
    far = await queue.create_job("far").delay_until(now_ms() + TOO_LONG_MS).save()
    job = await queue.create_job(1).timeout(TOO_LONG_MS).save()
    waiting = asyncio.create_task(job.result(timeout=TOO_LONG_MS))
    again = await queue.create_job("again").retries(1).backoff("fixed", TOO_LONG_MS).save()
    queue.process(work)
    await work.started.reaches(1)
    await until(lambda: redis.exists(block))  # made by the check with which processing begins
    await redis.delete(block)
    work.gate.set()
    assert await waiting == 1
    await until(lambda: redis.zscore(delayed, again.id))
    work.gate.clear()
    last = await queue.create_job(2).save()
    await work.started.reaches(3)
    closing = asyncio.create_task(queue.close(TOO_LONG_MS))
    await until(lambda: queue.paused)
    await redis.sadd(queue.to_key("stalling"), "nobody")
    assert not closing.done()
    work.gate.set()
    await closing
    assert await redis.sismember(queue.to_key("succeeded"), last.id)
    assert json.loads(await redis.hget(queue.to_key("jobs"), job.id))["options"]["timeout"] == TOO_LONG_MS
    assert await redis.zrange(delayed, 0, -1) == ["a second one", far.id, again.id]
    assert await redis.exists(block) == 0
    assert raised.calls == [(1,)]


# --- the first error wins ---------------------------------------------------------------------------------------------


async def test_both_fail(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """CL-21, HP-01, HP-02: close() raises the time-out, closes each connection once, and logs the other error"""
    queue, work = make_queue(), Work()
    queue.process(work)
    await queue.create_job({}).save()
    await work.started.reaches(1)
    closed = watch_closing(queue, monkeypatch, {"event": BeeQueueError("mine")})
    with pytest.raises(OperationTimedOut):
        await queue.close(10)
    assert sorted(closed) == ["command", "event", "take"]
    assert "mine" in caplog.text
    make_queue.queues.remove(queue)
    await make_queue().destroy()


@pytest.mark.parametrize("ends", ["at once", "later", "too late"])
async def test_each_connection_is_closed_once(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """HP-01, CL-03: whenever the handler ends, also for several calls"""
    queue, work = make_queue(), Work()
    queue.process(work)
    await queue.create_job({}).save()
    await work.started.reaches(1)
    closed = watch_closing(queue, monkeypatch, {})
    if ends == "at once":
        work.gate.set()
        await until(lambda: not queue.running)
    closing = [asyncio.create_task(queue.close(10 if ends == "too late" else 1_000)) for _ in range(2)]
    await until(lambda: queue.paused)
    if ends == "later":
        work.gate.set()
    outcomes = {str(outcome) for outcome in await asyncio.gather(*closing, return_exceptions=True)}
    assert outcomes == {"Operation timed out." if ends == "too late" else "None"}
    assert sorted(closed) == ["command", "event", "take"]
    if ends == "too late":
        make_queue.queues.remove(queue)
        await make_queue().destroy()


@pytest.mark.parametrize("in_time", [True, False])
async def test_close_ends_when_everything_is_closed(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    """HP-05: whether it returns or raises"""
    queue, work = make_queue(), Work()
    queue.process(work)
    await queue.create_job({}).save()
    await work.started.reaches(1)
    if in_time:
        work.gate.set()
    gate = asyncio.Event()
    closed = watch_closing(queue, monkeypatch, {}, gate)
    closing = asyncio.create_task(queue.close(10))
    await until(lambda: len(closed) == 3)
    assert not closing.done()
    gate.set()
    if in_time:
        await closing
    else:
        with pytest.raises(OperationTimedOut):
            await closing
        make_queue.queues.remove(queue)
        await make_queue().destroy()


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("clean_up_fails", [False, True])
@pytest.mark.parametrize("work_fails", [False, True])
async def test_the_first_error_wins(
    work_fails: bool, clean_up_fails: bool, delayed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """HP-01, HP-02, HP-05: the error of the work, or else of the clean-up, which is awaited in any case"""
    log: list[str] = []

    async def step(what: str, fails: bool) -> None:
        if delayed:
            await asyncio.sleep(0.001)
        log.append(what)
        if fails:
            raise BeeQueueError(what)

    both = first_error_wins(step("work", work_fails), lambda: step("clean-up", clean_up_fails))
    first = "work" if work_fails else "clean-up" if clean_up_fails else None
    if first is None:
        await both
    else:
        with pytest.raises(BeeQueueError, match=f"^{first}$"):
            await both
    assert log == ["work", "clean-up"]
    logged = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert logged == (["closing: BeeQueueError: clean-up"] if work_fails and clean_up_fails else [])


async def test_clean_up_follows_a_cancellation_too() -> None:
    """HP-01"""
    cleaned = Seen()
    began = asyncio.Event()

    async def work() -> None:
        began.set()
        await asyncio.sleep(60)

    async def clean_up() -> None:
        cleaned()

    both = asyncio.create_task(first_error_wins(work(), clean_up))
    await began.wait()
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert cleaned.calls == [()]


# --- messages ---------------------------------------------------------------------------------------------------------


async def test_messages_that_bee_queue_compares(make_queue: MakeQueue) -> None:
    """ER-06"""
    queue = make_queue()
    job = queue.create_job({})
    stuck = threading.Event()
    begun: list[Job] = []

    def in_thread(job: Job) -> None:
        begun.append(job)
        stuck.wait(30)

    said = [
        message_of(lambda: make_queue(is_worker=False).process(echo)),
        message_of(lambda: queue.process(in_thread).process(echo)),
        message_of(lambda: job.retries(-1)),
        message_of(lambda: job.timeout(-1)),
        message_of(lambda: job.backoff("unheard of", 1)),
        await message_from(job.report_progress(None)),
        await message_from((await queue.create_job({}).timeout(10).save()).result()),
    ]
    await queue.create_job({}).save()
    await until(lambda: len(begun) == 2)  # a call that has not begun would be cancelled, and not reported
    said += [await message_from(queue.close(10)), await message_from(queue.check_health())]
    make_queue.queues.remove(queue)
    stuck.set()
    await until(lambda: make_queue.errors)
    said += map(str, make_queue.claim(OutcomeNotRecorded))
    assert said == [
        "Cannot call Queue#process on a non-worker",
        "Cannot call Queue#process twice",
        "Retries cannot be negative",
        "Timeout cannot be negative",
        "unknown strategy",
        "Progress cannot be empty",
        "Job 1 timed out (10 ms)",
        "Operation timed out.",
        "closed",
        "unable to update the status of succeeded job 2",
    ]
    queue = make_queue()
    assert "delay must be a positive integer" in message_of(lambda: job.backoff("fixed", 0))
    assert "timestamp" in message_of(lambda: job.delay_until(-1))
    assert "Improper queue type" in await message_from(queue.get_jobs("not a type"))
    await queue.destroy()


# --- helpers ----------------------------------------------------------------------------------------------------------


def watch_closing(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception], gate: asyncio.Event | None = None
) -> list[str]:
    """Notes the role of each connection that closes; one with an error raises it, and all wait for the gate."""
    closed: list[str] = []
    close = Connection.close
    ours = (queue.client.connection, queue._connections.takes, queue._connections.events)

    async def watched(self: Connection) -> None:
        await close(self)
        if self in ours:
            closed.append(self.role)
            if gate is not None:
                await gate.wait()
            if self.role in errors:
                raise errors[self.role]

    monkeypatch.setattr(Connection, "close", watched)
    return closed


async def duration_of_close(queue: Queue) -> float:
    """Returns how many seconds `close(100)` takes, whether it returns or times out; 8 if it does not end."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(8):
            await queue.close(100)
    except (OperationTimedOut, TimeoutError):
        pass
    return loop.time() - began


async def blocked(server: Server) -> str:
    """Returns the id of a connection that waits for a job, if there is one."""
    return next((client["id"] for client in await clients(server) if "b" in client["flags"]), "")


async def unblocked(server: Server) -> bool:
    return not await blocked(server)


async def missing(redis: Any, key: str) -> bool:
    return not await redis.exists(key)


def message_of(call: Callable[[], Any]) -> str:
    """Returns the error that `call` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller compares
        call()
    return str(caught.value)


async def message_from(call: Awaitable[Any]) -> str:
    """Returns the error that the awaited call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await call
    return str(caught.value)
