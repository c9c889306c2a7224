"""Saving, step by step: what is sent in which step, and what an answer changes. No Redis: each test gives the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from beequeue import BeeQueueError, ConnectionLost, Job, QueueClosed, QueueSettings
from beequeue.producer import saver as saving_module
from beequeue.producer.saver import Answer, Saver
from beequeue.tasks import Calls

TIME = 4_000_000_000_000


class Host:
    """The inside of a queue that is open, or raises `refusal`."""

    def __init__(self) -> None:
        self.settings = QueueSettings()
        self.calls = Calls()
        self.refusal: Exception | None = None

    async def opened(self) -> None:
        if self.refusal is not None:
            raise self.refusal


class Store:
    """Keeps each call, for the test to answer; withdraws the ones that the test names."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], Callable[[Any], None]]] = []
        self.withdrawn: list[int] = []
        self.can_withdraw = False

    def add(self, job_id: str, entry: bytes, delay: float | None, on_id: Callable[[Answer], None]) -> int:
        self.calls.append(([job_id], on_id))
        return len(self.calls)

    def add_all(self, forms: list[tuple[str, bytes]], on_ids: Callable[[Any], None]) -> int:
        self.calls.append(([job_id for job_id, _ in forms], on_ids))
        return len(self.calls)

    def withdraw(self, command: int) -> bool:
        self.withdrawn.append(command)
        return self.can_withdraw

    @property
    def ids(self) -> list[list[str]]:
        """The jobs of each call."""
        return [ids for ids, _ in self.calls]

    def answer(self, answers: Any, call: int = -1) -> None:
        self.calls[call][1](answers)


class Tracker:
    """Keeps the ids in the order in which they were bound."""

    def __init__(self) -> None:
        self.bound: list[str | None] = []

    def bind(self, job: Job) -> None:
        self.bound.append(job.id)


class Queue:
    """A saver among its neighbours, and the owner of its jobs."""

    backoff_strategies: dict[str, Any] = {}  # noqa: RUF012
    _producer: Any = None

    def __init__(self) -> None:
        self.store = Store()
        self.tracker = Tracker()
        self.due: list[float] = []
        self._saver = Saver(cast(Any, Host()), cast(Any, self.store), cast(Any, self.tracker), self.due.append)

    def jobs(self, *job_ids: str, delayed: bool = False) -> list[Job]:
        return [
            Job(self, job_id=job_id, options={"timestamp": 1, **({"delay": TIME} if delayed else {})}) for job_id in job_ids
        ]

    def _listener_failed(self, event: str, error: BaseException) -> None: ...
    def _listener_awaits(self, event: str, result: Any) -> None: ...


@pytest.fixture
def queue() -> Queue:
    return Queue()


