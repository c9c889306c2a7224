"""The two clocks: one raises delayed jobs when they are due, the other brings back the jobs of silent workers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

import beequeue
import beequeue.tasks
from beequeue import (
    CommandError,
    ConnectionLost,
    Job,
    ListenerFailed,
    OperationTimedOut,
    OutcomeNotRecorded,
    Queue,
    QueueClosed,
    TaskFailed,
)
from beequeue.job import now_ms
from beequeue.store.scripts import SCRIPTS
from beequeue.store.store import Store
from beequeue.worker import clocks
from beequeue.worker.clocks import EagerTimer
from harness.children import end_with_parent
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import said
from tests.relay import Line, Relay

FAR = 4_102_444_800_000
"""Epoch ms of a time that does not come."""

RAISE, CHECK = (SCRIPTS[name].sha.encode() for name in ("raise_delayed_jobs", "check_stalled_jobs"))

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])


# --- delayed: when -------------------------------------------------------------------------------------------------------


async def test_delayed_jobs_run_in_the_order_of_their_times(make_queue: MakeQueue) -> None:
    """DL-01, DL-02, DL-03: none before its time, and each once"""
    queue = make_queue(activate_delayed_jobs=True, delayed_debounce=150, near_term_window=10_000)
    handled: list[tuple[int, int]] = []
    raised = Seen()

    async def handler(job: Job) -> None:
        handled.append((job.data, now_ms()))

    queue.on("raised jobs", raised)
    queue.process(handler)
    await queue.ready()
    start = now_ms()
    jobs = [queue.create_job(start + delay).delay_until(start + delay) for delay in (290, 10, 200)]
    await asyncio.gather(*(job.save() for job in jobs))
    for job in jobs:
        await job.result()
    assert [due for due, _ in handled] == [start + 10, start + 200, start + 290]
    assert all(at >= due for due, at in handled)
    assert sum(count for (count,) in raised.calls) == 3
    assert min(raised.calls) >= (1,)


@both_orderings
async def test_what_sets_the_timer(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    """DL-04, DL-11, S-10: the first look, a save, its notice; a timer that fires early raises nothing and is set again"""
    asked = _watch_timers(monkeypatch)
    queue = await make_queue(activate_delayed_jobs=True, ordered_events=ordered).ready()
    raised = Seen()
    queue.on("raised jobs", raised)
    assert await asked.reaches(1) == [(-1,)]
    due = now_ms() + 300
    job = await queue.create_job("x").delay_until(due).save()
    await asked.reaches(3)
    await redis.publish(queue.to_key("earlierDelayed"), "1")
    assert await asked.reaches(5) == [(-1,), (due,), (due,), (1,), (due,)]
    assert raised.calls == []
    queue.process(echo)
    assert await job.result() == "x"
    assert now_ms() >= due
    assert raised.calls == [(1,)]
    assert await asked.reaches(6) == [(-1,), (due,), (due,), (1,), (due,), (-1,)]


async def test_a_notice_without_a_time(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DL-11: it sets the timer to the maximum, whatever its text"""
    asked = _watch_timers(monkeypatch)
    activator = await make_queue(is_worker=False, activate_delayed_jobs=True, near_term_window=100).ready()
    raised = Seen()
    activator.on("raised jobs", raised)
    await asked.reaches(1)
    for notice in (b"garbage", b"", b"null", b"\xff", b"nan", b"-5", b"inf", b"12abc"):
        await redis.publish(activator.to_key("earlierDelayed"), notice)
    calls = await asked.reaches(9)
    assert [str(when) for (when,) in calls[1:9]] == ["None", "None", "None", "None", "nan", "-5.0", "inf", "None"]
    await _put(redis, activator, "due", 1)
    assert await raised.reaches(1) == [(1,)]
    await redis.delete(activator.to_key("waiting"))


async def test_one_queue_raises_jobs_that_another_runs(make_queue: MakeQueue) -> None:
    """DL-02, DL-05, DL-15: a notice wakes it; the entry keeps its delay"""
    activator = await make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True).ready()
    worker = make_queue()
    raised, not_here = Seen(), Seen()
    activator.on("raised jobs", raised)
    worker.on("raised jobs", not_here)
    worker.process(echo)
    due = now_ms() + 50
    job = await worker.create_job("x").delay_until(due).save()
    assert await job.result() == "x"
    assert now_ms() >= due
    assert (raised.calls, not_here.calls) == ([(1,)], [])
    stored = await Job.from_id(worker, "1")
    assert stored is not None
    assert stored.options["delay"] == due


@pytest.mark.parametrize("second", [-30, 60_000], ids=["earlier", "later"])
async def test_the_first_delay_of_an_id_stays(make_queue: MakeQueue, redis: Any, second: int) -> None:
    """DL-06: the job runs once"""
    queue = make_queue(activate_delayed_jobs=True)
    handled: list[tuple[Any, int]] = []

    async def handler(job: Job) -> None:
        handled.append((job.options.get("delay"), now_ms()))

    due = now_ms() + 700
    job = await queue.create_job({}).set_id("own").delay_until(due).save()
    again = await make_queue(is_worker=False).create_job({}).set_id("own").delay_until(due + second).save()
    assert again.id is None
    assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == [("own", due)]
    queue.process(handler)
    await job.result()
    await (await queue.create_job({}).save()).result()
    ((delay, at),) = handled[:1]
    assert delay == due
    assert at >= due
    assert len(handled) == 2
    assert not await redis.exists(queue.to_key("delayed"))


