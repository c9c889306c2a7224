"""Save, process, events: on a real Redis, with both orderings."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import (
    BeeQueueError,
    Job,
    JobFailed,
    LateFinish,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    Queue,
    QueueClosed,
    UnreadableData,
    WrongLoop,
)
from beequeue.job import now_ms
from tests.conftest import MakeQueue, Seen, echo, until

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])


# --- the path through everything -------------------------------------------------------------------------------------


@both_orderings
async def test_save_process_event(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """S-01, P-01, EV-01, EV-20: The id, the handler, the local event, the queue-level event, the job's own event, the
    result.
    """
    producer = await make_queue(is_worker=False, ordered_events=ordered).ready()
    worker = make_queue(get_events=False)
    of_queue, of_job, local = Seen(), Seen(), Seen()
    producer.on("job succeeded", of_queue)
    worker.on("succeeded", local)
    job = producer.create_job({"foo": "bar"})
    job.on("succeeded", of_job)
    assert await job.save() is job
    assert job.id == "1"
    assert producer.jobs == {"1": job}
    worker.process(echo)
    assert await of_queue.reaches(1) == [("1", {"foo": "bar"})]
    assert of_job.calls == [({"foo": "bar"},)]
    assert producer.jobs == {}
    assert await job.result() == {"foo": "bar"}
    ((done, result),) = await local.reaches(1)
    assert (done.id, done.status, result) == ("1", "succeeded", {"foo": "bar"})
    assert await redis.smembers(producer.to_key("succeeded")) == {"1"}
    assert await redis.exists(producer.to_key("waiting"), producer.to_key("active"), producer.to_key("stalling")) == 0


async def test_what_is_stored(make_queue: MakeQueue, redis: Any) -> None:
    """C-08, S-03: The entry is what to_data() returns, its members in order. The id is at the head of waiting."""
    queue = make_queue(is_worker=False)
    first = await queue.create_job({"ü": [1, 2.5, None, {}]}).save()
    second = queue.create_job({"b": 1, "a": []}).retries(2).backoff("fixed", 100).timeout(timedelta(seconds=5))
    await second.save()
    entries = await redis.hgetall(queue.to_key("jobs"))
    assert entries == {"1": first.to_data(), "2": second.to_data()}
    assert second.to_data() == (
        '{"data":{"b":1,"a":[]},"options":{"timestamp":TIMESTAMP,"stacktraces":[],"retries":2,'
        '"backoff":{"strategy":"fixed","delay":100},"timeout":5000},"status":"created","progress":0}'
    ).replace("TIMESTAMP", str(second.options["timestamp"]))
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["2", "1"]


async def test_ids_of_ones_own(make_queue: MakeQueue, redis: Any) -> None:
    """S-05, S-06, QK-51: The job is stored under that id. An id in use changes nothing; automatic ids skip it."""
    queue = make_queue(is_worker=False)
    assert (await queue.create_job({"n": 1}).set_id("1").save()).id == "1"
    assert (await queue.create_job({"n": 2}).set_id("1").save()).id is None
    assert (await queue.create_job({"n": 3}).save()).id == "2"
    assert json.loads(await redis.hget(queue.to_key("jobs"), "1"))["data"] == {"n": 1}
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["2", "1"]


async def test_two_queues_on_one_server_do_not_mix(make_queue: MakeQueue, name: str) -> None:
    one, other = make_queue(), make_queue(f"{name}-other")
    ones, others = Seen(), Seen()
    one.on("job succeeded", ones)
    other.on("job succeeded", others)
    await asyncio.gather(one.ready(), other.ready())
    jobs = [queue.create_job(queue.name) for queue in (one, other) for _ in range(20)]
    await asyncio.gather(*(job.save() for job in jobs))
    one.process(echo, 3)
    other.process(echo, 3)
    assert {result for _, result in await ones.reaches(20)} == {one.name}
    assert {result for _, result in await others.reaches(20)} == {other.name}


async def test_jobs_are_handled_in_the_order_of_their_saves(make_queue: MakeQueue) -> None:
    """P-10, P-14"""
    queue = make_queue()
    await asyncio.gather(*(queue.create_job(number).save() for number in range(1, 21)))
    done = Seen()
    queue.on("succeeded", lambda job, result: done(result))
    queue.process(echo)
    assert [result for (result,) in await done.reaches(20)] == list(range(1, 21))


async def test_concurrency_is_a_limit_and_is_reached(make_queue: MakeQueue) -> None:
    """P-11, P-20"""
    queue = make_queue()
    gate, seen = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        seen(queue.running)
        await gate.wait()

    done = Seen()
    queue.on("succeeded", done)
    await asyncio.gather(*(queue.create_job({}).save() for _ in range(20)))
    queue.process(handler, 5)
    await seen.reaches(5)
    assert queue.running == 5
    gate.set()
    await done.reaches(20)
    assert max(running for (running,) in seen.calls) == 5
    assert queue.running == 0


async def test_several_workers_share_the_jobs(make_queue: MakeQueue) -> None:
    """P-13: Each job runs exactly once."""
    producer = make_queue(is_worker=False, get_events=False)
    done = Seen()
    for _ in range(3):
        worker = make_queue(get_events=False)
        worker.on("succeeded", lambda job, result: done(job.id))
        worker.process(echo, 2)
    saved = await asyncio.gather(*(producer.create_job({}).save() for _ in range(200)))
    await done.reaches(200)
    assert sorted(job_id for (job_id,) in done.calls) == sorted(job.id or "" for job in saved)


@both_orderings
async def test_no_event_of_a_burst_is_lost_on_one_socket(make_queue: MakeQueue, ordered: bool) -> None:
    """The race: with one socket every job receives its end and nothing stays bound; with two, some may not."""
    producer = make_queue(is_worker=False, ordered_events=ordered)
    worker = make_queue(get_events=False, remove_on_success=True)
    worker.process(echo, 4)
    of_queue, of_jobs = Seen(), Seen()
    producer.on("job succeeded", of_queue)
    await asyncio.gather(producer.ready(), worker.ready())

    async def chain() -> None:
        for _ in range(300):
            job = producer.create_job({})
            job.on("succeeded", of_jobs)
            await job.save()

    await asyncio.gather(*(chain() for _ in range(7)))
    await of_queue.reaches(2100)
    lost = 2100 - len(of_jobs.calls)
    assert len(producer.jobs) == lost
    if ordered:
        assert lost == 0


# --- failing -----------------------------------------------------------------------------------------------------------


async def test_failure(make_queue: MakeQueue, redis: Any) -> None:
    """P-03, EV-02, EV-22, P-05: Local events carry the error itself, remote ones its message. The entry has the trace."""
    queue = make_queue()
    error = ValueError("fail!")

    async def handler(job: Job) -> None:
        raise error

    log: list[tuple[Any, ...]] = []
    queue.on("failed", lambda job, err: log.append(("failed", job.status, err)))
    queue.on("failed:fatal", lambda job, err: log.append(("failed:fatal", job.status, err)))
    of_queue, of_job = Seen(), Seen()
    queue.on("job failed", of_queue)
    job = queue.create_job({})
    job.on("failed", of_job)
    await job.save()
    queue.process(handler)
    with pytest.raises(JobFailed, match=r"^fail!$"):
        await job.result()
    await until(lambda: len(log) == 2)
    assert log == [("failed", "failed", error), ("failed:fatal", "failed", error)]
    ((job_id, of_queue_error),) = of_queue.calls
    assert job_id == "1"
    assert of_job.calls == [(of_queue_error,)]
    entry = json.loads(await redis.hget(queue.to_key("jobs"), "1"))
    assert entry["status"] == "failed"
    assert "ValueError: fail!" in entry["options"]["stacktraces"][0]
    assert await redis.smembers(queue.to_key("failed")) == {"1"}


async def test_retries(make_queue: MakeQueue) -> None:
    """B-01, EV-03, EV-24: There are retries + 1 attempts: retrying, then failed. The producer's object follows."""
    queue = make_queue()
    log: list[tuple[str, str]] = []

    async def handler(job: Job) -> str:
        if job.options["retries"]:
            raise ValueError("not yet")
        return "at last"

    for event in ("retrying", "failed", "failed:fatal", "succeeded"):
        queue.on(event, lambda job, outcome, event=event: log.append((event, str(outcome))))
    job = queue.create_job({}).retries(2)
    remote = Seen()
    for event in ("retrying", "failed", "succeeded"):
        job.on(event, lambda outcome, event=event: remote(event, str(outcome)))
    await job.save()
    queue.process(handler)
    assert await job.result() == "at last"
    again = [("retrying", "not yet"), ("failed", "not yet")]
    await until(lambda: log == [*again, *again, ("succeeded", "at last")])
    assert remote.calls == [("retrying", "not yet"), ("retrying", "not yet"), ("succeeded", "at last")]
    assert job.options["retries"] == 0


