"""Attempts that begin and end together: each has its own task, and one script settles those that end in one step."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from contextvars import ContextVar
from typing import Any

import pytest

from beequeue import CommandError, Job, LateFinish, OutcomeNotRecorded, Queue
from beequeue.store.scripts import SCRIPTS
from beequeue.worker import exchange as exchange_module
from client import Chains
from tests.conftest import MakeQueue, Seen, until
from tests.observe import Spoken
from tests.relay import Relay

trace: ContextVar[str] = ContextVar("trace", default="nothing")


async def save(queue: Queue, count: int) -> list[Job]:
    jobs = [queue.create_job(number) for number in range(count)]
    assert await queue.save_all(jobs) == {}
    return jobs


async def test_no_job_sees_what_another_left_in_the_context(make_queue: MakeQueue) -> None:
    queue = make_queue()
    jobs = await save(queue, 20)

    async def handler(job: Job) -> str:
        found = trace.get()
        trace.set(f"job {job.id}")
        if job.data % 3 == 0:
            await asyncio.sleep(0)
        return found

    queue.process(handler, 7)
    assert await asyncio.gather(*(job.result() for job in jobs)) == ["nothing"] * 20


class Incomparable:
    """Like an array: comparing two of them raises."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")


async def test_values_in_the_context_need_not_be_comparable(make_queue: MakeQueue, caplog: pytest.LogCaptureFixture) -> None:
    variable: ContextVar[Any] = ContextVar("variable")
    first = Incomparable()
    variable.set(first)
    queue = make_queue()
    jobs = await save(queue, 10)

    async def handler(job: Job) -> bool:
        found = variable.get() is first
        variable.set(Incomparable())
        return found

    queue.process(handler, 10)
    assert await asyncio.gather(*(job.result() for job in jobs)) == [True] * 10
    gc.collect()
    assert caplog.messages == []


async def test_no_job_is_cancelled_for_another(make_queue: MakeQueue) -> None:
    """a job that asks for its own cancellation, and ends before it comes, has succeeded"""
    queue = make_queue()
    jobs = await save(queue, 10)

    async def handler(job: Job) -> Any:
        task = asyncio.current_task()
        assert task is not None
        if job.data % 2:
            await asyncio.sleep(0)
            assert not task.cancelling()
        else:
            task.cancel()
        return job.data

    queue.process(handler, 10)
    assert await asyncio.gather(*(job.result() for job in jobs)) == [*range(10)]


async def test_each_handler_has_a_task_of_its_own(make_queue: MakeQueue) -> None:
    """so anything kept by task (a session, a way to cancel it later) belongs to one job, whether its handler suspends or not"""
    queue = make_queue()
    jobs = await save(queue, 60)
    tasks: list[asyncio.Task[Any] | None] = []

    async def handler(job: Job) -> None:
        tasks.append(asyncio.current_task())
        if job.data % 3:
            await asyncio.sleep(0)

    queue.process(handler, 20)
    await asyncio.gather(*(job.result() for job in jobs))
    assert len({*tasks}) == 60


async def test_handlers_run_in_order_and_beside_each_other(make_queue: MakeQueue) -> None:
    """a handler that suspends holds up no other, in any place"""
    queue = make_queue()
    gates = {number: asyncio.Event() for number in (0, 4, 5, 9)}
    begun, ended = [], Seen()
    queue.on("succeeded", lambda job, result: ended(job.data))
    await save(queue, 10)

    async def handler(job: Job) -> None:
        begun.append(job.data)
        if job.data in gates:
            await gates[job.data].wait()

    queue.process(handler, 10)
    await ended.reaches(6)
    assert begun == [*range(10)]
    assert [number for (number,) in ended.calls] == [1, 2, 3, 6, 7, 8]
    assert queue.running == 4
    for number in (9, 5, 4, 0):
        gates[number].set()
        await ended.reaches(len(ended.calls) + 1)
    assert [number for (number,) in ended.calls[6:]] == [9, 5, 4, 0]


