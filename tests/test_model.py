"""Random sequences of public calls, each compared with a model of a queue that does not know Redis.

There is one worker, whose handlers end when a rule says so, and one producer. After each call the model says which jobs are
waiting, active, delayed, succeeded and failed, in which order, which handlers run, and which events must have come. The queue
must agree.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from beequeue import BeeQueueError, Health, Job, LateFinish, Queue
from beequeue.job import now_ms
from tests.conftest import until

CONCURRENCY = 2
FAR = 3_600_000
OWN_IDS = ["a", "b c", "ü", "7"]
VALUES: st.SearchStrategy[Any] = st.sampled_from([None, 0, False, "", "text", "ünï\u2028", [1, 2.5, []], {"a": {}}, 2**53 - 1])


@dataclass
class Stored:
    """A job's entry, as far as the model knows it."""

    data: Any
    retries: int = 0
    status: str = "created"


@dataclass
class Run:
    """A handler that has begun; a rule ends it through `end`."""

    job: Job
    end: asyncio.Future[Any]


@dataclass
class Model:
    """A queue as its documentation describes it. The head of a list, where jobs are pushed, is index 0."""

    newest: int = 0
    jobs: dict[str, Stored] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    delayed: list[str] = field(default_factory=list)
    succeeded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    running: list[tuple[str, Stored]] = field(default_factory=list)
    """Of each busy slot the id, and the job as it was when it was taken."""
    tracked: dict[str, Job] = field(default_factory=dict)
    events: list[tuple[str, str, Any]] = field(default_factory=list)
    own_events: list[tuple[Job, str, Any]] = field(default_factory=list)
    late_finishes: int = 0

    def save(self, job: Job, own_id: str | None, stored: Stored, *, delayed: bool) -> str | None:
        job_id = own_id
        if job_id is None:
            self.newest += 1
            while str(self.newest) in self.jobs:
                self.newest += 1
            job_id = str(self.newest)
        elif job_id in self.jobs:
            return None
        self.jobs[job_id] = stored
        (self.delayed if delayed else self.waiting).insert(0, job_id)
        self.tracked[job_id] = job
        self.fill()
        return job_id

    def fill(self) -> None:
        while self.waiting and len(self.running) < CONCURRENCY:
            self.take()

    def take(self) -> None:
        job_id = self.waiting.pop()
        self.active.insert(0, job_id)
        self.running.append((job_id, self.jobs[job_id]))

    def finish(self, slot: int, outcome: Any, *, good: bool) -> None:
        job_id, taken = self.running.pop(slot)
        settles = job_id in self.active and job_id in self.jobs
        self.active = [other for other in self.active if other != job_id]
        if self.waiting:
            self.take()
        if not settles:
            self.late_finishes += 1
            self.fill()
            return
        if good:
            event, status, stored = "succeeded", "succeeded", Stored(taken.data, taken.retries, "succeeded")
            self.succeeded.add(job_id)
        elif taken.retries:
            event, status, stored = "retrying", "retrying", Stored(taken.data, taken.retries - 1, "retrying")
            self.waiting.insert(0, job_id)
        else:
            event, status, stored = "failed", "failed", Stored(taken.data, 0, "failed")
            self.failed.add(job_id)
        self.jobs[job_id] = stored
        self.events.append((event, job_id, outcome))
        if job_id in self.tracked:
            self.own_events.append((self.tracked[job_id], event, outcome))
            if status != "retrying":
                del self.tracked[job_id]
        self.fill()

    def remove(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)
        for ids in (self.waiting, self.active, self.delayed):
            ids[:] = [other for other in ids if other != job_id]
        self.succeeded.discard(job_id)
        self.failed.discard(job_id)
        if job_id in self.tracked:
            self.own_events.append((self.tracked.pop(job_id), "unknown", None))

    def retry(self, job: Job, job_id: str) -> tuple[int, int]:
        was_failed, had_ended = job_id in self.failed, job_id in self.failed | self.succeeded
        self.tracked.setdefault(job_id, job)
        if had_ended:
            self.failed.discard(job_id)
            self.succeeded.discard(job_id)
            self.waiting.insert(0, job_id)
        reply = (int(was_failed), len(self.waiting))
        self.fill()
        return reply

    def health(self) -> Health:
        return Health(
            len(self.waiting), len(self.active), len(self.succeeded), len(self.failed), len(self.delayed), self.newest
        )