async def test_without_an_activator_delayed_jobs_stay(make_queue: MakeQueue) -> None:
    """DL-07: even when they are due and the queue processes jobs"""
    queue = make_queue()
    handled = Seen()

    async def handler(job: Job) -> None:
        handled(job.id)

    due = now_ms() + 20
    delayed = await queue.create_job({}).delay_until(due).save()
    queue.process(handler)
    await until(lambda: now_ms() > due + 20)
    await (await queue.create_job({}).save()).result()
    assert handled.calls == [("2",)]
    assert await delayed.is_in_set("delayed")


async def test_one_look(make_queue: MakeQueue, redis: Any) -> None:
    """DL-08, DL-09: it raises all due jobs, the earliest at the tail; it returns the last time within the debounce, or -1"""
    queue = await make_queue(is_worker=False).ready()
    store = queue._store
    assert await store.raise_delayed(1000, 100) == (0, -1)
    times = {"c": 30, "a": 10, "b": 20, "d": 31, "e": 100, "f": 131, "g": 132}
    await redis.zadd(queue.to_key("delayed"), times)
    assert await store.raise_delayed(9, 0) == (0, 10)
    assert await store.raise_delayed(30, 100) == (3, 131)
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["c", "b", "a"]
    assert await store.raise_delayed(131, 0) == (3, 132)
    assert await store.raise_delayed(132, 100) == (1, -1)
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["g", "f", "e", "d", "c", "b", "a"]
    await redis.delete(queue.to_key("waiting"))


async def test_jobs_within_the_debounce_are_raised_together(make_queue: MakeQueue, redis: Any) -> None:
    """DL-09, QK-62: at the time of the last of them; later jobs stay"""
    queue = await make_queue(is_worker=False).ready()
    start = now_ms()
    await _put(redis, queue, "first", start + 800)
    await _put(redis, queue, "second", start + 900)
    await _put(redis, queue, "beyond", FAR)
    activator = make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True, delayed_debounce=200)
    raised = Seen()
    activator.on("raised jobs", lambda count: raised(count, now_ms()))
    ((count, at),) = await raised.reaches(1)
    assert count == 2
    assert at >= start + 900
    assert await redis.zrange(queue.to_key("delayed"), 0, -1) == ["beyond"]
    await redis.delete(queue.to_key("waiting"))


async def test_each_is_raised_at_its_time_or_within_the_debounce(make_queue: MakeQueue) -> None:
    """QK-62: never before, even when the activator knows it from a notice or from its own save"""
    queue = make_queue(activate_delayed_jobs=True, delayed_debounce=2_000)
    saver = make_queue(is_worker=False)
    handled: dict[int, int] = {}

    async def handler(job: Job) -> None:
        handled[job.data] = now_ms()

    queue.process(handler)
    await queue.ready()
    start = now_ms()
    dues = [start + delay for delay in (40, 60, 100, 150)]
    saving = [(saver, queue)[number % 2].create_job(due).delay_until(due).save() for number, due in enumerate(dues)]
    for job in await asyncio.gather(*saving):
        await job.result()
    assert sorted(handled) == dues
    assert all(due <= at <= due + 2_000 for due, at in handled.items())