async def test_attempts_that_end_together_are_settled_by_one_script(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """each has its own outcome (succeeded, failed, tried again), and the same reply brings the next jobs"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, remove_on_success=False)
        ended = Seen()
        for event in ("succeeded", "failed:fatal", "retrying"):
            worker.on(event, lambda job, value, event=event: ended(job.data, event))
        jobs = [worker.create_job(number).retries(int(number == 2)) for number in range(12)]
        assert await worker.save_all(jobs) == {}
        spoken, started, gate = Spoken(relay), Seen(), asyncio.Event()

        async def handler(job: Job) -> None:
            started(job.data)
            await gate.wait()
            if job.data in (1, 2):
                raise ValueError("no luck")

        worker.process(handler, 6)
        await started.reaches(6)
        gate.set()
        await ended.reaches(13)
        first, *others = settled_by_each(spoken)
        # first four of the six that waited, a lot; their settlement has brought the others, one of them twice
        assert (first, sum(others)) == (4, 9)
        expected = {(number, "succeeded") for number in range(12)} - {(1, "succeeded"), (2, "succeeded")}
        assert {*ended.calls} == expected | {(1, "failed:fatal"), (2, "retrying"), (2, "failed:fatal")}
        assert await redis.smembers(worker.to_key("failed")) == {"2", "3"}
        assert await redis.scard(worker.to_key("succeeded")) == 10
        assert not await redis.exists(worker.to_key("active"), worker.to_key("waiting"))
        await worker.close()


async def test_many_attempts_that_end_in_one_step_are_settled_in_lots(make_queue: MakeQueue, url: str) -> None:
    """Redis settles half of them while the others run"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False)
        ended = Seen()
        worker.on("succeeded", ended)
        await save(worker, 20)
        spoken = Spoken(relay)

        async def handler(job: Job) -> None:
            pass

        worker.process(handler, 20)
        await ended.reaches(20)
        assert settled_by_each(spoken) == [10, 10]
        await worker.close()


def settled_by_each(spoken: Spoken) -> list[int]:
    """Returns how many attempts each call of the script has settled."""
    finishes = [command for _, command in spoken.commands if command[1:2] == [SCRIPTS["finish"].sha.encode()]]
    return [(len(finish) - 13) // 6 for finish in finishes]


async def test_of_attempts_that_end_together_one_comes_too_late(make_queue: MakeQueue, redis: Any) -> None:
    """QK-18: its job was removed meanwhile, which is reported; the others are settled"""
    queue = make_queue()
    jobs = await save(queue, 5)
    started, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> int:
        started(job.id)
        await gate.wait()
        return int(job.data)

    queue.process(handler, 5)
    await started.reaches(5)
    await queue.remove_job("3")
    gate.set()
    assert [await job.result() for job in jobs if job.id != "3"] == [0, 1, 3, 4]
    await until(lambda: queue.late_finishes == 1)
    assert [str(error) for error in make_queue.claim(LateFinish)] == [
        "job 3 had been settled, removed or handed on before its handler ended"
    ]
    assert not await redis.exists(queue.to_key("active"))


@pytest.mark.parametrize(
    ("key", "refused"), [("failed", "job failed"), ("delayed", "later"), ("waiting", "at once"), ("stalling", None)]
)
async def test_an_error_of_redis_for_one_attempt_is_its_own_alone(
    make_queue: MakeQueue, redis: Any, key: str, refused: str | None
) -> None:
    """the others are settled, published and tried again; its job stays in `active`, where the stall check finds it"""
    queue = make_queue(remove_on_success=True)
    told, started, gate = Seen(), Seen(), asyncio.Event()
    queue.on("job succeeded", lambda job_id, result: told(result))
    queue.on("job retrying", lambda job_id, error: told(str(error)))
    queue.on("job failed", lambda job_id, error: told("job failed"))
    again, later = queue.create_job("at once").retries(1), queue.create_job("later").retries(1).backoff("fixed", 60_000)
    await queue.save_all([again, queue.create_job("fails"), later, queue.create_job("good")])

    async def handler(job: Job) -> str:
        started(job.id)
        await gate.wait()
        if job.data == "good" or len(started.calls) > 4:
            return f"{job.data}: done"
        raise ValueError(job.data)

    queue.process(handler, 4)
    await started.reaches(4)
    await redis.set(queue.to_key(key), "neither a set nor a list")
    gate.set()
    expected = {"at once", "job failed", "later", "good: done"} - {refused}
    await told.reaches(len(expected))
    await redis.delete(queue.to_key(key))
    if key != "waiting":
        assert await again.result(8_000) == "at once: done"
    assert {result for (result,) in told.calls} - {"at once: done"} == expected
    assert len(await redis.lrange(queue.to_key("active"), 0, -1)) == (refused is not None)
    unrecorded = make_queue.claim(OutcomeNotRecorded)
    assert [str(error.__cause__).split()[0] for error in unrecorded] == (["WRONGTYPE"] if refused else [])
    make_queue.claim(CommandError)  # from the take and the clocks, which meet the same error


async def test_a_script_settles_a_bounded_number(make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """so that Redis serves others in between"""
    monkeypatch.setattr(exchange_module, "SETTLED_AT_ONCE", 3)
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False)
        ended = Seen()
        worker.on("succeeded", ended)
        await save(worker, 8)
        spoken, started, gate = Spoken(relay), Seen(), asyncio.Event()

        async def handler(job: Job) -> None:
            started(job.id)
            await gate.wait()

        worker.process(handler, 8)
        await started.reaches(8)
        gate.set()
        await ended.reaches(8)
        assert settled_by_each(spoken) == [3, 3, 2]
        await worker.close()


@pytest.mark.parametrize("suspends", [False, True])
async def test_jobs_leave_nothing_to_the_garbage_collector(make_queue: MakeQueue, suspends: bool) -> None:
    """on the worker, on the producer, or in the client's chains: circles of objects would keep it busy"""
    worker, producer = make_queue(get_events=False), make_queue(is_worker=False)

    async def handler(job: Job) -> Any:
        if suspends:
            await asyncio.sleep(0)
        return job.data

    worker.process(handler, 5)
    chains = Chains(producer, 5)
    gc.collect()
    gc.disable()
    try:
        chains.alive.fill()
        for job in await save(producer, 20):
            await job.result()
        await until(lambda: chains.counts["numJobSucceeded"] > 20)
        await chains.alive.wind_down()
        del job
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {"Job", "Attempt", "BlockingTake", "Event", "Settlement", "Taken"} & left.keys()
