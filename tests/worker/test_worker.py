"""Workers: the jobs they take, what a handler gets and may change, how a job ends, and how its end may fail."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import (
    CommandError,
    ConnectionLost,
    Job,
    JobFailed,
    JobTimeout,
    LateFinish,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    OutcomeNotRecorded,
    Queue,
    UnreadableData,
)
from beequeue.job import now_ms
from beequeue.store.scripts import SCRIPTS
from beequeue.worker import exchange as exchange_module
from beequeue.worker.attempt import Handler
from harness.server import Server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import said, soon
from tests.relay import Line, Relay

either_kind = pytest.mark.parametrize("kind", ["async def", "def"])


# --- taking ------------------------------------------------------------------------------------------------------------


async def test_one_job_at_a_time_by_default(make_queue: MakeQueue, redis: Any) -> None:
    """P-09, P-20"""
    queue = make_queue()
    gate, running, done = asyncio.Event(), Seen(), Seen()

    async def handler(job: Job) -> None:
        running(queue.running)
        await gate.wait()

    queue.on("succeeded", done)
    for _ in range(3):
        await queue.create_job({}).save()
    assert queue.process(handler) is queue
    assert queue.running == 0
    await running.reaches(1)
    await queue.create_job({}).save()
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["4", "3", "2"]
    gate.set()
    await done.reaches(4)
    assert running.calls == [(1,)] * 4
    assert queue.running == 0


async def test_jobs_of_one_length_end_in_order(make_queue: MakeQueue) -> None:
    """P-11: five at once"""
    queue = make_queue()
    inside, most, ended = 0, 0, Seen()

    async def handler(job: Job) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1

    queue.on("succeeded", lambda job, result: ended(job.id))
    assert await queue.save_all(queue.create_job({}) for _ in range(20)) == {}
    queue.process(handler, 5)
    assert await ended.reaches(20) == [(str(number),) for number in range(1, 21)]
    assert most == 5


async def test_jobs_saved_at_random_times_never_exceed_the_concurrency(make_queue: MakeQueue) -> None:
    """P-09, P-12: all of them run"""
    queue = make_queue()
    chance = random.Random(12)
    inside, most, done = 0, 0, Seen()

    async def handler(job: Job) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(chance.random() / 50)
        inside -= 1

    async def save_some_time() -> None:
        await asyncio.sleep(chance.random() / 20)
        await queue.create_job({}).save()

    queue.on("succeeded", lambda job, result: done(job.id))
    queue.process(handler, 5)
    await asyncio.gather(*(save_some_time() for _ in range(40)))
    await done.reaches(40)
    assert sorted(int(job_id) for (job_id,) in done.calls) == list(range(1, 41))
    assert most == 5


async def test_a_worker_that_starts_does_not_get_a_job_that_runs_elsewhere(make_queue: MakeQueue, redis: Any) -> None:
    """P-15, ST-13: nor does its first stall check move it"""
    busy, fresh = make_queue(), make_queue()
    gate, by_busy, by_fresh = asyncio.Event(), Seen(), Seen()

    async def hold(job: Job) -> None:
        by_busy(job.id)
        await gate.wait()

    async def note(job: Job) -> None:
        by_fresh(job.id)

    first = await busy.create_job({}).save()
    busy.process(hold)
    await by_busy.reaches(1)
    await redis.delete(busy.to_key("stallBlock"))
    fresh.process(note)
    await busy.create_job({}).save()
    assert await by_fresh.reaches(1) == [("2",)]
    gate.set()
    await first.result()
    assert (by_busy.calls, by_fresh.calls) == ([("1",)], [("2",)])


async def test_how_ids_move(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """P-16: from the tail of `waiting` to the head of `active` in one command; a finish takes the next; an idle worker waits"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, stalled_check_interval=10)
        gates, started, done = [asyncio.Event() for _ in range(3)], Seen(), Seen()

        async def handler(job: Job) -> None:
            started(job.id)
            await gates[int(job.id or "") - 1].wait()

        async def lists() -> list[list[str]]:
            return [await redis.lrange(worker.to_key(key), 0, -1) for key in ("active", "waiting")]

        worker.on("succeeded", done)
        for _ in range(3):
            await worker.create_job({}).save()
        worker.process(handler, 2)
        await started.reaches(2)
        assert await lists() == [["2", "1"], ["3"]]
        gates[0].set()
        await started.reaches(3)
        assert await lists() == [["3", "2"], []]
        assert said(relay, b"BRPOPLPUSH") == 1
        for gate in gates:
            gate.set()
        await done.reaches(3)
        checks = said(relay, _sha("check_stalled_jobs"))
        await until(lambda: said(relay, _sha("check_stalled_jobs")) >= checks + 5)
        assert said(relay, b"BRPOPLPUSH") == 2
        assert _reads(relay) == {"take": 2}
        await worker.close()