class QueueMachine(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.saved: list[Job] = []
        self.runs: list[Run] = []
        self.events: list[tuple[str, str, Any]] = []
        self.own_events: list[tuple[Job, str, Any]] = []
        self.errors: list[Exception] = []
        self.do(self.open())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def open(self) -> None:
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.producer = Queue(name, self.url, is_worker=False)
        self.worker = Queue(name, self.url, get_events=False)
        for queue in (self.producer, self.worker):
            queue.on("error", self.errors.append)
            await queue.ready()
        for event in ("succeeded", "failed", "retrying"):
            self.producer.on("job " + event, self.note(event))
        self.worker.process(self.handle, CONCURRENCY)

    def note(self, event: str) -> Any:
        return lambda job_id, outcome: self.events.append((event, job_id, plain(outcome)))

    async def handle(self, job: Job) -> Any:
        run = Run(job, asyncio.get_running_loop().create_future())
        self.runs.append(run)
        outcome = await run.end
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def listen(self, job: Job) -> None:
        self.saved.append(job)
        for event in ("succeeded", "failed", "retrying", "unknown"):
            job.on(event, lambda outcome, event=event: self.own_events.append((job, event, plain(outcome))))

    # --- the calls ---------------------------------------------------------------------------------------------------

    @rule(data=VALUES, own_id=st.none() | st.sampled_from(OWN_IDS), retries=st.integers(0, 2), delayed=st.booleans())
    def save(self, data: Any, own_id: str | None, retries: int, delayed: bool) -> None:
        job = self.make(data, own_id, retries, delayed)
        expected = self.model.save(job, own_id, Stored({} if data is None else data, retries), delayed=delayed)
        self.do(job.save())
        assert job.id == expected

    @rule(values=st.lists(VALUES, max_size=5), own_id=st.none() | st.sampled_from(OWN_IDS))
    def save_all(self, values: list[Any], own_id: str | None) -> None:
        jobs = [self.make(data, own_id if index == 1 else None, 0, False) for index, data in enumerate(values)]
        assert self.do(self.producer.save_all(jobs)) == {}
        for job, data, own in zip(jobs, values, [None, own_id, None, None, None], strict=False):
            assert job.id == self.model.save(job, own, Stored({} if data is None else data), delayed=False)

    def make(self, data: Any, own_id: str | None, retries: int, delayed: bool) -> Job:
        job = self.producer.create_job(data)
        if own_id is not None:
            job.set_id(own_id)
        if retries:
            job.retries(retries)
        if delayed:
            job.delay_until(now_ms() + FAR)
        self.listen(job)
        return job

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, CONCURRENCY - 1), value=VALUES, good=st.booleans())
    def finish(self, which: int, value: Any, good: bool) -> None:
        slot = which % len(self.runs)
        self.model.finish(slot, value if good else "no luck", good=good)
        self.runs.pop(slot).end.set_result(value if good else ValueError("no luck"))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        job_id = self.some_id(data)
        self.do(self.producer.remove_job(job_id))
        self.model.remove(job_id)

    @precondition(lambda self: any(job.id for job in self.saved))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.saved if job.id]))
        assert job.id is not None
        if job.id not in self.model.jobs:
            if job.id in self.model.tracked:
                self.model.own_events.append((self.model.tracked.pop(job.id), "unknown", None))
            with pytest.raises(BeeQueueError, match="has no entry in jobs"):
                self.do(job.retry())
        else:
            assert self.do(job.retry()) == self.model.retry(job, job.id)

    @rule(data=st.data())
    def get_job(self, data: st.DataObject) -> None:
        job_id = self.some_id(data)
        job = self.do(self.producer.get_job(job_id))
        assert (job is None) == (job_id not in self.model.jobs)
        if job is not None:
            ended = job_id in self.model.succeeded | self.model.failed
            if ended:
                assert job.last_event is not None
            elif job_id not in self.model.tracked:
                self.listen(job)
                self.model.tracked[job_id] = job
            assert ended or job is self.model.tracked[job_id]

    @rule(kind=st.sampled_from(["succeeded", "failed"]))
    def clean(self, kind: str) -> None:
        ended: set[str] = getattr(self.model, kind)
        assert self.do(self.producer.clean(kind)) == len(ended)
        for job_id in ended:
            del self.model.jobs[job_id]
        ended.clear()

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        job_id = self.some_id(data)
        job = self.producer.create_job().set_id(job_id)
        for kind in ("waiting", "active", "delayed", "succeeded", "failed"):
            assert self.do(job.is_in_set(kind)) == (job_id in getattr(self.model, kind))

    def some_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(["unknown", *OWN_IDS, *(str(n + 1) for n in range(self.model.newest))]))

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        self.do(self.compare())

    async def compare(self) -> None:
        model, queue = self.model, self.producer
        await until(lambda: len(self.events) >= len(model.events) and len(self.runs) == len(model.running))
        await until(lambda: len(self.errors) == model.late_finishes == self.worker.late_finishes)
        await until(self.healthy)
        assert [(run.job.id, run.job.data) for run in self.runs] == [(job_id, job.data) for job_id, job in model.running]
        assert self.events == model.events
        assert self.own_events == model.own_events
        assert all(isinstance(error, LateFinish) for error in self.errors)
        assert queue.jobs == model.tracked
        for kind in ("waiting", "active"):
            assert [job.id for job in await queue.get_jobs(kind, end=-1)] == getattr(model, kind)
        for kind in ("delayed", "succeeded", "failed"):
            listed = await queue.get_jobs(kind, end=-1, size=1000)
            assert sorted(job.id or "" for job in listed) == sorted(getattr(model, kind))
        for job_id, stored in model.jobs.items():
            job = await Job.from_id(queue, job_id)
            assert job is not None
            assert (job.data, job.options.get("retries", 0), job.status) == (stored.data, stored.retries, stored.status)

    async def healthy(self) -> bool:
        return await self.producer.check_health() == self.model.health()

    def teardown(self) -> None:
        async def end() -> None:
            closing = asyncio.create_task(self.worker.close())
            await until(lambda: not self.worker.is_running())
            for run in self.runs:
                run.end.set_result(None)
            await closing
            await self.producer.destroy()
            await self.producer.close()

        try:
            self.do(end())
        finally:
            self.runner.close()


def plain(outcome: Any) -> Any:
    """An event's data as the model has it; it ignores the reason of an unknown outcome."""
    if not isinstance(outcome, Exception):
        return outcome
    return str(outcome) if str(outcome) == "no luck" else None


@pytest.mark.timeout(300)
def test_any_sequence_of_calls(url: str) -> None:
    QueueMachine.url = url
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)),
    )