async def test_a_delayed_retry_waits_in_delayed(make_queue: MakeQueue, redis: Any) -> None:
    """B-04, B-08, B-12: With fixed backoff it waits in delayed with status retrying, and is raised when due."""
    worker = make_queue()
    attempts: list[int] = []

    async def handler(job: Job) -> None:
        attempts.append(now_ms())
        if len(attempts) == 1:
            raise ValueError

    retrying = Seen()
    worker.on("retrying", retrying)
    job = await worker.create_job({}).retries(1).backoff("fixed", 100).save()
    worker.process(handler)
    await retrying.reaches(1)
    ((_, due),) = await redis.zrange(worker.to_key("delayed"), 0, -1, withscores=True)
    assert json.loads(await redis.hget(worker.to_key("jobs"), "1"))["status"] == "retrying"
    make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True)
    await job.result()
    assert due >= attempts[0] + 100
    assert attempts[1] >= due


async def test_a_retry_does_not_go_straight_back_to_its_worker(make_queue: MakeQueue) -> None:
    queue = make_queue()
    order: list[str] = []

    async def handler(job: Job) -> None:
        order.append(job.data)
        if order == ["a"]:
            raise ValueError

    jobs = [queue.create_job(data).retries(1) for data in "ab"]
    for job in jobs:
        await job.save()
    queue.process(handler)
    await jobs[0].result()
    assert order == ["a", "b", "a"]