async def test_one_take_is_open_however_many_slots_are_free(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """P-18: with its job come as many others as there are free slots"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, stalled_check_interval=10)
        gate, started, done = asyncio.Event(), Seen(), Seen()

        async def handler(job: Job) -> None:
            started(job.id)
            await gate.wait()

        worker.on("succeeded", done)
        worker.process(handler, 5)
        await until(lambda: said(relay, b"BRPOPLPUSH") == 1)
        checks = said(relay, _sha("check_stalled_jobs"))
        await until(lambda: said(relay, _sha("check_stalled_jobs")) >= checks + 3)
        assert said(relay, b"BRPOPLPUSH") == 1
        await _make_available(redis, worker, *"abcdefg")
        assert [job_id for (job_id,) in await started.reaches(5)] == [*"abcde"]
        assert await redis.lrange(worker.to_key("waiting"), 0, -1) == ["g", "f"]
        assert said(relay, b"BRPOPLPUSH") == 1
        assert _reads(relay) == {"take": 1}
        gate.set()
        await done.reaches(7)
        checks = said(relay, _sha("check_stalled_jobs"))
        await until(lambda: said(relay, _sha("check_stalled_jobs")) >= checks + 3)
        assert said(relay, b"BRPOPLPUSH") == 2
        await worker.close()


async def test_processing_begins_with_a_stall_check(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """P-17, ST-15: `stalled` fires for the jobs that it finds, before the first take"""
    async with Relay(url) as relay:
        worker = await make_queue(redis=relay.url, stalled_check_interval=0).ready()
        log = Seen()
        worker.on("stalled", lambda job_id: log("stalled", job_id))

        async def handler(job: Job) -> None:
            log("handled", job.id)

        waiting = await worker.create_job({}).save()
        await _make_available(redis, worker, "lost", "gone")
        for _ in range(2):
            await redis.lmove(worker.to_key("waiting"), worker.to_key("active"), "LEFT", "LEFT")
        await redis.sadd(worker.to_key("stalling"), "lost", "gone")
        relay.hold("command")
        worker.process(handler)
        await until(lambda: redis.exists(worker.to_key("stallBlock")))
        await worker.create_job({}).save()
        assert said(relay, b"BRPOPLPUSH") == 0
        relay.release("command")
        await log.reaches(6)
        assert sorted(log.calls[:2]) == [("stalled", "gone"), ("stalled", "lost")]
        assert log.calls[2] == ("handled", waiting.id)
        assert sorted(log.calls[3:]) == [("handled", "2"), ("handled", "gone"), ("handled", "lost")]
        assert said(relay, _sha("check_stalled_jobs")) == 1
        await worker.close()


async def test_process_before_the_queue_is_ready(make_queue: MakeQueue) -> None:
    """P-26"""
    queue = make_queue()
    ready = Seen()
    queue.on("ready", ready)
    queue.process(echo)
    assert ready.calls == []
    assert await (await queue.create_job("x").save()).result() == "x"
    assert len(ready.calls) == 1


async def test_process_before_connect(make_queue: MakeQueue) -> None:
    """QK-03: with auto_connect=False it raises like other calls, and may be called again"""
    queue = make_queue(auto_connect=False)
    with pytest.raises(NotConnected, match="connect"):
        queue.process(echo)
    await queue.connect()
    queue.process(echo)
    assert await (await queue.create_job("x").save()).result(timeout=2_000) == "x"


async def test_a_worker_goes_on_however_a_handler_ends(make_queue: MakeQueue) -> None:
    """P-25, P-27, ER-04: a failure or a time-out is no `error`, and the worker takes the next job"""
    queue = make_queue()

    async def handler(job: Job) -> Any:
        if job.data == "fail":
            raise ValueError("mine")
        if job.data == "hang":
            await asyncio.Event().wait()
        return job.data

    ended = Seen()
    queue.on("succeeded", lambda job, result: ended(job.id, job.data))
    queue.on("failed", lambda job, error: ended(job.id, job.data))
    order = ["good", "fail", "good", "hang", "fail", "hang", "good"]
    for data in order:
        await queue.create_job(data).timeout(10 if data == "hang" else 0).save()
    queue.process(handler)
    await ended.reaches(7)
    for number, data in enumerate(order, 8):  # one by one: no job waits when it ends
        await queue.create_job(data).timeout(10 if data == "hang" else 0).save()
        await ended.reaches(number)
    assert ended.calls == [(str(number), data) for number, data in enumerate(order * 2, 1)]
    assert make_queue.errors == []


async def test_a_heartbeat_is_one_command_for_all_jobs(make_queue: MakeQueue, url: str) -> None:
    """P-19: every half stall interval"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, stall_interval=100, stalled_check_interval=0)
        gate, started = asyncio.Event(), Seen()
        beats: list[tuple[float, list[bytes]]] = []

        def hear(line: Line, data: bytes) -> None:
            beats.extend((asyncio.get_running_loop().time(), beat.split()) for beat in data.split(b"*")[1:] if b"SREM" in beat)

        async def handler(job: Job) -> None:
            started()
            await gate.wait()

        await worker.save_all(worker.create_job({}) for _ in range(3))
        worker.process(handler, 3)
        await started.reaches(3)
        relay.said_on = hear
        await until(lambda: len(beats) == 3)
        gate.set()
        for _, beat in beats:
            command, key, *ids = beat[2::2]
            assert (command, key, sorted(ids)) == (b"SREM", worker.to_key("stalling").encode(), [b"1", b"2", b"3"])
        assert beats[-1][0] - beats[0][0] >= 0.05  # two half intervals, less the delay of the first one
        await worker.close()


# --- what a handler gets, and may change ---------------------------------------------------------------------------------


@either_kind
async def test_a_handler_gets_the_job_and_its_result_is_published(make_queue: MakeQueue, kind: str) -> None:
    """P-01, P-02, P-04, G-04: a job with an id of its own, found under it afterwards; `async def` or plain"""
    queue = make_queue()
    here, told, got = threading.get_ident(), Seen(), []

    def work(job: Job) -> str:
        got.append((job.id, job.data, threading.get_ident() != here))
        return "baz"

    queue.on("succeeded", lambda job, result: told(job, result))
    saved = await queue.create_job({"foo": "bar"}).set_id("amazing job").save()
    queue.process(_of_kind(kind, work))
    assert await saved.result() == "baz"
    ((job, result),) = await told.reaches(1)
    assert (job.id, job.data, result) == ("amazing job", {"foo": "bar"}, "baz")
    assert got == [("amazing job", {"foo": "bar"}, kind == "def")]
    found = await queue.get_job("amazing job")
    assert found is not None
    assert (found.id, found.data, found.status) == ("amazing job", {"foo": "bar"}, "succeeded")
    assert await found.is_in_set("succeeded")
    assert len(told.calls) == 1


@either_kind
async def test_an_exception_fails_the_job(make_queue: MakeQueue, redis: Any, kind: str) -> None:
    """P-03, P-04, P-05: listeners get the exception itself, and its trace is stored"""
    queue = make_queue()
    error, told = ValueError("fail!"), Seen()

    def work(job: Job) -> None:
        raise error

    queue.on("failed", told)
    job = await queue.create_job({"foo": "bar"}).save()
    queue.process(_of_kind(kind, work))
    with pytest.raises(JobFailed, match=r"^fail!$"):
        await job.result()
    ((failed, told_error),) = await told.reaches(1)
    assert told_error is error
    assert failed.data == {"foo": "bar"}
    (trace,) = (await _stored(redis, queue, "1"))["options"]["stacktraces"]
    assert trace.startswith("Traceback ")
    assert "in work" in trace
    assert trace.endswith("ValueError: fail!\n")
    assert await job.is_in_set("failed")


async def test_a_plain_function_that_returns_nothing_succeeds(make_queue: MakeQueue) -> None:
    """QK-28"""
    queue = make_queue()
    jobs = [await queue.create_job({}).save() for _ in range(2)]
    queue.process(lambda job: None)
    assert [await job.result() for job in jobs] == [None, None]
    assert await jobs[1].is_in_set("succeeded")
    assert queue.running == 0


async def test_kinds_of_handlers(make_queue: MakeQueue) -> None:
    """P-04: a callable object, async or not, is a handler too"""
    here = threading.get_ident()

    class Plain:
        def __call__(self, job: Job) -> bool:
            return threading.get_ident() == here

    class Async:
        async def __call__(self, job: Job) -> bool:
            return threading.get_ident() == here

    for handler, in_the_loop in ((Plain(), False), (Async(), True)):
        queue = make_queue()
        job = await queue.create_job({}).save()
        queue.process(handler)
        assert await job.result() is in_the_loop
        await queue.close()


async def test_a_handler_gets_a_job_of_its_own(make_queue: MakeQueue, redis: Any) -> None:
    """P-21: not the producer's object, though the queue is the same, and bound to no events"""
    queue, only_works = make_queue(), make_queue()
    got: list[Job] = []

    async def handler(job: Job) -> None:
        got.append(job)

    saved = await queue.create_job({"n": 1}).save()
    entry = await redis.hget(queue.to_key("jobs"), "1")
    await redis.hset(queue.to_key("jobs"), "1", entry.replace('{"n":1}', '{"n":2}'))
    queue.process(handler)
    await saved.result()
    assert got[0] is not saved
    assert (got[0].data, saved.data) == ({"n": 2}, {"n": 1})
    await queue.close()
    bound, done = Seen(), Seen()
    only_works.on("succeeded", lambda job, result: bound(dict(only_works.jobs)))
    only_works.on("job succeeded", done)
    only_works.process(handler)
    await make_queue(is_worker=False, get_events=False).create_job({}).save()
    await done.reaches(1)
    assert await bound.reaches(1) == [({},)]


async def test_a_result_is_published_and_not_stored(make_queue: MakeQueue, redis: Any) -> None:
    """P-22, QK-20: JSON must carry it"""
    queue = make_queue()

    async def handler(job: Job) -> Any:
        return {1, 2} if job.data == "set" else "a result like no other"

    good, bad = await queue.create_job({}).save(), await queue.create_job("set").save()
    queue.process(handler)
    assert await good.result() == "a result like no other"
    with pytest.raises(JobFailed, match="Type is not JSON serializable: set"):
        await bad.result()
    keys = [key async for key in redis.scan_iter(f"{queue.key_prefix}*")]
    assert {key.removeprefix(queue.key_prefix) for key in keys} == {"id", "jobs", "succeeded", "failed", "stallBlock"}
    assert "like no other" not in str(await redis.hgetall(queue.to_key("jobs")))


@either_kind
@pytest.mark.parametrize("end", ["succeeded", "failed", "retrying"])
async def test_a_handlers_changes_are_stored(make_queue: MakeQueue, redis: Any, kind: str, end: str) -> None:
    """P-23, J-18, PR-04: to data, options and progress, however it ends"""
    worker = make_queue()
    ended = Seen()

    def work(job: Job) -> None:
        job.data["n"] += 1
        job.data["new"] = ["ü"]
        job.options["own"] = {"kept": True}
        job.timeout(5000).retries(3).backoff("fixed", 60_000)
        job.progress = 99
        if end == "failed":
            job.retries(0)
        if end != "succeeded":
            raise ValueError

    worker.on(end, ended)
    job = await worker.create_job({"n": 1}).retries(1).save()
    worker.process(_of_kind(kind, work))
    await ended.reaches(1)
    entry = await _stored(redis, worker, "1")
    assert (entry["data"], entry["progress"], entry["status"]) == ({"n": 2, "new": ["ü"]}, 99, end)
    options = entry["options"]
    assert options["own"] == {"kept": True}
    assert (options["timeout"], options["backoff"]) == (5000, {"strategy": "fixed", "delay": 60_000})
    assert options["retries"] == {"succeeded": 3, "failed": 0, "retrying": 2}[end]
    assert await job.is_in_set("delayed" if end == "retrying" else end)


# --- retries -----------------------------------------------------------------------------------------------------------


@either_kind
@pytest.mark.parametrize("backoff", [None, {"strategy": "immediate"}])
async def test_retries_run_at_once(make_queue: MakeQueue, redis: Any, kind: str, backoff: dict[str, str] | None) -> None:
    """B-01, B-05, B-07, EV-03, EV-04, QK-47: the job of each attempt, and the events before the next; no delay is stored"""
    queue = make_queue()
    log: list[Any] = []
    ended = Seen()

    def work(job: Job) -> str:
        log.append(("attempt", job.status, job.options["retries"], len(job.options["stacktraces"])))
        assert job.options.get("backoff") == backoff
        if job.options["retries"]:
            raise ValueError("not yet")
        return "at last"

    def note(event: str) -> Callable[..., None]:
        def listen(job: Job, outcome: Any) -> None:
            log.append((event, job.status, job.options["retries"], job.options["stacktraces"][0].splitlines()[-1]))

        return listen

    for event in ("retrying", "failed", "failed:fatal"):
        queue.on(event, note(event))
    queue.on("succeeded", ended)
    job = queue.create_job({}).retries(2)
    if backoff:
        job.backoff("immediate")
    await job.save()
    queue.process(_of_kind(kind, work))
    assert await job.result() == "at last"
    await ended.reaches(1)
    line = "ValueError: not yet"
    assert log == [
        ("attempt", "created", 2, 0),
        ("retrying", "retrying", 1, line),
        ("failed", "retrying", 1, line),
        ("attempt", "retrying", 1, 1),
        ("retrying", "retrying", 0, line),
        ("failed", "retrying", 0, line),
        ("attempt", "retrying", 0, 2),
    ]
    assert not await redis.exists(queue.to_key("delayed"))


@either_kind
async def test_a_handler_may_give_up_its_retries(make_queue: MakeQueue, kind: str) -> None:
    """B-02, EV-02: then the job does not run again"""
    queue = make_queue()
    runs, fatal = Seen(), Seen()

    def work(job: Job) -> None:
        runs(job.data)
        if job.data == "first":
            job.retries(0)
            raise ValueError("enough")

    queue.on("retrying", runs)
    queue.on("failed:fatal", fatal)
    first, second = await queue.create_job("first").retries(5).save(), await queue.create_job("second").save()
    queue.process(_of_kind(kind, work))
    with pytest.raises(JobFailed, match="^enough$"):
        await first.result()
    await second.result()
    assert runs.calls == [("first",), ("second",)]
    assert len(fatal.calls) == 1


@pytest.mark.parametrize(
    ("strategy", "delays", "found"),
    [("fixed", [60, 60], [60, 60, 60]), ("exponential", [30, 60], [30, 60, 120]), ("own", [40, 40], [900_000] * 3)],
)
async def test_strategies(make_queue: MakeQueue, strategy: str, delays: list[int], found: list[int]) -> None:
    """B-03, B-04, B-06: how long each waits, and the backoff that each attempt gets"""
    queue = make_queue(activate_delayed_jobs=True, delayed_debounce=1)
    queue.backoff_strategies["own"] = lambda job: 40
    attempts: list[tuple[int, Any]] = []

    async def handler(job: Job) -> None:
        attempts.append((now_ms(), dict(job.options["backoff"])))
        if len(attempts) < 3:
            raise ValueError

    job = await queue.create_job({}).retries(2).backoff(strategy, found[0]).save()
    queue.process(handler)
    await job.result()
    assert [backoff for _, backoff in attempts] == [{"strategy": strategy, "delay": delay} for delay in found]
    starts = [start for start, _ in attempts]
    assert starts[1] - starts[0] >= delays[0]
    assert starts[2] - starts[1] >= delays[1]


async def test_a_strategy_must_be_known_where_the_job_runs(make_queue: MakeQueue) -> None:
    """B-08, QK-56: otherwise the failure is final, though retries are left"""
    producer, worker = make_queue(is_worker=False), make_queue()
    producer.backoff_strategies["own"] = lambda job: 0
    runs = Seen()

    async def handler(job: Job) -> None:
        runs()
        raise ValueError("mine")

    job = await producer.create_job({}).retries(3).backoff("own", 1).save()
    worker.process(handler)
    with pytest.raises(JobFailed, match="^mine$"):
        await job.result()
    assert len(runs.calls) == 1


async def test_a_retry_in_delayed_needs_a_queue_that_raises_it(make_queue: MakeQueue, redis: Any) -> None:
    """B-08, B-09, DL-05, DL-07"""
    worker = make_queue()
    runs = Seen()

    async def handler(job: Job) -> None:
        runs(job.data)
        if runs.calls == [("retried",)]:
            raise ValueError

    retried = await worker.create_job("retried").retries(1).backoff("fixed", 10).save()
    worker.process(handler)
    await until(lambda: redis.exists(worker.to_key("delayed")))
    ((_, due),) = await redis.zrange(worker.to_key("delayed"), 0, -1, withscores=True)
    await until(lambda: now_ms() > due + 20)
    await (await worker.create_job("later").save()).result()
    assert runs.calls == [("retried",), ("later",)]
    assert await retried.is_in_set("delayed")
    make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True)
    await retried.result()
    assert runs.calls == [("retried",), ("later",), ("retried",)]