async def test_a_job_without_a_notice_is_found_within_the_window(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """DL-10, QK-34: each time; a window above 2^31 ms makes no busy loop"""
    async with Relay(url) as relay:
        patient = make_queue(redis=relay.url, is_worker=False, activate_delayed_jobs=True, near_term_window=timedelta(days=60))
        await patient.ready()
        activator = await make_queue(is_worker=False, activate_delayed_jobs=True, near_term_window=20).ready()
        raised = Seen()
        activator.on("raised jobs", raised)
        for number in range(1, 4):
            await _put(redis, activator, f"job {number}", 1)
            await raised.reaches(number)
        assert raised.calls == [(1,)] * 3
        assert said(relay, RAISE) == 1
        await redis.delete(activator.to_key("waiting"))
        await patient.close()


@pytest.mark.parametrize("processes", [True, False])
async def test_looking_begins_when_the_queue_is_ready(make_queue: MakeQueue, redis: Any, processes: bool) -> None:
    """DL-12, QK-58: it finds jobs that became due before, without any notice"""
    worker = make_queue()
    job = await worker.create_job("x").delay_until(FAR).save()
    await redis.zadd(worker.to_key("delayed"), {"1": 1})
    activator = make_queue(activate_delayed_jobs=True)
    (activator if processes else worker).process(echo)
    assert await job.result() == "x"


async def test_an_id_without_data_is_raised_and_dropped(make_queue: MakeQueue, redis: Any) -> None:
    """QK-61"""
    queue = make_queue()
    handled, raised = Seen(), Seen()

    async def handler(job: Job) -> None:
        handled(job.id)

    await redis.zadd(queue.to_key("delayed"), {"ghost 1": 1, "ghost 2": 3})
    await _put(redis, queue, "real", 2)
    queue.process(handler)
    activator = make_queue(is_worker=False, activate_delayed_jobs=True)
    activator.on("raised jobs", raised)
    assert await raised.reaches(1) == [(3,)]
    await until(lambda: redis.sismember(queue.to_key("succeeded"), "real"))
    await (await queue.create_job({}).save()).result()
    assert handled.calls == [("real",), ("1",)]
    assert not await redis.exists(*(queue.to_key(key) for key in ("waiting", "active", "delayed")))


async def test_jobs_of_one_time_are_all_raised_then(make_queue: MakeQueue, redis: Any) -> None:
    """QK-65, S-04: only the job that sorts first sends a notice"""
    activator = await make_queue(is_worker=False, activate_delayed_jobs=True, delayed_debounce=0).ready()
    saver = make_queue(is_worker=False, get_events=False)
    raised = Seen()
    activator.on("raised jobs", lambda count: raised(count, now_ms()))
    due = now_ms() + 150
    async with redis.pubsub() as notices:
        await notices.subscribe(saver.to_key("earlierDelayed"))
        for job_id in ("b", "a", "c"):
            await saver.create_job({}).set_id(job_id).delay_until(due).save()
        await saver.create_job({}).set_id("z").delay_until(due - 100).save()
        heard = [message["data"] async for message in _messages(notices, 3)]
    assert heard == [str(due), str(due), str(due - 100)]
    await until(lambda: sum(count for count, _ in raised.calls) == 4)
    assert [count for count, _ in raised.calls] == [1, 3]
    assert raised.calls[1][1] >= due
    await redis.delete(saver.to_key("waiting"))


# --- delayed: numbers, clocks, faults --------------------------------------------------------------------------------------


async def test_odd_times_make_no_loop(make_queue: MakeQueue, redis: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QK-63: in exponent form or with a fraction: they are read so, and no job is raised before its time"""
    asked = _watch_timers(monkeypatch)
    async with Relay(url) as relay:
        activator = make_queue(
            redis=relay.url, is_worker=False, get_events=False, activate_delayed_jobs=True, delayed_debounce=0
        )
        raised = Seen()
        activator.on("raised jobs", lambda count: raised(count, now_ms()))
        await asked.reaches(1)
        first, second, never = now_ms() + 100.5, now_ms() + 400.25, 1.7e19
        for job_id, when in (("first", first), ("second", second), ("never", never)):
            await _put(redis, activator, job_id, when)
        await redis.publish(activator.to_key("earlierDelayed"), repr(first))
        await raised.reaches(2)
        assert [count for count, _ in raised.calls] == [1, 1]
        assert all(at >= due for (_, at), due in zip(raised.calls, (first, second), strict=True))
        await asked.reaches(4)
        await redis.publish(activator.to_key("earlierDelayed"), "1.7e+19")
        assert await asked.reaches(5) == [(-1,), (first,), (second,), (never,), (never,)]
        assert said(relay, RAISE) == 3
        await redis.delete(activator.to_key("waiting"))
        await activator.close()


@pytest.mark.parametrize("when", [-1, 2**53, 1.7e18, math.nan, math.inf, -math.inf, "1700000000000", None, True])
async def test_delay_until_has_a_range(make_queue: MakeQueue, when: Any) -> None:
    """QK-63, J-07"""
    job = make_queue(is_worker=False).create_job({})
    with pytest.raises(ValueError, match="invalid delay timestamp"):
        job.delay_until(when)
    assert "delay" not in job.options


async def test_now_is_the_clock_of_the_client(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """QK-64: for raising jobs and for retries"""
    ahead = 3_600_000
    monkeypatch.setattr("beequeue.worker.clocks.now_ms", lambda: now_ms() + ahead)
    monkeypatch.setattr("beequeue.worker.consumer.now_ms", lambda: now_ms() + ahead)
    queue = make_queue()
    failing = Seen()

    async def handler(job: Job) -> Any:
        if job.data == "fails":
            raise ValueError
        return job.data

    queue.on("retrying", failing)
    job = await queue.create_job("x").delay_until(now_ms() + ahead - 60_000).save()
    make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True)
    queue.process(handler)
    assert await job.result(timeout=3_000) == "x"
    await queue.create_job("fails").retries(1).backoff("fixed", 60_000).save()
    await failing.reaches(1)
    ((_, due),) = await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True)
    assert due >= now_ms() + ahead


async def test_a_look_that_a_lost_connection_cuts_off_is_repeated(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """DL-14: only the loss of the connection is reported"""
    async with Relay(url) as relay:
        cuts: list[Line] = []

        def cut(line: Line, data: bytes) -> None:
            if RAISE in data and len(cuts) < 2:
                cuts.append(line)
                line.cut()

        relay.said_on = cut
        saver = make_queue(is_worker=False)
        await _put(redis, saver, "due", 1)
        activator = make_queue(
            redis=relay.url, is_worker=False, get_events=False, activate_delayed_jobs=True, reconnect=lambda attempt: 10
        )
        raised = Seen()
        activator.on("raised jobs", raised)
        assert await raised.reaches(1) == [(1,)]
        assert len(cuts) == 2
        assert len(make_queue.claim(ConnectionLost)) == 2
        await redis.delete(activator.to_key("waiting"))
        await activator.close()


async def test_a_look_that_fails_is_reported_and_repeated(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DL-14, QK-59, QK-60, ER-03: also the first one, after a pause each time"""
    assert clocks.RETRY_S == 1
    monkeypatch.setattr(clocks, "RETRY_S", 0.03)
    activator = make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True, auto_connect=False)
    failures, raised = _failures(activator), Seen()
    activator.on("raised jobs", raised)
    await redis.set(activator.to_key("delayed"), "no sorted set")
    await activator.connect()
    await until(lambda: len(failures) == 3)
    await redis.delete(activator.to_key("delayed"))
    await _put(redis, activator, "due", 1)
    assert await raised.reaches(1) == [(1,)]
    assert {str(error).split()[0] for error in make_queue.claim(CommandError)} == {"WRONGTYPE"}
    assert all(later - earlier >= 0.029 for earlier, later in itertools.pairwise(failures))
    await redis.delete(activator.to_key("waiting"))


async def test_failing_looks_end_with_the_queue(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """QK-60"""
    monkeypatch.setattr(clocks, "RETRY_S", 0.03)
    queue, other = [
        make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True, auto_connect=False) for _ in range(2)
    ]
    of_queue, of_other = _failures(queue), _failures(other)
    await redis.set(queue.to_key("delayed"), "no sorted set")
    await asyncio.gather(queue.connect(), other.connect())
    await until(lambda: len(of_queue) >= 2)
    await queue.close()
    at_the_end, of_other_then = len(of_queue), len(of_other)
    await until(lambda: len(of_other) >= of_other_then + 3)
    assert len(of_queue) == at_the_end
    await redis.delete(queue.to_key("delayed"))
    make_queue.claim(CommandError)


async def test_a_shared_connection_that_is_closed_ends_the_looks(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QK-60: after one error, however many notices come"""
    monkeypatch.setattr(clocks, "RETRY_S", 0.01)
    client = await beequeue.connect(make_queue.url)
    queue = await make_queue(redis=client, is_worker=False, get_events=False, activate_delayed_jobs=True).ready()
    other = await make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True).ready()
    failures, raised = _failures(queue), Seen()
    other.on("raised jobs", raised)
    await client.close()
    for number in range(1, 4):
        await _put(redis, other, f"due {number}", 1)
        await redis.publish(queue.to_key("earlierDelayed"), "1")
        await raised.reaches(number)
    assert len(failures) == len(make_queue.claim(QueueClosed)) == 1
    await redis.delete(queue.to_key("waiting"))


# --- stalled: what comes back ----------------------------------------------------------------------------------------------


async def test_a_job_in_active_without_a_worker_runs_last(make_queue: MakeQueue, redis: Any) -> None:
    """ST-01, ST-14, QK-36: processing begins with a check, which finds it if there was a check before"""
    queue = make_queue(stalled_check_interval=0)
    handled = Seen()

    async def handler(job: Job) -> None:
        handled(job.id)

    for _ in range(3):
        await queue.create_job({}).save()
    await _take(redis, queue)
    assert await queue.check_stalled_jobs() == 0
    await redis.delete(queue.to_key("stallBlock"))
    queue.process(handler)
    assert await handled.reaches(3) == [("2",), ("3",), ("1",)]


async def test_more_stalled_jobs_than_a_command_takes(make_queue: MakeQueue, redis: Any) -> None:
    """ST-02, ST-15, EV-07: `stalled` fires once for each, before the check returns, and all run"""
    count = 1025
    queue, deaf = make_queue(remove_on_success=True), make_queue(is_worker=False)
    stalled, not_here, done = Seen(), Seen(), Seen()
    queue.on("stalled", stalled)
    deaf.on("stalled", not_here)
    queue.on("succeeded", lambda job, result: done(job.id))
    assert await queue.save_all(queue.create_job({}) for _ in range(count)) == {}
    await redis.rename(queue.to_key("waiting"), queue.to_key("active"))
    assert await queue.check_stalled_jobs() == 0
    await redis.delete(queue.to_key("stallBlock"))
    checking = asyncio.create_task(queue.check_stalled_jobs())
    told_at_the_end: list[int] = []
    checking.add_done_callback(lambda task: told_at_the_end.append(len(stalled.calls)))
    assert await checking == count
    ids = {(str(number),) for number in range(1, count + 1)}
    assert told_at_the_end == [count]
    assert set(stalled.calls) == ids
    assert not await redis.exists(queue.to_key("active"))
    queue.process(echo, 50)
    await done.reaches(count)
    assert (len(done.calls), set(done.calls)) == (count, ids)
    assert not_here.calls == []


async def test_the_jobs_of_several_lost_workers(make_queue: MakeQueue, redis: Any) -> None:
    """ST-03, ST-13: a sixth worker runs all five"""
    release, started = threading.Event(), Seen()
    loop = asyncio.get_running_loop()

    def hang(job: Job) -> None:
        loop.call_soon_threadsafe(started, job.id)
        release.wait(10)

    sixth = make_queue(stalled_check_interval=0)
    for number in range(1, 6):
        gone = make_queue(get_events=False)
        await sixth.create_job({}).save()
        gone.process(hang)
        await started.reaches(number)
        with pytest.raises(OperationTimedOut):
            await gone.close(1)
        make_queue.queues.remove(gone)
    assert await redis.lrange(sixth.to_key("active"), 0, -1) == ["5", "4", "3", "2", "1"]
    await redis.delete(sixth.to_key("stallBlock"))
    await sixth.check_stalled_jobs()
    await redis.delete(sixth.to_key("stallBlock"))
    done = Seen()
    sixth.on("succeeded", lambda job, result: done(job.id))
    sixth.process(echo)
    await done.reaches(5)
    assert sorted(done.calls) == [("1",), ("2",), ("3",), ("4",), ("5",)]
    release.set()
    await until(lambda: len(make_queue.errors) == 5)
    assert len(make_queue.claim(OutcomeNotRecorded)) == 5
    assert await redis.scard(sixth.to_key("succeeded")) == 5


async def test_a_killed_workers_jobs_run_on_another(make_queue: MakeQueue, redis: Any, make_victim: MakeVictim) -> None:
    """ST-04, ST-17, ST-18, QK-36: without a call of a check; five of the ten jobs stalled; all ten run, and no retry is used"""
    survivor = make_queue(stall_interval=100)
    handled, stalled = Seen(), Seen()

    async def handler(job: Job) -> None:
        handled(job.id, job.options["retries"])

    survivor.on("stalled", stalled)
    jobs = [await survivor.create_job({}).retries(1).save() for _ in range(10)]
    victim = await make_victim(concurrency=5, stall_interval=100)
    assert await victim.holds(5) == ["1", "2", "3", "4", "5"]
    await victim.kill()
    survivor.process(handler)
    for job in jobs:
        await job.result()
    for _ in range(2):
        await redis.delete(survivor.to_key("stallBlock"))
        assert await survivor.check_stalled_jobs() == 0
    assert sorted(int(job_id) for job_id, _ in handled.calls) == list(range(1, 11))
    assert {retries for _, retries in handled.calls} == {1}
    assert sorted(stalled.calls) == [("1",), ("2",), ("3",), ("4",), ("5",)]
    assert await redis.scard(survivor.to_key("succeeded")) == 10


async def test_a_repeated_check_finds_the_jobs_of_each_killed_worker(
    make_queue: MakeQueue, redis: Any, make_victim: MakeVictim
) -> None:
    """ST-05, ST-07, ST-16: one `stalled` for each; none while its worker lives; never for a job that runs or has ended"""
    survivor = make_queue(stall_interval=200)
    stalled, handled, gate = Seen(), Seen(), asyncio.Event()

    async def handler(job: Job) -> None:
        handled(job.id)
        if job.data == "long":
            await gate.wait()

    survivor.on("stalled", stalled)
    victims = await asyncio.gather(*(make_victim(concurrency=1, stall_interval=200) for _ in range(2)))
    held = [await survivor.create_job({}).save() for _ in victims]
    owners = {(await victim.holds(1))[0]: victim for victim in victims}
    survivor.process(handler, 2)
    long = await survivor.create_job("long").save()
    await handled.reaches(1)
    assert await survivor.check_stalled_jobs(20) == 0
    for _ in range(2):  # a copy of active, and each job reported as alive
        await until(lambda: redis.exists(survivor.to_key("stalling")))
        await until(lambda: _not(redis.exists(survivor.to_key("stalling"))))
    assert stalled.calls == []
    for number, job in enumerate(held, 1):
        assert job.id is not None
        await (await survivor.create_job("short").save()).result()
        await owners[job.id].kill()
        await job.result()
        assert stalled.calls[number - 1 :] == [(job.id,)]
    gate.set()
    await long.result()
    assert stalled.calls == [("1",), ("2",)]
    assert len(handled.calls) == 5


async def test_a_job_that_stalls_repeatedly(make_queue: MakeQueue, redis: Any) -> None:
    """QK-35, ST-17: it runs again, without limit, and its entry does not change"""
    queue = make_queue()
    stalled = Seen()
    queue.on("stalled", stalled)
    job = await queue.create_job("x").retries(1).save()
    entry = await redis.hget(queue.to_key("jobs"), "1")
    for times in range(1, 13):
        await _take(redis, queue)
        for recovered in (0, 1):
            await redis.delete(queue.to_key("stallBlock"))
            assert await queue.check_stalled_jobs() == recovered
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
        assert len(stalled.calls) == times
    assert await redis.hget(queue.to_key("jobs"), "1") == entry
    queue.process(echo)
    assert await job.result() == "x"


# --- stalled: how often it is checked ----------------------------------------------------------------------------------------


async def test_a_repeated_check(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """ST-07, ST-08: the first at once, whose count is returned; then an interval after each, with `stalled`; until close()"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = make_queue(redis=relay.url, is_worker=False, stall_interval=1)
        stalled = Seen()
        queue.on("stalled", stalled)
        for job_id in ("b", "a"):
            await redis.lpush(queue.to_key("active"), job_id)
            await redis.sadd(queue.to_key("stalling"), job_id)
        assert await queue.check_stalled_jobs(timedelta(milliseconds=30)) == 2
        assert len(times) == 1
        assert sorted(stalled.calls) == [("a",), ("b",)]
        await redis.lpush(queue.to_key("active"), "c")
        assert (await stalled.reaches(3))[2:] == [("c",)]
        await until(lambda: len(times) >= 5)
        assert all(later - earlier >= 0.029 for earlier, later in itertools.pairwise(times))
        await queue.close()
        ended = len(times)
        await _meanwhile(make_queue, 30)
        assert len(times) == ended
    await redis.delete(queue.to_key("waiting"))


async def test_a_slow_first_check_is_not_overtaken(make_queue: MakeQueue, url: str) -> None:
    """ST-08: the next one comes an interval after its answer"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        relay.hold("command")
        checking = asyncio.create_task(queue.check_stalled_jobs(20))
        await until(lambda: len(times) == 1)
        await _meanwhile(make_queue, 20)
        asked = len(times)
        relay.release("command")
        await checking
        await until(lambda: len(times) >= 3)
        await queue.close()
    assert asked == 1


async def test_failing_checks(make_queue: MakeQueue, redis: Any) -> None:
    """ST-09, QK-68, ER-03: the first raises; each later one is reported, and the repetition goes on"""
    queue = await make_queue(is_worker=False, stall_interval=1).ready()
    stalled = Seen()
    queue.on("stalled", stalled)
    await redis.set(queue.to_key("stalling"), "no set")
    with pytest.raises(CommandError, match="WRONGTYPE") as first:
        await queue.check_stalled_jobs(10)
    await until(lambda: len(make_queue.errors) >= 3)
    await redis.delete(queue.to_key("stalling"))
    await redis.lpush(queue.to_key("active"), "lost")
    assert await stalled.reaches(1) == [("lost",)]
    errors = make_queue.claim(CommandError)
    assert len({id(error) for error in (first.value, *errors)}) == 1 + len(errors) >= 4
    await redis.delete(queue.to_key("waiting"))


async def test_listeners_of_stalled_that_raise_stop_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """QK-14, QK-68, QK-37: neither the start of processing nor a repetition"""
    queue = make_queue(stall_interval=1, stalled_check_interval=10)
    told = Seen()

    def bad(job_id: str) -> None:
        told(job_id)
        raise RuntimeError("mine")

    queue.on("stalled", bad)
    await queue.ready()
    await redis.lpush(queue.to_key("active"), "ghost 1")
    await redis.sadd(queue.to_key("stalling"), "ghost 1")
    queue.process(echo)
    assert await (await queue.create_job("x").save()).result() == "x"
    assert told.calls == [("ghost 1",)]
    await redis.lpush(queue.to_key("active"), "ghost 2")
    assert (await told.reaches(2))[1:] == [("ghost 2",)]
    await until(lambda: len(make_queue.errors) == 2)
    assert len(make_queue.claim(ListenerFailed)) == 2


async def test_a_queue_has_one_repetition(make_queue: MakeQueue, url: str) -> None:
    """ST-10, ST-11: a further call makes one more check, with an interval or without"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = make_queue(redis=relay.url, is_worker=False)
        for interval in (50, 50, 50, None, 0):
            await queue.check_stalled_jobs(interval)
        assert len(times) == 5
        await until(lambda: len(times) >= 9)
        assert all(later - earlier >= 0.049 for earlier, later in itertools.pairwise(times[5:9]))
        await queue.close()


async def test_a_single_check(make_queue: MakeQueue, url: str) -> None:
    """ST-11, QK-69: without an interval; a wrong interval checks nothing"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = make_queue(redis=relay.url, is_worker=False)
        await queue.check_stalled_jobs()
        await queue.check_stalled_jobs(0)
        await queue.check_stalled_jobs(timedelta(0))
        wrong: list[tuple[Any, type[Exception], str]] = [
            (-1, ValueError, "^interval must be at least 0 ms, not -1$"),
            (timedelta(seconds=-1), ValueError, "^interval must be at least 0 ms, not -1000$"),
            (1.5, TypeError, r"^interval must be an int of milliseconds or a timedelta, not 1\.5$"),
            ("50", TypeError, "not '50'$"),
            (True, TypeError, "not True$"),
            (math.nan, TypeError, "not nan$"),
        ]
        for interval, error, message in wrong:
            with pytest.raises(error, match=message):
                await queue.check_stalled_jobs(interval)
        await _meanwhile(make_queue, 10)
        assert len(times) == 3
        await queue.close()


async def test_a_later_interval_replaces_the_one_before(make_queue: MakeQueue, url: str) -> None:
    """QK-69, QK-34: whether it is longer or shorter; one above 2^31 ms makes no busy loop"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = make_queue(redis=relay.url, is_worker=False)
        await queue.check_stalled_jobs(60_000)
        await queue.check_stalled_jobs(20)
        await until(lambda: len(times) >= 5)
        await queue.check_stalled_jobs(2**31 + 1000)
        replaced = len(times)
        await _meanwhile(make_queue, 20)
        assert len(times) == replaced
        await queue.close()


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"stall_interval": 40}, 0.04),
        ({"stall_interval": 5_000, "stalled_check_interval": 30}, 0.03),
        ({"stall_interval": 20, "stalled_check_interval": timedelta(milliseconds=40)}, 0.04),
    ],
    ids=["the stall interval", "shorter", "longer"],
)
async def test_a_worker_repeats_the_check_unasked(
    make_queue: MakeQueue, url: str, settings: dict[str, Any], least: float
) -> None:
    """ST-18, QK-36"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        worker = make_queue(redis=relay.url, get_events=False, **settings)
        worker.process(echo)
        await until(lambda: len(times) >= 4)
        assert all(later - earlier >= least - 0.001 for earlier, later in itertools.pairwise(times))
        await worker.close()


async def test_a_worker_set_to_check_once(make_queue: MakeQueue, url: str) -> None:
    """ST-18, P-17: a worker that does not process checks nothing"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        worker = make_queue(redis=relay.url, stall_interval=10, stalled_check_interval=0)
        idle = make_queue(redis=relay.url, stall_interval=10)
        await asyncio.gather(worker.ready(), idle.ready())
        await _meanwhile(make_queue, 10)
        assert len(times) == 0
        worker.process(echo)
        assert await (await worker.create_job("x").save()).result() == "x"
        await _meanwhile(make_queue, 10)
        assert len(times) == 1
        await asyncio.gather(worker.close(), idle.close())