async def test_timeout(make_queue: MakeQueue) -> None:
    """T-01, T-02: It has its own message, is a failure like others, and cancels the handler."""
    queue = make_queue()
    cancelled = Seen()

    async def handler(job: Job) -> str:
        if job.options["retries"]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled()
                raise
        return "in time"

    retrying = Seen()
    job = queue.create_job({}).timeout(10).retries(1)
    job.on("retrying", retrying)
    await job.save()
    queue.process(handler)
    assert await job.result() == "in time"
    assert [str(error) for (error,) in retrying.calls] == ["Job 1 timed out (10 ms)"]
    assert len(cancelled.calls) == 1


async def test_a_time_out_of_the_handlers_own_is_not_the_jobs(make_queue: MakeQueue) -> None:
    queue = make_queue()

    async def handler(job: Job) -> None:
        raise TimeoutError("mine")

    job = await queue.create_job({}).timeout(60_000).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match=r"^mine$"):
        await job.result()


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError("mine"), KeyboardInterrupt("mine"), SystemExit("mine"), GeneratorExit("mine")]
)
async def test_every_exception_fails_the_job_and_nothing_else(make_queue: MakeQueue, error: BaseException) -> None:
    queue = make_queue()

    async def handler(job: Job) -> str:
        if job.data == "bad":
            raise error
        return "good"

    bad = await queue.create_job("bad").save()
    good = await queue.create_job("good").save()
    queue.process(handler)
    with pytest.raises(JobFailed, match=r"^mine$"):
        await bad.result()
    assert await good.result() == "good"


