"""Plain handlers, which run in threads: one that hangs past its time-out fails its own job and no other."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from beequeue import Job, JobTimeout, LateFinish, threads
from tests.conftest import MakeQueue, Seen, until

SPARE = 3


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MORE_THREADS", SPARE)


class Hanging:
    """A handler each call of which returns when it is let go, and by the end of the test."""

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
    """T-05: no job fails that was not called; the log says it once; the worker goes on when a thread returns"""
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
    await until(lambda: queue._consumer and queue._consumer._intake._unanswered == 0)
    assert await redis.llen(queue.to_key("waiting")) == 4
    assert await redis.llen(queue.to_key("active")) == 0
    assert warnings(caplog) == [
        f"queue {queue.name}: {all_threads} threads hang in the handler {__name__}.Hanging past its time-out: "
        "the worker takes no job until one returns"
    ]
    hanging.gates[0].set()
    await failed.reaches(all_threads + 1)  # the next one, which hangs in the thread that has returned
    assert failed.calls[-1] == (all_threads, JobTimeout)
    assert len(warnings(caplog)) == 3
    assert warnings(caplog)[1] == f"queue {queue.name}: a thread of its handler has returned: the worker takes jobs again"
    hanging.let_go()
    await succeeded.reaches(3)
    assert sorted(hanging.calls) == list(range(count))
    assert await queue.check_health() == (0, 0, 3, all_threads + 1, 0, count)


async def test_slots_are_whole_again_when_all_threads_have_returned(make_queue: MakeQueue, hanging: Hanging) -> None:
    """neither more nor fewer than there were"""
    queue = make_queue(get_events=False)
    failed, succeeded = Seen(), Seen()
    queue.on("failed:fatal", lambda job, error: failed(job.data))
    queue.on("succeeded", lambda job, result: succeeded(job.data))
    await queue.save_all(queue.create_job(number).timeout(20) for number in range(SPARE + 2))
    queue.process(hanging, 2)
    await failed.reaches(SPARE + 2)
    hanging.let_go()
    await until(lambda: queue._consumer and queue._consumer._intake._free == 2)
    hanging.over = False
    await queue.save_all(queue.create_job(number) for number in range(100, 104))
    await until(lambda: len(hanging.calls) == SPARE + 4)
    assert queue.running == 2
    assert (await queue.check_health()).waiting == 2
    hanging.let_go()
    await succeeded.reaches(4)


async def test_a_hanging_thread_whose_job_is_gone_keeps_its_slot_too(make_queue: MakeQueue, hanging: Hanging) -> None:
    """its settlement says so, and frees nothing"""
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
