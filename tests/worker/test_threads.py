"""Plain handlers run in threads: one that hangs past its time-out fails its own job and no other."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from beequeue import Job, JobFailed, JobTimeout, LateFinish, OperationTimedOut
from beequeue.worker import threads
from tests.conftest import MakeQueue, Seen, until

SPARE = 3


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MORE_THREADS", SPARE)


class Hanging:
    """A handler whose calls return when the test lets them, at the latest at its end."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.gates: dict[Any, threading.Event] = {}
        self.over = False

    def __call__(self, job: Job) -> None:
        self.calls.append(job.data)
        gate = self.gates[job.data] = threading.Event()
        if not self.over:
            gate.wait(20)

    def let_go(self) -> None:
        self.over = True
        for gate in list(self.gates.values()):
            gate.set()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    handler = Hanging()
    yield handler
    handler.let_go()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_worker_without_free_threads_takes_no_job(
    make_queue: MakeQueue, redis: Any, hanging: Hanging, caplog: pytest.LogCaptureFixture, concurrency: int
) -> None:
    """T-05: no job fails whose handler was not called; the log says it once; a thread that returns lets the worker go on"""
    queue = make_queue(get_events=False)
    all_threads, count = SPARE + concurrency, SPARE + concurrency + 4
    failed, succeeded = Seen(), Seen()
    queue.on("failed:fatal", lambda job, error: failed(job.data, type(error)))
    queue.on("succeeded", lambda job, result: succeeded(job.data))
    for number in range(count):
        await queue.create_job(number).timeout(20).save()
    queue.process(hanging, concurrency)
    await failed.reaches(all_threads)
    assert sorted(failed.calls) == [(number, JobTimeout) for number in range(all_threads)]
    await until(lambda: queue._consumer and queue._consumer._exchange._unanswered == 0)
    assert await redis.llen(queue.to_key("waiting")) == 4
    assert await redis.llen(queue.to_key("active")) == 0
    assert warnings(caplog) == [
        f"queue {queue.name}: {all_threads} threads hang in the handler {__name__}.Hanging past its time-out: "
        "the worker takes no job until one returns"
    ]
    hanging.gates[0].set()
    await failed.reaches(all_threads + 1)  # the next job, which hangs in the thread that has returned
    assert failed.calls[-1] == (all_threads, JobTimeout)
    assert len(warnings(caplog)) == 3
    assert warnings(caplog)[1] == f"queue {queue.name}: a thread of its handler has returned: the worker takes jobs again"
    hanging.let_go()
    await succeeded.reaches(3)
    assert sorted(hanging.calls) == list(range(count))
    assert await queue.check_health() == (0, 0, 3, all_threads + 1, 0, count)


async def test_slots_are_whole_again_when_all_threads_have_returned(make_queue: MakeQueue, hanging: Hanging) -> None:
    """neither more nor fewer than before"""
    queue = make_queue(get_events=False)
    failed, succeeded = Seen(), Seen()
    queue.on("failed:fatal", lambda job, error: failed(job.data))
    queue.on("succeeded", lambda job, result: succeeded(job.data))
    await queue.save_all(queue.create_job(number).timeout(20) for number in range(SPARE + 2))
    queue.process(hanging, 2)
    await failed.reaches(SPARE + 2)
    hanging.let_go()
    await until(lambda: queue._consumer and queue._consumer._exchange._free == 2)
    hanging.over = False
    await queue.save_all(queue.create_job(number) for number in range(100, 104))
    await until(lambda: len(hanging.calls) == SPARE + 4)
    assert queue.running == 2
    assert (await queue.check_health()).waiting == 2
    hanging.let_go()
    await succeeded.reaches(4)


async def test_a_hanging_thread_whose_job_is_gone_keeps_its_slot_too(make_queue: MakeQueue, hanging: Hanging) -> None:
    """its settlement finds no job, and frees nothing"""
    queue = make_queue(get_events=False)
    failed = Seen()
    queue.on("failed:fatal", lambda job, error: failed(job.data))
    await queue.save_all(queue.create_job(number).timeout(20) for number in range(SPARE))
    queue.process(hanging, 1)
    await failed.reaches(SPARE)
    last = await queue.create_job("last").timeout(300).save()
    await until(lambda: "last" in hanging.gates)
    await last.remove()
    await until(lambda: queue.late_finishes == 1)
    assert len(make_queue.claim(LateFinish)) == 1
    waiting = await queue.create_job("waiting").save()
    await asyncio.sleep(0)
    assert await waiting.is_in_set("waiting")
    hanging.gates[0].set()
    await until(lambda: "waiting" in hanging.gates)