async def test_a_handler_that_cancels_itself_fails_its_job(make_queue: MakeQueue) -> None:
    queue = make_queue()

    async def handler(job: Job) -> str:
        if job.data == "bad":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(60)
        return "good"

    bad, good = await queue.create_job("bad").save(), await queue.create_job("good").save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="^CancelledError$"):
        await bad.result()
    assert await good.result() == "good"


async def test_a_result_that_json_cannot_carry_fails_the_job(make_queue: MakeQueue) -> None:
    """QK-20: It does not run the job again and again."""
    queue = make_queue()
    runs = Seen()

    async def handler(job: Job) -> object:
        runs()
        return object()

    job = await queue.create_job({}).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="not JSON serializable"):
        await job.result()
    assert len(runs.calls) == 1


async def test_a_job_that_its_handler_made_unwritable_is_settled_as_it_was_stored(make_queue: MakeQueue, redis: Any) -> None:
    """QK-20"""
    queue = make_queue()

    async def handler(job: Job) -> None:
        job.data = object()

    job = await queue.create_job({"n": 1}).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="not JSON serializable"):
        await job.result()
    assert json.loads(await redis.hget(queue.to_key("jobs"), "1"))["data"] == {"n": 1}


async def test_a_plain_function_runs_in_a_thread(make_queue: MakeQueue) -> None:
    queue = make_queue()
    here = threading.get_ident()
    both = threading.Barrier(2, timeout=10)

    def handler(job: Job) -> bool:
        both.wait()  # needs both jobs at once
        return threading.get_ident() != here

    jobs = [await queue.create_job({}).save() for _ in range(2)]
    queue.process(handler, 2)
    assert [await job.result() for job in jobs] == [True, True]


# --- finish: one step --------------------------------------------------------------------------------------------------


async def test_finish_is_one_step(make_queue: MakeQueue, redis: Any) -> None:
    """EV-05: When an event arrives everything else is written, and the next job has been taken."""
    worker = make_queue(get_events=False)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started(job.id)
        if job.id == "2":
            await gate.wait()

    producer = make_queue(is_worker=False)
    await asyncio.gather(*(producer.create_job({}).save() for _ in range(3)))
    snapshot: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    @producer.once("job succeeded")
    async def look(job_id: str, result: Any) -> None:
        pipeline = redis.pipeline()
        pipeline.lrange(worker.to_key("active"), 0, -1)
        pipeline.lrange(worker.to_key("waiting"), 0, -1)
        pipeline.smembers(worker.to_key("succeeded"))
        snapshot.set_result(await pipeline.execute())

    worker.process(handler)
    assert await snapshot == [["2"], ["3"], {"1"}]
    gate.set()
    await started.reaches(3)
    await until(lambda: not producer.jobs)


async def test_a_job_removed_while_it_runs_does_not_come_back(make_queue: MakeQueue, redis: Any) -> None:
    """QK-18: A late finish is reported, and nothing is written."""
    queue = make_queue()

    async def handler(job: Job) -> None:
        await redis.hdel(queue.to_key("jobs"), job.id)

    job = await queue.create_job({}).save()
    queue.process(handler)
    await until(lambda: queue.late_finishes == 1)
    assert "job 1" in str(make_queue.claim(LateFinish)[0])
    assert await redis.exists(queue.to_key("jobs"), queue.to_key("succeeded"), queue.to_key("active")) == 0
    assert queue.jobs == {"1": job}


async def test_an_id_without_data_is_dropped(make_queue: MakeQueue, redis: Any) -> None:
    """RM-07, QK-16: Whether a blocking take or a finish meets it."""
    queue = make_queue()
    await redis.lpush(queue.to_key("waiting"), "ghost-1")
    first = await queue.create_job(1).save()
    await redis.lpush(queue.to_key("waiting"), "ghost-2")
    second = await queue.create_job(2).save()
    queue.process(echo)
    assert await first.result() == 1
    assert await second.result() == 2
    assert await redis.exists(queue.to_key("waiting"), queue.to_key("active")) == 0