async def test_a_users_repetition_replaces_the_workers(make_queue: MakeQueue, url: str) -> None:
    """ST-10, ST-18, QK-69: whether the user starts it before processing or after"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        before = make_queue(redis=relay.url, stalled_check_interval=10)
        await before.check_stalled_jobs(60_000)
        before.process(echo)
        await (await before.create_job({}).save()).result()
        await _meanwhile(make_queue, 10)
        assert len(times) == 2
        await before.close()
        after = make_queue(redis=relay.url, stalled_check_interval=10)
        after.process(echo)
        await (await after.create_job({}).save()).result()
        await after.check_stalled_jobs(60_000)
        replaced = len(times)
        await _meanwhile(make_queue, 10)
        assert len(times) == replaced
        await after.close()


async def test_a_check_under_way_does_not_outlive_close(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """CL-10, CL-15, ST-19: the repetition ends with close()"""
    async with Relay(url) as relay:
        times = _times_of(relay, CHECK)
        queue = make_queue(redis=relay.url, is_worker=False, stall_interval=1)
        await queue.check_stalled_jobs(10)
        relay.hold("command")  # the first check was answered; the next one will not be
        await until(lambda: len(times) == 2)
        await queue.close()
        ended = len(times)
        await _meanwhile(make_queue, 10)
        assert len(times) == ended
        assert not await redis.exists(queue.to_key("stallBlock"))
        assert make_queue.errors == []


async def test_a_repetition_that_begins_while_the_queue_closes(make_queue: MakeQueue) -> None:
    """CL-10, ST-19: it ends with close() too"""
    queue = make_queue()
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    await queue.create_job({}).save()
    queue.process(handler)
    await started.reaches(1)
    closing = asyncio.create_task(queue.close())
    await until(lambda: not queue.is_running())
    await queue.create_job({}).save()
    await queue.check_stalled_jobs(10)
    gate.set()
    await closing
    await _meanwhile(make_queue, 10)
    assert make_queue.errors == []


# --- helpers -------------------------------------------------------------------------------------------------------------


async def test_a_job_announced_while_the_connection_was_down(make_queue: MakeQueue, url: str) -> None:
    """a reconnect makes the activator look: the announcement is not repeated, and the window is 20 minutes"""
    async with Relay(url) as relay:
        options: dict[str, Any] = {"get_events": False, "activate_delayed_jobs": True, "reconnect": lambda attempt: 10}
        worker = await make_queue(redis=relay.url, **options).ready()
        done = Seen()
        worker.on("succeeded", done)
        worker.process(echo)
        relay.hold("event")
        await (await make_queue(is_worker=False).ready()).create_job({}).delay_until(now_ms() + 50).save()
        for line in relay.lines:
            if line.role == "event":
                line.cut()
        relay.release("event")
        await until(lambda: worker.reconnects == 1)
        await done.reaches(1)
        assert len(make_queue.claim(ConnectionLost)) == 1
        await worker.close()


VICTIM = """
import asyncio, sys
from beequeue import Queue