@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit])
async def test_an_exception_that_a_future_cannot_carry_fails_the_job(
    make_queue: MakeQueue, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """P-04: as a RuntimeError that names it; asyncio logs nothing"""
    queue = make_queue()

    def work(job: Job) -> str:
        if job.data == "bad":
            raise kind
        return "good"

    bad, good = await queue.create_job("bad").save(), await queue.create_job("good").save()
    queue.process(work)
    with pytest.raises(JobFailed, match=f"^handler raised {kind.__name__}$"):
        await bad.result()
    assert await good.result() == "good"
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []


# --- a system that allows no thread ----------------------------------------------------------------------------------


def handlers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("beequeue handler")]


@pytest.mark.parametrize("most", [0, 2])
async def test_a_system_that_gives_no_thread_fails_no_job(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    """T-05: a job waits for a thread; its time-out begins with the call; the log says it once"""
    monkeypatch.setattr(threads, "RETRY_S", 0.05, raising=False)
    queue = await make_queue(get_events=False).ready()
    await until(lambda: not handlers())
    start, refused, gives_more = threading.Thread.start, Seen(), False

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith("beequeue handler") and not gives_more and len(handlers()) >= most:
            refused()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    gate, calls, ended = threading.Event(), list[Any](), Seen()

    def work(job: Job) -> None:
        calls.append(job.data)
        if job.data < 2:
            gate.wait(10)

    for event in ("succeeded", "failed"):
        queue.on(event, lambda job, outcome: ended(job.data, outcome))
    await queue.save_all(queue.create_job(number).timeout(0 if number < 2 else 300) for number in range(4))
    queue.process(work, 4)
    await refused.reaches(40)  # which takes longer than the time-out
    assert queue.running == 4
    assert sorted(calls) == list(range(most))
    assert ended.calls == []
    gives_more = most == 0  # or else the two threads run everything
    gate.set()
    await ended.reaches(4)
    gives_more = True
    await queue.create_job(4).save()
    await ended.reaches(5)
    assert sorted(ended.calls) == [(number, None) for number in range(5)]
    assert sorted(calls) == list(range(5))
    name = f"{__name__}.{work.__qualname__}"
    assert warnings(caplog)[0] == (
        f"queue {queue.name}: the system allows no more threads: calls of the handler {name} wait for one"
    )
    assert len(warnings(caplog)) == (2 if most == 0 else 1)


async def test_a_close_hands_back_a_job_that_waits_for_a_thread(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, redis: Any
) -> None:
    """QK-30: its handler was not called, and never is"""
    start, refused = threading.Thread.start, Seen()

    def start_others(thread: threading.Thread) -> None:
        if thread.name.startswith("beequeue handler"):
            refused()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    queue, calls = make_queue(), list[Any]()
    await queue.create_job("x").save()
    queue.process(lambda job: calls.append(job.data))
    await refused.reaches(1)
    with pytest.raises(OperationTimedOut):
        await queue.close(20)
    make_queue.queues.remove(queue)
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
    assert calls == []
    await make_queue().destroy()


# --- the end of the process ------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys, threading, time
from beequeue import Queue

begun = threading.Event()

def handler(job):
    print("begins", job.data, flush=True)
    if job.data == "last":
        {last}
    print("ends", job.data, flush=True)

async def main():
    async with Queue(sys.argv[1], sys.argv[2]) as queue:
        queue.on("error", lambda error: print("error", type(error).__name__, flush=True))
        ended = asyncio.Event()
        queue.on("succeeded", lambda job, result: job.data == "last" and ended.set())
        queue.process(handler)
        await ended.wait()

def run():
    try:
        asyncio.run(main())
    finally:
        print("closed", flush=True)

threading.Thread(target=run, daemon={daemon}).start()
{daemon} and begun.wait()
"""


def program(name: str, url: str, last: str, *, daemon: bool) -> list[str]:
    """Returns the output of a program whose worker runs beside its main thread, which ends first."""
    source = PROGRAM.format(last=last, daemon=daemon)
    done = subprocess.run([sys.executable, "-c", source, name, url], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


async def test_a_worker_outlives_the_main_thread(make_queue: MakeQueue, url: str) -> None:
    """its loop runs in another thread; every job that it takes runs"""
    queue = make_queue(is_worker=False)
    await queue.save_all(queue.create_job(data) for data in (1, 2, "last"))
    said = await asyncio.to_thread(program, queue.name, url, "time.sleep(0)", daemon=False)
    assert said == ["begins 1", "ends 1", "begins 2", "ends 2", "begins last", "ends last", "closed"]
    assert await queue.check_health() == (0, 0, 3, 0, 0, 3)


async def test_a_process_that_ends_waits_for_a_handler_that_runs(make_queue: MakeQueue, url: str) -> None:
    """and its worker, in a daemon thread, fails no job that it takes meanwhile"""
    queue = make_queue(is_worker=False)
    await queue.save_all(queue.create_job(data) for data in ("last", 1, 2))
    said = await asyncio.to_thread(program, queue.name, url, "begun.set(); time.sleep(0.5)", daemon=True)
    assert said[:2] == ["begins last", "ends last"]
    assert (await queue.check_health()).failed == 0