@pytest.mark.parametrize("entry", ["not json", "[]", '{"data":{},"options":[]}'])
async def test_an_unreadable_job_goes_to_failed(make_queue: MakeQueue, redis: Any, entry: str) -> None:
    """QK-23"""
    queue = make_queue()
    await redis.hset(queue.to_key("jobs"), "poison", entry)
    await redis.lpush(queue.to_key("waiting"), "poison")
    good = await queue.create_job("good").save()
    queue.process(echo)
    assert await good.result() == "good"
    assert len(make_queue.claim(UnreadableData)) == 1
    assert await redis.smembers(queue.to_key("failed")) == {"poison"}
    assert await redis.hget(queue.to_key("jobs"), "poison") == entry


async def test_removed_when_done(make_queue: MakeQueue, redis: Any) -> None:
    """RO-01 to RO-05"""
    producer = make_queue(is_worker=False)
    worker = make_queue(get_events=False, remove_on_success=True, remove_on_failure=True)

    async def handler(job: Job) -> None:
        if job.data == "bad":
            raise ValueError("bad")

    good, bad = await producer.create_job("good").save(), await producer.create_job("bad").save()
    worker.process(handler)
    assert await good.result() is None
    with pytest.raises(JobFailed):
        await bad.result()
    assert await redis.exists(*(producer.to_key(key) for key in ("jobs", "succeeded", "failed", "active"))) == 0


# --- events and progress -----------------------------------------------------------------------------------------------