async def steps(count: int = 3) -> None:
    """Lets the loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_bounds_are_those_of_the_documentation() -> None:
    bounds = saving_module.JOBS_IN_FLIGHT, saving_module.JOBS_A_CALL, saving_module.BYTES_A_CALL
    assert bounds == (1_000, 100, 65_536)


async def test_a_job_is_bound_in_the_step_of_its_answer(queue: Queue) -> None:
    """The clock of delayed jobs is told when the caller goes on."""
    [job] = queue.jobs("a", delayed=True)
    saving = asyncio.create_task(queue._saver.save(job))
    await steps()
    assert (job.saving, queue.tracker.bound) == (True, [])
    queue.store.answer("a")
    assert (job.saving, job.saved_as, queue.tracker.bound, queue.due) == (False, "a", ["a"], [])
    await saving
    assert queue.due == [TIME]


async def test_a_queue_that_cannot_be_opened_sends_nothing(queue: Queue) -> None:
    """The job may be saved later."""
    [job] = queue.jobs("a")
    cast(Any, queue._saver)._host.refusal = QueueClosed()
    with pytest.raises(QueueClosed):
        await queue._saver.save(job)
    assert (job.saving, queue.store.ids) == (False, [])


async def test_a_saved_job_is_known_by_the_timestamp_that_was_stored(queue: Queue) -> None:
    """`options` may change before and after."""
    [job] = queue.jobs("a")
    job.options["timestamp"] = 7
    saving = asyncio.create_task(queue._saver.save(job))
    await steps()
    job.options["timestamp"] = 8
    queue.store.answer("a")
    await saving
    assert job.created_at == 7


async def test_a_save_that_is_cancelled_in_the_step_of_its_answer_is_over(queue: Queue) -> None:
    """The job was stored: nothing is left to withdraw, and it may be saved again."""
    [job] = queue.jobs("a")
    saving = asyncio.create_task(queue._saver.save(job))
    await steps()
    queue.store.answer("a")
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert not job.saving
    assert queue.store.withdrawn == []


@pytest.mark.parametrize("can_withdraw", [True, False])
async def test_a_cancelled_save_is_withdrawn_if_it_was_not_sent(queue: Queue, can_withdraw: bool) -> None:
    """A job that was sent is being saved until its answer comes."""
    queue.store.can_withdraw = can_withdraw
    single, *several = queue.jobs("a", "b", "c")
    for saving in (queue._saver.save(single), queue._saver.save_all(several)):
        task = asyncio.create_task(cast(Any, saving))
        await steps()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert queue.store.withdrawn == [1, 2]
    assert [job.saving for job in (single, *several)] == [not can_withdraw] * 3


async def test_delayed_jobs_leave_together_and_calls_of_several_one_by_one(queue: Queue) -> None:
    """A call of several jobs leaves while the next one is encoded; delayed jobs have a call each."""
    delayed = asyncio.create_task(queue._saver.save_all(queue.jobs("a", "b", "c", delayed=True)))
    await steps(1)
    assert queue.store.ids == [["a"], ["b"], ["c"]]
    for call, job_id in enumerate("abc"):
        queue.store.answer(job_id, call)
    assert await delayed == {}
    assert queue.due == [TIME] * 3
    queue.store.calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving_module, "JOBS_A_CALL", 2)
        saving = asyncio.create_task(queue._saver.save_all(queue.jobs("a", "b", "c", "d", "e")))
        turns = []
        for _ in range(4):
            await steps(1)
            turns.append(len(queue.store.calls))
    assert turns == [1, 2, 3, 3]
    assert queue.store.ids == [["a", "b"], ["c", "d"], ["e"]]
    for call, answers in enumerate((["a", "b"], ["c", "d"], "e")):
        queue.store.answer(answers, call)
    assert await saving == {}


@pytest.mark.parametrize(("beyond", "calls"), [(0, [["a", "b"]]), (1, [["a"], ["b"]])])
@pytest.mark.parametrize("first", [[], ["0"]])
async def test_one_byte_more_starts_a_new_call(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, beyond: int, calls: list[list[str]], first: list[str]
) -> None:
    """Also after a delayed job, which has a call to itself."""
    delayed, jobs = queue.jobs(*first, delayed=True), queue.jobs("a", "b")
    monkeypatch.setattr(saving_module, "BYTES_A_CALL", sum(len(job.encode()) for job in jobs) - beyond)
    saving = asyncio.create_task(queue._saver.save_all([*delayed, *jobs]))
    await steps()
    assert queue.store.ids == [[job_id] for job_id in first] + calls
    for call, job_ids in enumerate(queue.store.ids):
        queue.store.answer(job_ids if len(job_ids) > 1 else job_ids[0], call)
    assert await saving == {}


async def test_each_answer_is_its_own_jobs(queue: Queue) -> None:
    """An id, an id in use, an error; and an error for the whole call, of which each job gets a copy."""
    stored, used, failed, first, second = queue.jobs("a", "b", "c", "d", "e")
    used.saved_as = "another"
    error, lost = BeeQueueError("refused"), ConnectionLost("lost", maybe_applied=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving_module, "JOBS_A_CALL", 3)
        saving = asyncio.create_task(queue._saver.save_all([stored, used, failed, first, second]))
        await steps(5)
    queue.store.answer(["a", None, error], 0)
    assert not saving.done()
    queue.store.answer(lost, 1)
    errors = await saving
    assert errors.keys() == {failed, first, second}
    assert errors[failed] is error
    assert (str(errors[first]), str(errors[second])) == ("lost", "lost")
    assert len({id(lost), id(errors[first]), id(errors[second])}) == 3
    assert [job.id for job in (stored, used, failed)] == ["a", None, "c"]
    assert queue.tracker.bound == ["a"]
    assert not any(job.saving for job in (stored, used, failed, first, second))


async def test_jobs_that_cannot_be_saved_keep_none_of_the_others(queue: Queue) -> None:
    busy, wrong, unserialisable, good = queue.jobs("a", "b", "c", "d")
    busy.saving = True
    wrong.options["delay"] = -1
    unserialisable.data = object()
    saving = asyncio.create_task(queue._saver.save_all([busy, wrong, unserialisable, good]))
    await steps()
    assert queue.store.ids == [["d"]]
    queue.store.answer("d")
    assert {job: type(error) for job, error in (await saving).items()} == {
        busy: BeeQueueError,
        wrong: ValueError,
        unserialisable: TypeError,
    }
    assert len(await queue._saver.save_all([wrong])) == 1
    assert await queue._saver.save_all([]) == {}


@pytest.mark.parametrize("can_withdraw", [True, False])
async def test_past_its_time_out_a_bulk_save_waits_no_longer(queue: Queue, can_withdraw: bool) -> None:
    """Jobs that were sent may be stored, and are being saved still; the next thousand are not sent."""
    queue.store.can_withdraw = can_withdraw
    jobs = queue.jobs("a", "b", "c", "d", "e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving_module, "JOBS_IN_FLIGHT", 3)
        patch.setattr(saving_module, "JOBS_A_CALL", 2)
        saving = asyncio.create_task(queue._saver.save_all(jobs, 20))
        await steps()
        queue.store.answer(["a", "b"], 0)
        async with asyncio.timeout(0.9):
            errors = await saving
    assert queue.store.ids == [["a", "b"], ["c"]]
    assert {job.id: cast(ConnectionLost, error).maybe_applied for job, error in errors.items()} == {
        "c": not can_withdraw,
        "d": False,
        "e": False,
    }
    assert queue.store.withdrawn == [2]
    assert [job.saving for job in jobs] == [False, False, not can_withdraw, False, False]
    # a late answer is the job's all the same, and changes no error
    queue.store.answer("c", 1)
    assert (jobs[2].saved_as, len(errors)) == ("c", 3)