async def test_a_strategy_sees_the_job_as_its_attempt_left_it(make_queue: MakeQueue) -> None:
    """B-10, B-11: before retries goes down, and before the trace is added, which goes to the front"""
    queue = make_queue()
    seen: list[tuple[str, int, list[str]]] = []

    def strategy(job: Job) -> int:
        seen.append((job.status, job.options["retries"], [trace.splitlines()[-1] for trace in job.options["stacktraces"]]))
        return 0

    async def handler(job: Job) -> None:
        raise ValueError(len(job.options["stacktraces"]))

    queue.backoff_strategies["own"] = strategy
    fatal = Seen()
    queue.on("failed:fatal", fatal)
    await queue.create_job({}).retries(2).backoff("own", 1).save()
    queue.process(handler)
    ((job, _),) = await fatal.reaches(1)
    assert seen == [("created", 2, []), ("retrying", 1, ["ValueError: 0"])]
    lines = [trace.splitlines()[-1] for trace in job.options["stacktraces"]]
    assert lines == ["ValueError: 2", "ValueError: 1", "ValueError: 0"]


# --- time-outs -----------------------------------------------------------------------------------------------------------


@either_kind
async def test_a_time_out_is_a_failure(make_queue: MakeQueue, redis: Any, kind: str) -> None:
    """T-01, T-02, T-03: message, trace, retry"""
    queue = make_queue()
    release = threading.Event()
    told = Seen()

    async def hang(job: Job) -> None:
        await asyncio.Event().wait()

    def hang_in_a_thread(job: Job) -> None:
        release.wait(10)

    for event in ("retrying", "failed", "failed:fatal"):
        queue.on(event, lambda job, error, event=event: told(event, type(error), str(error)))
    job = await queue.create_job({}).timeout(10).retries(1).save()
    queue.process(hang if kind == "async def" else hang_in_a_thread)
    message = "Job 1 timed out (10 ms)"
    with pytest.raises(JobFailed) as caught:
        await job.result()
    assert str(caught.value) == message
    await told.reaches(4)
    assert told.calls == [(event, JobTimeout, message) for event in ("retrying", "failed", "failed", "failed:fatal")]
    options = (await _stored(redis, queue, "1"))["options"]
    assert options["timeout"] == 10
    assert [trace.splitlines()[-1] for trace in options["stacktraces"]] == [f"beequeue.errors.JobTimeout: {message}"] * 2
    release.set()