@both_orderings
async def test_progress(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """PR-02, PR-04, PR-05, EV-23"""
    queue = make_queue(ordered_events=ordered)

    async def handler(job: Job) -> None:
        assert await job.report_progress({"a": 20}) == 1
        assert job.progress == {"a": 20}

    log: list[Any] = []
    queue.on("job progress", lambda job_id, value: log.append((job_id, value)))
    job = queue.create_job({})
    job.on("progress", lambda value: log.append((job.progress, value)))
    await job.save()
    queue.process(handler)
    await job.result()
    assert log == [("1", {"a": 20}), ({"a": 20}, {"a": 20})]
    assert json.loads(await redis.hget(queue.to_key("jobs"), "1"))["progress"] == {"a": 20}


async def test_progress_of_nothing_is_refused(make_queue: MakeQueue) -> None:
    """PR-01, QK-45"""
    queue = make_queue()
    job = queue.create_job({})
    with pytest.raises(ValueError, match="^Progress cannot be empty$"):
        await job.report_progress(None)
    with pytest.raises(BeeQueueError, match="^a job without an id cannot report progress: save it first$"):
        await job.report_progress(1)


async def test_garbage_on_the_channels_stops_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """QK-38, DL-11"""
    queue = await make_queue(activate_delayed_jobs=True).ready()
    for garbage in (b"not json", b"null", b"\xff", b'{"id":5}'):
        await redis.publish(queue.to_key("events"), garbage)
        await redis.publish(queue.to_key("earlierDelayed"), garbage)
    job = await queue.create_job("good").save()
    queue.process(echo)
    assert await job.result() == "good"
    assert len(make_queue.claim(UnreadableData)) == 4


async def test_a_listener_that_raises_is_reported(make_queue: MakeQueue) -> None:
    """QK-37, ER-03: The other listeners are called, and the job is unbound."""
    queue = make_queue()

    def bad(*args: Any) -> None:
        raise RuntimeError("mine")

    async def worse(*args: Any) -> None:
        raise RuntimeError("mine too")

    job = queue.create_job({})
    for emitter, event in ((queue, "job succeeded"), (queue, "succeeded"), (job, "succeeded")):
        emitter.on(event, bad)
        emitter.on(event, worse)
    await job.save()
    queue.process(echo)
    await job.result()
    await until(lambda: len(make_queue.errors) == 6)
    assert len(make_queue.claim(ListenerFailed)) == 6
    assert queue.jobs == {}


async def test_flags(make_queue: MakeQueue) -> None:
    """EV-25, EV-26, SJ-02: Without get_events, send_events or store_jobs the job's own event does not come."""
    deaf = make_queue(is_worker=False, get_events=False)
    forgetful = make_queue(is_worker=False, store_jobs=False)
    worker = make_queue(send_events=False)
    done, remote = Seen(), Seen()
    worker.on("succeeded", done)
    forgetful.on("job succeeded", remote)
    for queue in (deaf, forgetful):
        job = queue.create_job({})
        job.on("succeeded", remote)
        await job.save()
        with pytest.raises(BeeQueueError, match="needs a queue with get_events and store_jobs"):
            await job.result()
    worker.process(echo)
    await done.reaches(2)
    assert remote.calls == []
    assert forgetful.jobs == {}


# --- opening and closing -----------------------------------------------------------------------------------------------


async def test_ready(make_queue: MakeQueue) -> None:
    """R-01, R-04, R-07, R-08, C-06: It returns the queue itself; `ready` comes once, also for a listener added after
    construction.
    """
    queue = make_queue()
    seen = Seen()
    queue.on("ready", seen)
    assert await queue.ready() is queue
    assert await queue.connect() is True
    assert await queue.ready() is queue
    await seen.reaches(1)
    assert seen.calls == [()]


async def test_auto_connect_off(make_queue: MakeQueue) -> None:
    """C-07, QK-03"""
    queue = make_queue(auto_connect=False)
    assert await queue.ready() is queue
    with pytest.raises(NotConnected, match="connect"):
        await queue.create_job({}).save()
    await queue.connect()
    assert (await queue.create_job({}).save()).id == "1"
    unopened = make_queue(auto_connect=False)
    await unopened.close()
    await unopened.close()


def test_made_outside_a_loop_it_connects_at_first_use(url: str, name: str) -> None:
    queue = Queue(name, url)

    async def use() -> None:
        async with queue:
            job = await queue.create_job("x").save()
            queue.process(echo)
            assert await job.result() == "x"

    asyncio.run(use())

    async def use_again() -> None:
        with pytest.raises(QueueClosed, match="^closed$"):
            await queue.create_job({}).save()

    asyncio.run(use_again())


async def test_another_loop_is_refused(make_queue: MakeQueue) -> None:
    queue = await make_queue().ready()

    def elsewhere() -> str:
        with pytest.raises(WrongLoop) as caught:
            asyncio.run(queue.create_job({}).save())
        return str(caught.value)

    assert queue.name in await asyncio.to_thread(elsewhere)


async def test_results_that_cannot_come_are_refused(make_queue: MakeQueue) -> None:
    """For a job that was not saved, and for a queue that closes first."""
    queue = make_queue()
    with pytest.raises(BeeQueueError, match="for a job that this queue has saved"):
        await queue.create_job({}).set_id("own").result()
    waiting = asyncio.create_task((await queue.create_job({}).save()).result())
    await asyncio.sleep(0)
    await queue.close()
    with pytest.raises(QueueClosed):
        await waiting


async def test_process_is_checked(make_queue: MakeQueue) -> None:
    """P-06, P-07, P-08, QK-27"""
    queue = make_queue()
    with pytest.raises(BeeQueueError, match="^Cannot call Queue#process on a non-worker$"):
        make_queue(is_worker=False).process(echo)
    with pytest.raises(TypeError, match="handler must be callable, not 3"):
        queue.process(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="concurrency must be at least 1, not 0"):
        queue.process(echo, 0)
    with pytest.raises(TypeError, match=r"concurrency must be an int, not 1\.5"):
        queue.process(echo, 1.5)  # type: ignore[arg-type]
    assert queue.process(echo) is queue
    with pytest.raises(BeeQueueError, match="^Cannot call Queue#process twice$"):
        queue.process(echo)
    await queue.close()
    closed = make_queue()
    await closed.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        closed.process(echo)


async def test_close_waits_for_handlers_and_starts_no_more(make_queue: MakeQueue, redis: Any) -> None:
    """CL-08, CL-09, C-18: The result is written and published; saving works meanwhile; the second job stays."""
    queue = make_queue()
    gate, started, done = asyncio.Event(), Seen(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    queue.on("succeeded", done)
    queue.process(handler)
    await queue.create_job({}).save()
    await started.reaches(1)
    closing = asyncio.create_task(queue.close())
    await asyncio.sleep(0)
    assert queue.is_running() is False
    await queue.create_job({}).save()
    gate.set()
    await closing
    assert len(done.calls) == len(started.calls) == 1
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["2"]
    assert await redis.exists(queue.to_key("active")) == 0
    with pytest.raises(QueueClosed):
        await queue.create_job({}).save()


async def test_close_past_its_time_out_hands_back(make_queue: MakeQueue, redis: Any) -> None:
    """CL-11, CL-03: It raises, twice the same. Handlers are cancelled; the oldest job is the next to be taken."""
    queue = make_queue()
    started = Seen()

    async def handler(job: Job) -> None:
        started()
        await asyncio.sleep(60)

    for _ in range(4):
        await queue.create_job({}).save()
    queue.process(handler, 3)
    await started.reaches(3)
    for _ in range(2):
        with pytest.raises(OperationTimedOut, match=r"^Operation timed out\.$"):
            await queue.close(10)
    assert len(make_queue.claim(OperationTimedOut)) == 0
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["4", "3", "2", "1"]
    assert await redis.exists(queue.to_key("active"), queue.to_key("stalling")) == 0
    make_queue.queues.remove(queue)


async def test_closing_under_load_loses_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """CL-07, QK-31: A job that is being taken goes back; every job runs."""
    producer = make_queue(is_worker=False)
    jobs: list[Job] = []
    stop = asyncio.Event()

    async def produce() -> None:
        while not stop.is_set():
            jobs.append(await producer.create_job({}).save())

    producing = asyncio.create_task(produce())
    for _ in range(10):
        worker = make_queue(get_events=False, remove_on_success=True)
        worker.process(echo, 3)
        await worker.ready()
        enough = len(jobs) + 20
        await until(partial(_longer, jobs, enough))
        await worker.close()
        assert await redis.exists(producer.to_key("active")) == 0
    stop.set()
    await producing
    make_queue(get_events=False, remove_on_success=True).process(echo)
    await asyncio.gather(*(job.result(timeout=10_000) for job in jobs))
    assert producer.jobs == {}


async def test_a_handler_cannot_close_its_queue(make_queue: MakeQueue) -> None:
    """QK-30"""
    queue = make_queue()

    async def handler(job: Job) -> None:
        await queue.close()

    job = await queue.create_job({}).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="cannot close its own queue"):
        await job.result()


async def test_an_idle_worker_closes_at_once(make_queue: MakeQueue) -> None:
    """The open take is ended, not waited for."""
    queue = make_queue()
    queue.process(echo)
    await (await queue.create_job({}).save()).result()
    started = asyncio.get_running_loop().time()
    await queue.close()
    assert asyncio.get_running_loop().time() - started < 2  # a take lasts 5 s


async def test_run_returns_when_the_queue_is_closed(make_queue: MakeQueue) -> None:
    queue = make_queue()
    running = asyncio.create_task(queue.run(echo))
    job = await queue.create_job("x").save()
    assert await job.result() == "x"
    assert not running.done()
    await queue.close()
    await running


# --- the two clocks ----------------------------------------------------------------------------------------------------


async def test_delayed_jobs(make_queue: MakeQueue, redis: Any) -> None:
    """S-04, DL-01, DL-02, J-09: Not before its time; `raised jobs` comes; nothing is in waiting until then."""
    queue = make_queue(activate_delayed_jobs=True)
    raised = Seen()
    queue.on("raised jobs", raised)
    handled: list[int] = []

    async def handler(job: Job) -> None:
        handled.append(now_ms())

    due = now_ms() + 300
    job = await queue.create_job({}).delay_until(due).save()
    assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == [("1", due)]
    queue.process(handler)
    await job.result()
    assert raised.calls == [(1,)]
    assert handled[0] >= due


async def test_what_became_due_while_nobody_looked_is_raised(make_queue: MakeQueue, redis: Any) -> None:
    """QK-58: At the start, also by a queue that never processes."""
    worker = make_queue()
    job = await worker.create_job({}).delay_until(datetime.fromtimestamp(now_ms() / 1000 + 60, UTC)).save()
    await redis.zadd(worker.to_key("delayed"), {job.id: 1})
    worker.process(echo)
    make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True)
    await job.result()