async def hang(job):
    print(job.id, flush=True)
    await asyncio.Event().wait()

name, url, concurrency, stall_interval = sys.argv[1:]
queue = Queue(name, url, get_events=False, stall_interval=int(stall_interval), stalled_check_interval=0)
asyncio.run(queue.run(hang, int(concurrency)))
"""


class Victim:
    """A worker in another process, whose handler never ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def holds(self, count: int) -> list[str]:
        """Returns the ids of the next `count` jobs that it has begun."""
        assert self._process.stdout is not None
        async with asyncio.timeout(10):
            return [(await self._process.stdout.readline()).decode().strip() for _ in range(count)]

    async def kill(self) -> None:
        """Sends SIGKILL while its handlers run."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


MakeVictim = Callable[..., Awaitable[Victim]]


@pytest.fixture
async def make_victim(name: str, url: str) -> AsyncIterator[MakeVictim]:
    victims: list[Victim] = []

    async def make(*, concurrency: int, stall_interval: int) -> Victim:
        command = (sys.executable, "-c", VICTIM, name, url, str(concurrency), str(stall_interval))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, preexec_fn=end_with_parent())
        victims.append(Victim(process))
        return victims[-1]

    yield make
    for victim in victims:
        await victim.kill()


def _times_of(relay: Relay, what: bytes) -> list[float]:
    """Collects the times at which queues say this through a relay, from now on."""
    times: list[float] = []

    def hear(line: Line, data: bytes) -> None:
        times.extend([asyncio.get_running_loop().time()] * data.count(what))

    relay.said_on = hear
    return times


async def _meanwhile(make_queue: MakeQueue, interval_ms: int) -> None:
    """Returns when a queue of another name has repeated its stall check three times."""
    async with Relay(make_queue.url) as relay:
        other = make_queue(f"{make_queue.name}-other", redis=relay.url, is_worker=False, get_events=False)
        await other.check_stalled_jobs(interval_ms)
        await until(lambda: said(relay, CHECK) >= 4)
        await other.close()


def _watch_timers(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Notes the times that timers are set to, and sets them."""
    asked, schedule = Seen(), EagerTimer.schedule

    def watched(timer: EagerTimer, when: float | None) -> None:
        asked(when)
        schedule(timer, when)

    monkeypatch.setattr(EagerTimer, "schedule", watched)
    return asked