async def test_without_a_time_out_a_handler_may_run_on(make_queue: MakeQueue) -> None:
    """T-04, QK-34: by default, and with 0; one above 2^31 ms does not fire at once"""
    queue = make_queue()
    gate = asyncio.Event()

    async def handler(job: Job) -> str:
        await gate.wait()
        return "in the end"

    default = await queue.create_job({}).save()
    zero = await queue.create_job({}).timeout(0).save()
    long = await queue.create_job({}).timeout(2**31 + 1000).save()
    limited = await queue.create_job({}).timeout(30).save()
    assert "timeout" not in default.options
    queue.process(handler, 4)
    with pytest.raises(JobFailed, match="timed out"):
        await limited.result()
    gate.set()
    assert [await job.result() for job in (default, zero, long)] == ["in the end"] * 3


async def test_each_attempt_has_the_whole_time_out(make_queue: MakeQueue) -> None:
    """T-05: the wait before it does not count"""
    queue = make_queue()
    lengths: list[float] = []

    async def handler(job: Job) -> None:
        started = asyncio.get_running_loop().time()
        try:
            await asyncio.Event().wait()
        finally:
            lengths.append(asyncio.get_running_loop().time() - started)

    job = await queue.create_job({}).timeout(40).retries(2).save()
    saved = now_ms()
    await until(lambda: now_ms() > saved + 60)
    queue.process(handler)
    with pytest.raises(JobFailed, match="timed out"):
        await job.result()
    assert len(lengths) == 3
    assert min(lengths) >= 0.038


async def test_a_timed_out_handler_is_stopped_before_the_next_attempt(make_queue: MakeQueue) -> None:
    """T-06, QK-26: concurrency stays the limit, though the handler is slow to end"""
    queue = make_queue()
    inside, most, cancelled = 0, 0, 0

    async def handler(job: Job) -> None:
        nonlocal inside, most, cancelled
        inside += 1
        most = max(most, inside)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            await asyncio.sleep(0.02)
            raise
        finally:
            inside -= 1

    jobs = [await queue.create_job({}).timeout(10).retries(1).save() for _ in range(2)]
    queue.process(handler)
    for job in jobs:
        with pytest.raises(JobFailed, match="timed out"):
            await job.result()
    assert (most, cancelled, inside) == (1, 4, 0)


@pytest.mark.parametrize("late", ["returns", "raises"])
async def test_the_outcome_of_a_thread_after_its_time_out_is_dropped(make_queue: MakeQueue, redis: Any, late: str) -> None:
    """T-06"""
    queue = make_queue()
    release, ended, told = threading.Event(), threading.Event(), Seen()

    def work(job: Job) -> Any:
        if job.data == "late":
            release.wait(10)
            ended.set()
            if late == "raises":
                raise ValueError("late")
        return job.data

    for event in ("succeeded", "failed:fatal"):
        queue.on(event, lambda job, outcome, event=event: told(event, job.id))
    job = await queue.create_job("late").timeout(10).save()
    queue.process(work)
    with pytest.raises(JobFailed, match="timed out"):
        await job.result()
    entry = await _stored(redis, queue, "1")
    release.set()
    await until(ended.is_set)
    assert await (await queue.create_job("next").save()).result() == "next"
    await told.reaches(2)
    assert told.calls == [("failed:fatal", "1"), ("succeeded", "2")]
    assert await _stored(redis, queue, "1") == entry
    assert queue.running == queue.late_finishes == 0


# --- wrong at the end ------------------------------------------------------------------------------------------------------


def _circular() -> Any:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def _spoil(how: str, job: Job) -> None:
    match how:
        case "data":
            job.data = object()
        case "circular data":
            job.data = _circular()
        case "options":
            job.options["own"] = object()
        case "no options":
            job.options.clear()
        case "no traces":
            job.options["stacktraces"] = None
        case "progress":
            job.progress = object()
        case "no id":
            job.id = None
        case "another id":
            job.set_id("another")