async def test_many_due_jobs_are_raised_in_slices(make_queue: MakeQueue, redis: Any) -> None:
    """DL-13: More than 8000, in order."""
    queue = await make_queue(is_worker=False).ready()
    await redis.zadd(queue.to_key("delayed"), {f"{number:05}": 5 for number in range(9000)})
    activator = make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True)
    raised = Seen()
    activator.on("raised jobs", raised)
    assert await raised.reaches(5) == [(2000,)] * 4 + [(1000,)]
    waiting = await redis.lrange(queue.to_key("waiting"), 0, -1)
    assert waiting == sorted(waiting, reverse=True)
    await redis.delete(queue.to_key("waiting"))


async def test_stalled_jobs_are_found_by_the_second_check(make_queue: MakeQueue, redis: Any) -> None:
    """ST-06, ST-12, ST-13, ST-14, EV-07: 9000 of them; a check within the interval does nothing."""
    queue = make_queue(is_worker=False, stall_interval=5000)
    stalled = Seen()
    queue.on("stalled", stalled)
    await queue.ready()
    await redis.lpush(queue.to_key("active"), *range(9000))
    await redis.lpush(queue.to_key("waiting"), "new")
    assert await queue.check_stalled_jobs() == 0
    assert await queue.check_stalled_jobs() == 0
    assert 0 < await redis.pttl(queue.to_key("stallBlock")) <= 5000
    await redis.delete(queue.to_key("stallBlock"))
    await redis.srem(queue.to_key("stalling"), 5)
    assert await queue.check_stalled_jobs() == 8999
    assert len(stalled.calls) == 8999
    assert await redis.lrange(queue.to_key("active"), 0, -1) == ["5"]
    assert await redis.smembers(queue.to_key("stalling")) == {"5"}
    assert await redis.lindex(queue.to_key("waiting"), -1) == "new"
    await redis.delete(queue.to_key("active"), queue.to_key("waiting"))


async def test_a_living_worker_keeps_its_jobs(make_queue: MakeQueue) -> None:
    """ST-16, P-19: Over several stall intervals, while another worker checks."""
    queue = make_queue(stall_interval=60)
    checker = make_queue(stall_interval=60)
    checks, stalled = Seen(), Seen()
    checker.on("stalled", stalled)
    gate = asyncio.Event()

    async def handler(job: Job) -> str:
        checks()
        await gate.wait()
        return "once"

    job = await queue.create_job({}).save()
    queue.process(handler)
    await checks.reaches(1)
    await checker.check_stalled_jobs(20)
    key = queue.to_key("stalling")
    async with Redis.from_url(make_queue.url) as redis:
        for _ in range(5):  # in the snapshot, and out of it again
            await until(lambda: redis.sismember(key, "1"))
            await until(lambda: _negated(redis.sismember(key, "1")))
    gate.set()
    assert await job.result() == "once"
    assert stalled.calls == []
    assert len(checks.calls) == 1


def _longer(jobs: list[Job], count: int) -> bool:
    return len(jobs) > count


async def _negated(awaitable: Any) -> bool:
    return not await awaitable