def _failures(queue: Queue) -> list[float]:
    """Collects the times at which the queue reports errors, from now on."""
    times: list[float] = []
    queue.on("error", lambda error: times.append(asyncio.get_running_loop().time()))
    return times


async def _put(redis: Any, queue: Queue, job_id: str, when: float) -> None:
    """Adds a delayed job without a notice."""
    await redis.hset(queue.to_key("jobs"), job_id, json.dumps({"data": {}, "options": {}}))
    await redis.zadd(queue.to_key("delayed"), {job_id: when})


async def _take(redis: Any, queue: Queue) -> None:
    """Takes a job like a worker that then goes silent."""
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")


async def _messages(pubsub: Any, count: int) -> AsyncIterator[Any]:
    async for message in pubsub.listen():
        if message["type"] == "message":
            yield message
            count -= 1
            if not count:
                return


async def _not(awaitable: Awaitable[Any]) -> bool:
    return not await awaitable


# --- neither clock ends without a word -------------------------------------------------------------------------------------


def _fails_once(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Makes the next call fail with an unexpected error."""
    of_store = getattr(Store, method)

    def fail(self: Store, *args: Any) -> Any:
        monkeypatch.setattr(Store, method, of_store)
        raise RuntimeError("nobody expects this")

    monkeypatch.setattr(Store, method, fail)


async def test_an_unexpected_error_does_not_end_the_looks(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """it is reported, and due jobs are raised without another notice"""
    monkeypatch.setattr(beequeue.tasks, "FIRST_PAUSE_S", 0.01)
    activator = make_queue(is_worker=False, get_events=False, activate_delayed_jobs=True, near_term_window=3_600_000)
    raised = Seen()
    activator.on("raised jobs", raised)
    await activator.ready()
    await until(lambda: activator._activator is not None and not activator._activator._wanted.is_set())
    _fails_once(monkeypatch, "raise_delayed")
    await _put(redis, activator, "due", 1)
    assert activator._activator is not None
    activator._activator.look_now()
    assert await raised.reaches(1) == [(1,)]
    (failure,) = make_queue.claim(TaskFailed)
    assert str(failure).startswith("delayed jobs: RuntimeError: nobody expects this")
    await redis.delete(activator.to_key("waiting"))


async def test_an_unexpected_error_does_not_end_the_checks(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beequeue.tasks, "FIRST_PAUSE_S", 0.01)
    queue = make_queue(stall_interval=10)
    stalled = Seen()
    queue.on("stalled", stalled)
    await queue.check_stalled_jobs(10)
    _fails_once(monkeypatch, "check_stalled")
    await until(lambda: make_queue.errors)
    await redis.lpush(queue.to_key("active"), "lost")
    assert await stalled.reaches(1) == [("lost",)]
    (failure,) = make_queue.claim(TaskFailed)
    assert str(failure).startswith("stall check: RuntimeError: nobody expects this")
    await queue.close()
    await redis.delete(queue.to_key("waiting"))