@either_kind
@pytest.mark.parametrize("how", ["data", "circular data", "options", "progress"])
async def test_a_job_that_its_handler_spoils_fails(make_queue: MakeQueue, redis: Any, kind: str, how: str) -> None:
    """QK-20: for good, with the data it was stored with, however its handler ends"""
    queue = make_queue()
    runs = Seen()

    def work(job: Job) -> str:
        runs(job.id)
        if job.data != "next":
            ends_well = job.data["ends well"]
            _spoil(how, job)
            if not ends_well:
                raise ValueError("mine")
        return "done"

    good = await queue.create_job({"ends well": True}).retries(1).save()
    bad = await queue.create_job({"ends well": False}).retries(1).save()
    following = await queue.create_job("next").save()
    queue.process(_of_kind(kind, work))
    with pytest.raises(JobFailed, match="not JSON serializable|JSON cannot carry"):
        await good.result()
    with pytest.raises(JobFailed, match="^mine$"):
        await bad.result()
    assert await following.result() == "done"
    assert runs.calls == [("1",), ("2",), ("3",)]
    for job, ends_well in ((good, True), (bad, False)):
        assert job.id is not None
        entry = await _stored(redis, queue, job.id)
        assert (entry["data"], entry["status"], entry["progress"]) == ({"ends well": ends_well}, "failed", 0)
        assert len(entry["options"]["stacktraces"]) == 1
    assert await redis.smembers(queue.to_key("failed")) == {"1", "2"}
    assert not await redis.exists(queue.to_key("active"))


@pytest.mark.parametrize("how", ["no options", "no traces"])
@pytest.mark.parametrize("retries", [0, 1])
async def test_a_handler_that_removes_the_options_fails_its_job(make_queue: MakeQueue, how: str, retries: int) -> None:
    """QK-20: a failure must be written although `options` is gone"""
    queue = make_queue()
    runs = Seen()

    async def handler(job: Job) -> None:
        runs(job.id)
        _spoil(how, job)
        raise ValueError("mine")

    job = await queue.create_job({}).retries(retries).save()
    queue.process(handler)
    await runs.reaches(1)
    with pytest.raises(JobFailed, match="^mine$"):
        await job.result(timeout=1000)
    assert await job.is_in_set("failed")
    assert not await job.is_in_set("active")


async def test_a_plain_handler_that_returns_a_coroutine_fails_its_job(make_queue: MakeQueue) -> None:
    """QK-28: the coroutine is closed, so Python warns of nothing"""
    queue = make_queue()
    job = await queue.create_job({}).save()
    queue.process(lambda job: echo(job))
    with pytest.raises(JobFailed, match="^a plain handler returned a coroutine: make the handler an async def$"):
        await job.result(timeout=1_000)


@either_kind
@pytest.mark.parametrize("how", ["no id", "another id"])
async def test_a_handler_that_changes_the_id_changes_nothing(make_queue: MakeQueue, kind: str, how: str) -> None:
    """QK-20: the job ends under its stored id, and gets its own event"""
    queue = make_queue()

    def work(job: Job) -> str:
        _spoil(how, job)
        return "done"

    job = await queue.create_job({}).save()
    queue.process(_of_kind(kind, work))
    assert await job.result(timeout=1_000) == "done"
    assert await job.is_in_set("succeeded")


async def test_a_wrong_result_follows_the_rules_of_retries(make_queue: MakeQueue) -> None:
    """QK-20: each attempt fails as if the handler had raised"""
    queue = make_queue()
    runs = Seen()

    async def handler(job: Job) -> Any:
        runs(job.options["retries"])
        return _circular()

    job = await queue.create_job({}).retries(1).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="JSON cannot carry"):
        await job.result()
    assert runs.calls == [(1,), (0,)]


@pytest.mark.parametrize("raises", ["by division", "by what it returns"])
async def test_a_strategy_that_raises_fails_the_job(make_queue: MakeQueue, raises: str) -> None:
    """QK-20: its error is reported, and the handler's failure is final"""
    queue = make_queue()
    runs = Seen()

    def strategy(job: Job) -> float:
        return 1 / (len(runs.calls) - 1) if raises == "by division" else float("inf")

    async def handler(job: Job) -> None:
        runs()
        raise ValueError("mine")

    queue.backoff_strategies["own"] = strategy
    job = await queue.create_job({}).retries(5).backoff("own", 1).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="^mine$"):
        await job.result()
    assert len(runs.calls) == 1
    assert await job.is_in_set("failed")
    assert len(make_queue.claim(ArithmeticError)) == 1


@pytest.mark.parametrize("raised", [SystemExit("no"), asyncio.CancelledError("no")])
async def test_a_strategy_that_raises_an_exit_fails_the_job(make_queue: MakeQueue, raised: BaseException) -> None:
    """QK-20: like a handler that raises it; the slot is free again"""
    queue = make_queue()

    def strategy(job: Job) -> int:
        raise raised

    async def handler(job: Job) -> str:
        if job.data == "bad":
            raise ValueError("mine")
        return "good"

    queue.backoff_strategies["own"] = strategy
    bad = await queue.create_job("bad").retries(5).backoff("own", 1).save()
    good = await queue.create_job("good").save()
    queue.process(handler)
    with pytest.raises(JobFailed, match="^mine$"):
        await bad.result(timeout=1_000)
    assert await good.result(timeout=1_000) == "good"
    assert len(make_queue.errors) == 1
    make_queue.errors.clear()


@pytest.mark.parametrize("kind", ["error", "result"])
async def test_an_outcome_that_cannot_be_written_fails_the_job(make_queue: MakeQueue, kind: str) -> None:
    """Python cannot format the exception; or the result, a dict of its own kind, raises; the job runs once"""
    queue = make_queue()
    runs = Seen()

    class Odd(dict[str, Any]):
        def items(self) -> Any:
            raise LookupError("no items")

    async def handler(job: Job) -> Any:
        runs()
        if kind == "error":
            raise SyntaxError("bad", ("page.html", 3, 5, 17))  # type: ignore[arg-type]
        return {"a": "\ud800", "b": Odd(a=1)}  # the surrogate leads to the slower encoder, which calls `items`

    job = await queue.create_job({}).save()
    queue.process(handler)
    with pytest.raises(JobFailed, match=r"^bad \(page.html, line 3\)$" if kind == "error" else "no items"):
        await job.result()
    assert await job.is_in_set("failed")
    assert len(runs.calls) == 1


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a small one"])
async def test_an_outcome_that_is_too_large_for_redis_fails_the_job(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, beside: bool
) -> None:
    """the job runs once; one that is settled by the same command succeeds"""
    await own_redis.config_set("proto-max-bulk-len", 2**20)
    queue = make_queue(redis=own_server.url, reconnect=soon, stall_interval=60_000)
    runs, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> str:
        runs(job.data)
        await gate.wait()
        return "x" * int(job.data)

    sizes = [2**21, *[5] * beside]
    jobs = [await queue.create_job(size).save() for size in sizes]
    queue.process(handler, 2)
    await runs.reaches(len(sizes))
    gate.set()
    with pytest.raises(JobFailed, match="^Redis does not accept the outcome of job 1, probably for its size: "):
        await jobs[0].result(15_000)
    assert await jobs[0].is_in_set("failed")
    for job in jobs[1:]:
        assert await job.result(10_000) == "xxxxx"
    assert len(runs.calls) == len(sizes)
    assert await (await queue.create_job(1).save()).result(10_000) == "x"
    make_queue.claim(ConnectionLost)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Untrue(Exception):
    def __bool__(self) -> bool:
        return False


class Empty(Exception):
    def __len__(self) -> int:
        return 0


@either_kind
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Mute(), "Mute"),
        (Untrue("mine"), "mine"),
        (Empty("mine"), "mine"),
        (KeyError(), "KeyError"),
        (StopIteration("mine"), "mine"),
        (StopAsyncIteration("mine"), "mine"),
        (ValueError("\ud83d"), "\ud83d"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_odd_exceptions_fail_the_job_like_others(
    make_queue: MakeQueue, redis: Any, kind: str, error: Exception, message: str
) -> None:
    """QK-20, QK-24, QK-25: exceptions that are false, have no text, or cannot be set on a future"""
    queue = make_queue()
    told = Seen()

    def work(job: Job) -> str:
        if job.data == "bad":
            raise error
        return "good"

    for event in ("succeeded", "failed", "failed:fatal"):
        queue.on(event, lambda job, outcome, event=event: told(event, job.id, outcome))
    bad, good = await queue.create_job("bad").save(), await queue.create_job("good").save()
    queue.process(_of_kind(kind, work))
    with pytest.raises(JobFailed) as caught:
        await bad.result(timeout=1000)
    assert await good.result() == "good"
    if isinstance(error, StopIteration):  # Python makes a RuntimeError of it
        assert type(error).__name__ in str(caught.value) or str(caught.value) == message
    else:
        assert str(caught.value) == message
        assert told.calls == [("failed", "1", error), ("failed:fatal", "1", error), ("succeeded", "2", "good")]
    (trace,) = (await _stored(redis, queue, "1"))["options"]["stacktraces"]
    assert type(error).__name__ in trace
    assert await redis.smembers(queue.to_key("failed")) == {"1"}


async def test_a_worker_without_events_needs_no_json_result(make_queue: MakeQueue) -> None:
    """P-22: no message carries the result, so it may be any value"""
    worker = make_queue(send_events=False)
    done = Seen()
    worker.on("succeeded", done)
    await worker.create_job({}).save()
    result = object()

    async def handler(job: Job) -> object:
        return result

    worker.process(handler)
    ((job, told),) = await done.reaches(1)
    assert told is result
    assert await job.is_in_set("succeeded")


# --- ids without a job, jobs without an entry ----------------------------------------------------------------------------


async def test_ids_without_data_leave_active(make_queue: MakeQueue, redis: Any) -> None:
    """QK-15, QK-16: met by a blocking take, by the read that follows it, or by a finish; no slot is lost"""
    queue = make_queue()
    both = threading.Barrier(2, timeout=5)
    told = Seen()

    def work(job: Job) -> Any:
        both.wait()
        return job.data

    queue.on("succeeded", lambda job, result: told(result))
    await _make_available(redis, queue, "a", "b", "c", "d")
    ids = ["ghost 1", "ghost 2", "a", "ghost 3", "b", "ghost 4", "c", "d", "ghost 5"]
    await redis.delete(queue.to_key("waiting"))
    await redis.lpush(queue.to_key("waiting"), *ids)
    queue.process(work, 2)
    await told.reaches(4)
    await until(lambda: _holds_nothing(redis, queue))
    assert sorted(result for (result,) in told.calls) == ["a", "b", "c", "d"]
    assert queue.running == 0


async def test_remove_takes_the_id_out_of_every_place(make_queue: MakeQueue, redis: Any) -> None:
    """QK-17: also out of `waiting` and `active` when it is in `succeeded` or `failed`"""
    queue = await make_queue(is_worker=False).ready()
    for ended in ("succeeded", "failed"):
        for job_id in ("queued", "other"):
            await queue.create_job({}).set_id(job_id).save()
            await redis.rpush(queue.to_key("active"), job_id, job_id)
            await redis.sadd(queue.to_key(ended), job_id)
        await queue.remove_job("queued")
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["other"]
        assert await redis.lrange(queue.to_key("active"), 0, -1) == ["other", "other"]
        assert await redis.smembers(queue.to_key(ended)) == {"other"}
        assert await redis.hkeys(queue.to_key("jobs")) == ["other"]
        await queue.remove_job("other")
        assert await _holds_nothing(redis, queue)


@pytest.mark.parametrize("entry", ["", "null", '"text"', "[1]", '{"data":{},"options":7}', '{"data":1,"options":{}'])
async def test_a_malformed_entry_is_set_aside(make_queue: MakeQueue, redis: Any, entry: str) -> None:
    """QK-23: reported, and moved to `failed` unchanged, whether a take or a finish meets it; no handler gets it"""
    queue = make_queue()
    started = Seen()

    async def handler(job: Job) -> None:
        started(job.id)

    queue_ids = ["poison 1", "good 1", "poison 2", "good 2"]
    await _make_available(redis, queue, *queue_ids)
    for job_id in ("poison 1", "poison 2"):
        await redis.hset(queue.to_key("jobs"), job_id, entry)
    queue.process(handler)
    await started.reaches(2)
    await until(lambda: _holds_nothing(redis, queue))
    assert started.calls == [("good 1",), ("good 2",)]
    assert [str(error).count("poison") for error in make_queue.claim(UnreadableData)] == [1, 1]
    assert await redis.smembers(queue.to_key("failed")) == {"poison 1", "poison 2"}
    assert await redis.hmget(queue.to_key("jobs"), "poison 1", "poison 2") == [entry, entry]
    assert queue.running == 0


# --- twice, too late, not at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["succeeds", "fails", "fails and is retried"])
async def test_a_job_that_runs_twice_is_settled_once(make_queue: MakeQueue, redis: Any, first: str) -> None:
    """QK-18, QK-19: it is in one place, without a second copy in `waiting`; the later end is reported"""
    one, other = make_queue(), make_queue()
    gates = {one: asyncio.Event(), other: asyncio.Event()}
    started, told = Seen(), Seen()

    def handler_of(queue: Queue) -> Handler:
        async def handler(job: Job) -> str:
            run = len(started.calls)
            started(run)
            await gates[queue].wait()
            if (run == 0) == (first != "succeeds"):
                raise ValueError(f"run {run}")
            return f"run {run}"

        return handler

    for queue in (one, other):
        for event in ("succeeded", "retrying", "failed:fatal"):
            queue.on(event, lambda job, outcome, event=event: told(event, str(outcome)))
    job = await one.create_job({}).retries(1 if "retried" in first else 0).save()
    one.process(handler_of(one))
    await started.reaches(1)
    await redis.lrem(one.to_key("active"), 0, "1")
    await redis.lpush(one.to_key("waiting"), "1")
    other.process(handler_of(other))
    await started.reaches(2)
    gates[one].set()
    await told.reaches(1)
    gates[other].set()
    await until(lambda: one.late_finishes + other.late_finishes == 1)
    await until(lambda: _holds_nothing(redis, one))
    assert len(make_queue.claim(LateFinish)) == 1
    end = "failed" if first == "fails" else "succeeded"
    assert await redis.smembers(one.to_key(end)) == {"1"}
    assert not await redis.exists(one.to_key("failed" if end == "succeeded" else "succeeded"))
    assert (await _stored(redis, one, "1"))["status"] == end
    match first:
        case "succeeds":
            assert told.calls == [("succeeded", "run 0")]
            assert await job.result() == "run 0"
        case "fails":
            assert told.calls == [("failed:fatal", "run 0")]
        case _:
            assert [event for event, _ in told.calls] == ["retrying", "succeeded"]


@pytest.mark.parametrize("applied", [True, False], ids=["reply lost", "command lost"])
async def test_a_finish_is_repeated_after_a_reconnect(make_queue: MakeQueue, redis: Any, url: str, applied: bool) -> None:
    """QK-22: the job is settled once, and `succeeded` fires, marked uncertain if the first answer may have been lost"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, reconnect=_soon)
        runs, told = Seen(), Seen()

        async def handler(job: Job) -> str:
            runs()
            return "done"

        def interfere(line: Line, data: bytes) -> None:
            if _sha("finish") in data and not worker.reconnects:
                if applied:
                    relay.hold("command")
                else:
                    line.cut()

        worker.on("succeeded", lambda job, result: told(result, job.uncertain))
        job = await worker.create_job({}).save()
        relay.said_on = interfere
        worker.process(handler)
        if applied:
            await until(lambda: redis.sismember(worker.to_key("succeeded"), job.id))
            assert told.calls == []
            next(line for line in relay.lines if line.role == "command").cut()
            relay.release("command")
        assert await told.reaches(1) == [("done", applied)]
        assert await redis.smembers(worker.to_key("succeeded")) == {"1"}
        assert len(runs.calls) == 1
        assert worker.late_finishes == worker.running == 0
        assert len(make_queue.claim(ConnectionLost)) == 1
        await worker.close()


async def test_a_listener_that_is_cancelled_takes_no_slot(make_queue: MakeQueue) -> None:
    """it reads a future that was cancelled; the jobs that end beside it, and the connection, are not affected"""
    queue = make_queue()
    gone = asyncio.get_running_loop().create_future()
    gone.cancel()
    queue.on("succeeded", lambda job, result: gone.result())
    jobs = [queue.create_job(number) for number in range(8)]
    await queue.save_all(jobs)
    queue.process(echo, 4)
    assert await asyncio.gather(*(job.result(8_000) for job in jobs)) == [*range(8)]
    await until(lambda: len(make_queue.errors) == 8)
    assert len(make_queue.claim(ListenerFailed)) == 8
    assert queue.reconnects == 0


async def test_an_outcome_that_cannot_be_recorded_is_reported(make_queue: MakeQueue, redis: Any) -> None:
    """QK-15, QK-21, ER-03: no event says that the job ended; `running` goes back to 0, and no slot is lost"""
    queue = make_queue()
    both = asyncio.Barrier(2)
    told = Seen()

    async def handler(job: Job) -> Any:
        await both.wait()
        if job.data == "bad":
            raise ValueError
        return job.data

    for event in ("succeeded", "failed", "failed:fatal", "job succeeded", "job failed"):
        queue.on(event, lambda job, outcome, event=event: told(event, outcome))
    for key in ("succeeded", "failed"):
        await redis.set(queue.to_key(key), "no set")
    for data in ("good", "bad"):
        await queue.create_job(data).save()
    queue.process(handler, 2)
    await until(lambda: len(make_queue.errors) == 2)
    assert queue.running == 0
    for key in ("succeeded", "failed"):
        await redis.delete(queue.to_key(key))
    jobs = [await queue.create_job(data).save() for data in (1, 2)]
    assert [await job.result() for job in jobs] == [1, 2]
    await told.reaches(4)
    assert {outcome for _, outcome in told.calls} == {1, 2}
    errors = sorted(make_queue.claim(OutcomeNotRecorded), key=str)
    assert [str(error) for error in errors] == [
        "unable to update the status of failed job 2",
        "unable to update the status of succeeded job 1",
    ]
    assert {error.__cause__.code for error in errors if isinstance(error.__cause__, CommandError)} == {"WRONGTYPE"}


async def test_a_refused_health_check_raises(make_queue: MakeQueue, redis: Any) -> None:
    """QK-21"""
    queue = await make_queue(is_worker=False).ready()
    for key in ("waiting", "active", "succeeded", "failed", "delayed"):
        await redis.set(queue.to_key(key), "wrong")
        with pytest.raises(CommandError, match="WRONGTYPE"):
            await queue.check_health()
        await redis.delete(queue.to_key(key))
    assert (await queue.check_health()).waiting == 0


@pytest.mark.parametrize(
    ("good", "bad"), [("good", ValueError("bad")), ("good", Untrue("bad"))], ids=["an error", "an error that is false"]
)
async def test_threads_that_outlive_a_close_are_reported(make_queue: MakeQueue, redis: Any, good: str, bad: Exception) -> None:
    """CL-13, CL-11: each by an error of its own; Redis is not changed"""
    queue, onlooker = make_queue(), await make_queue(is_worker=False, get_events=False).ready()
    release = {job_id: threading.Event() for job_id in "12"}
    started, told = Seen(), Seen()
    loop = asyncio.get_running_loop()

    def work(job: Job) -> str:
        assert job.id is not None
        loop.call_soon_threadsafe(started, job.id)
        release[job.id].wait(10)
        if job.id == "2":
            raise bad
        return good

    for event in ("succeeded", "failed"):
        queue.on(event, told)
    for _ in range(3):
        await queue.create_job({}).save()
    queue.process(work, 2)
    await started.reaches(2)
    with pytest.raises(OperationTimedOut, match=r"^Operation timed out\.$"):
        await queue.close(10)
    make_queue.queues.remove(queue)
    before = await _everything(redis, onlooker)
    assert before["active"] == ["2", "1"]
    release["1"].set()
    await until(lambda: len(make_queue.errors) == 1)
    release["2"].set()
    await until(lambda: len(make_queue.errors) == 2)
    first, second = make_queue.claim(OutcomeNotRecorded)
    assert str(first) == "unable to update the status of succeeded job 1"
    assert str(second) == "unable to update the status of failed job 2"
    assert first is not second
    assert told.calls == []
    assert await _everything(redis, onlooker) == before


# --- faults of Redis -----------------------------------------------------------------------------------------------------


async def test_a_first_stall_check_that_fails_stops_no_worker(make_queue: MakeQueue, redis: Any) -> None:
    """QK-14, ER-03"""
    queue = await make_queue().ready()
    await redis.set(queue.to_key("stalling"), "no set")
    queue.process(echo)
    await until(lambda: make_queue.errors)
    await redis.delete(queue.to_key("stalling"))
    assert await (await queue.create_job("x").save()).result() == "x"
    (error,) = make_queue.claim(CommandError)
    assert "WRONGTYPE" in str(error)


async def test_a_refused_take_is_one_refusal_for_all_slots(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QK-13: however many slots there are; the delay doubles, to 15 s at most"""
    assert exchange_module.LONGEST_REFUSAL_DELAY_MS == 15_000
    monkeypatch.setattr(exchange_module, "LONGEST_REFUSAL_DELAY_MS", 40)
    queue = make_queue(initial_redis_failure_retry_delay=10)
    times: list[float] = []
    queue.on("error", lambda error: times.append(asyncio.get_running_loop().time()))
    await redis.set(queue.to_key("waiting"), "no list")
    queue.process(echo, 10)
    await until(lambda: len(times) >= 10, deadline_s=4)  # 5 s if it went on doubling
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[:5])]
    assert all(gap >= delay - 0.001 for gap, delay in zip(gaps, [0.01, 0.02, 0.04, 0.04], strict=True))
    await redis.delete(queue.to_key("waiting"))
    jobs = [await queue.create_job(number).save() for number in range(3)]
    assert [await job.result() for job in jobs] == [0, 1, 2]
    make_queue.claim(CommandError)


async def test_refusals_after_a_job_begin_with_the_first_delay(own_server: Server, make_queue: MakeQueue) -> None:
    """RC-03: however many refusals there were before it"""
    queue, done = make_queue(redis=own_server.url, initial_redis_failure_retry_delay=10), Seen()
    queue.on("succeeded", done)
    queue.process(echo)
    async with Redis.from_url(own_server.url) as onlooker:
        redis: Any = onlooker
        for number, (times, patience_s) in enumerate(((7, 10), (4, 4))):  # 10 + 20 + 40 ms; 1,280 + 2,560 + 5,120 if it went on
            await queue.create_job("taken when the right is there").save()
            await done.reaches(2 * number + 1)
            await redis.execute_command("ACL", "SETUSER", "default", "-brpoplpush")
            await queue.create_job("taken by the take that was open, or later where that is refused too").save()
            await until(partial(_are_at_least, make_queue.errors, times), patience_s)
            await redis.execute_command("ACL", "SETUSER", "default", "+brpoplpush")
            make_queue.claim(CommandError)


async def test_a_lost_take_connection_is_not_a_refusal(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """QK-13, RC-01: the worker takes jobs as soon as it is back"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, reconnect=_soon, initial_redis_failure_retry_delay=60_000)
        queue.process(echo, 10)
        for lost in range(3):
            await until(partial(_has_said, relay, b"BRPOPLPUSH", lost + 1))
            next(line for line in reversed(relay.lines) if line.role == "take").cut()
        assert await (await queue.create_job("x").save()).result() == "x"
        assert len(make_queue.claim(ConnectionLost)) == queue.reconnects == 3
        await queue.close()


# --- helpers -------------------------------------------------------------------------------------------------------------


def _soon(attempt: int) -> int:
    return 10


def _are_at_least(errors: list[Exception], count: int) -> bool:
    return len(errors) >= count


def _of_kind(kind: str, work: Callable[[Job], Any]) -> Handler:
    """Returns `work` as a handler: itself, which runs in a thread, or an `async def`."""
    if kind == "def":
        return work

    async def handler(job: Job) -> Any:
        return work(job)

    return handler


def _sha(script: str) -> bytes:
    return SCRIPTS[script].sha.encode()


def _reads(relay: Relay) -> Counter[str]:
    """Returns how often the script `take` was called, by the role of the connection."""
    return +sum((Counter({line.role: line.said.count(_sha("take"))}) for line in relay.lines), Counter[str]())


def _has_said(relay: Relay, what: bytes, times: int) -> bool:
    return said(relay, what) >= times


async def _make_available(redis: Any, queue: Queue, *job_ids: str) -> None:
    """Saves jobs whose data is their id, all in one step."""
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.hset(queue.to_key("jobs"), mapping={job_id: queue.create_job(job_id).to_data() for job_id in job_ids})
        pipeline.lpush(queue.to_key("waiting"), *job_ids)
        await pipeline.execute()


async def _stored(redis: Any, queue: Queue, job_id: str) -> Any:
    return json.loads(await redis.hget(queue.to_key("jobs"), job_id))


async def _holds_nothing(redis: Any, queue: Queue) -> bool:
    return not await redis.exists(queue.to_key("waiting"), queue.to_key("active"))


async def _everything(redis: Any, queue: Queue) -> dict[str, Any]:
    """Returns the contents of the queue's keys, except the one that expires."""
    return {
        **{key: await redis.lrange(queue.to_key(key), 0, -1) for key in ("waiting", "active")},
        **{key: await redis.smembers(queue.to_key(key)) for key in ("succeeded", "failed", "stalling")},
        "jobs": await redis.hgetall(queue.to_key("jobs")),
        "delayed": await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True),
        "id": await redis.get(queue.to_key("id")),
    }


@pytest.mark.parametrize("size", [1, 5000], ids=["small", "large"])
async def test_a_take_finds_its_own_job_among_the_newest(make_queue: MakeQueue, own_server: Server, size: int) -> None:
    """many jobs move to `active` in one turn of Redis's loop; each worker gets its own data, at once or by asking again"""
    seen, done = Seen(), Seen()
    jobs = {str(number): str(number) * size for number in range(100, 150)}

    async def handler(job: Job) -> None:
        seen((job.id, job.data))

    workers = [make_queue(redis=own_server.url, get_events=False) for _ in range(8)]
    for worker in workers:
        worker.on("succeeded", done)
        worker.process(handler)
    producer = make_queue(redis=own_server.url, is_worker=False)
    async with Redis.from_url(own_server.url) as redis:
        await until(lambda: _blocked(redis, len(workers)))
        assert await producer.save_all(producer.create_job(data).set_id(job_id) for job_id, data in jobs.items()) == {}
        await done.reaches(len(jobs))
        assert sorted(call for (call,) in seen.calls) == sorted(jobs.items())
        assert await redis.exists(*(producer.to_key(key) for key in ("active", "waiting"))) == 0
    for queue in (*workers, producer):
        await queue.close()


async def _blocked(redis: Any, count: int) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"] == count)


async def test_a_settlement_is_not_held_up_by_a_take_when_its_script_is_gone(
    make_queue: MakeQueue, own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """it came before the take in one write; it is repeated on the connection that does not block"""
    monkeypatch.setattr("beequeue.store.store.TAKE_WAIT_S", 3_600)
    worker = await make_queue(redis=own_server.url, get_events=False).ready()
    producer = await make_queue(redis=own_server.url, is_worker=False).ready()
    worker.process(echo, 2)
    for _ in range(3):
        async with Redis.from_url(own_server.url) as redis:
            await until(lambda: _blocked(redis, 1))
            await redis.script_flush()
        assert await (await producer.create_job("x").save()).result(5_000) == "x"
    for queue in (worker, producer):
        await queue.close()


async def test_a_worker_whose_settlements_may_not_take_goes_on(own_server: Server, make_queue: MakeQueue) -> None:
    """each refusal is reported, and loses no job: each job comes with a take of its own"""
    administrator: Any = Redis.from_url(own_server.url)
    async with administrator:
        await administrator.execute_command("ACL SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-rpop")
        queue = make_queue(redis=own_server.url.replace("unix://", "unix://worker:secret@"))
        succeeded = Seen()
        queue.on("succeeded", lambda job, result: succeeded(job.data))
        assert await queue.save_all([queue.create_job(number) for number in range(3)]) == {}
        queue.process(echo)
        assert await succeeded.reaches(3) == [(0,), (1,), (2,)]
        await queue.close()
    assert {error.code for error in make_queue.claim(CommandError) if isinstance(error, CommandError)} <= {"NOPERM", "ERR"}
