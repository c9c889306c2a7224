"""Saving jobs: one job, or many jobs with few script calls.

On an ordered queue a job is bound to its id in the step that parses the reply to its save, because its events may follow that
reply in the same read. With two sockets it is bound as in bee-queue 2.0.0: when the caller of `save` continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from beequeue.errors import BeeQueueError, ConnectionLost
from beequeue.host import Host
from beequeue.job import Job, id_from
from beequeue.producer.tracker import Tracker
from beequeue.store.store import Store
from beequeue.wire.link import Command, complete

JOBS_IN_FLIGHT = 1_000
"""How many jobs a bulk save sends before it waits for the replies."""
JOBS_A_CALL, BYTES_A_CALL = 100, 2**16
"""How many jobs, and of what size together, one script stores before Redis serves other clients."""

Answer = str | BeeQueueError | None
"""The store's answer to a save: the job's id; None when its own id is in use; or an error."""
Outcome = bool | BeeQueueError
"""Whether a save has stored its job, or the error that it ended with."""


class Saver:
    """Saves the jobs of one queue. `job_is_due` gets the time (epoch ms) of each delayed job that was saved."""

    def __init__(self, host: Host, store: Store, tracker: Tracker, job_is_due: Callable[[float], None]) -> None:
        self._host = host
        self._store = store
        self._tracker = tracker
        self._ordered = host.settings.ordered
        self._job_is_due = job_is_due

    async def save(self, job: Job) -> None:
        """`Job.save`: stores the job in `jobs` and its id in `waiting` or `delayed`."""
        form = _form_to_save(job)
        job.saving = True
        try:
            await self._host.opened()
        except BaseException:
            job.saving = False
            raise
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        command = self._store.add(
            form.id, form.entry, form.delay, lambda answer: complete(answered, self._outcome(job, form, answer))
        )
        with self._host.calls:
            try:
                was_stored = await answered
            except asyncio.CancelledError:
                job.saving = job.saving and not self._store.withdraw(command)
                raise
        if was_stored:
            self._stored(job, form)

    async def save_all(self, jobs: Iterable[Job], timeout_ms: int | None = None) -> dict[Job, Exception]:
        """`Queue.save_all`: saves each job once, many in a round trip; returns the error of each job that was not saved.

        After `timeout_ms` it returns without the missing answers; those jobs have a `ConnectionLost`.
        """
        jobs = list(jobs)
        for job in jobs:
            if not isinstance(job, Job):
                raise TypeError(f"save_all takes jobs, not {job!r}")
            if job.queue._saver is not self:
                raise ValueError(f"save_all takes jobs of its own queue, and {job!r} is of another one")
        jobs = list(dict.fromkeys(jobs))
        now = asyncio.get_running_loop().time
        deadline = None if timeout_ms is None else now() + timeout_ms / 1000
        try:
            async with asyncio.timeout_at(deadline):
                await self._host.opened()
        except TimeoutError:
            return {job: timed_out(maybe_applied=False) for job in jobs}
        errors: dict[Job, Exception] = {}
        with self._host.calls:
            for start in range(0, len(jobs), JOBS_IN_FLIGHT):
                some = jobs[start : start + JOBS_IN_FLIGHT]
                if deadline is not None and start > 0 and now() >= deadline:
                    errors.update((job, timed_out(maybe_applied=False)) for job in some)
                else:
                    left_s = None if deadline is None else max(0.0, deadline - now())
                    errors.update(await self._save_some(some, left_s))
        return errors

    async def _save_some(self, jobs: Sequence[Job], timeout_s: float | None) -> dict[Job, Exception]:
        """Sends the saves of some jobs and waits for the answers; returns the errors."""
        errors: dict[Job, Exception] = {}
        stored: list[tuple[Job, _Form]] = []
        calls: list[_Call] = []

        def on_answers(call: _Call, answers: Sequence[Answer] | BeeQueueError) -> None:
            for index, (job, form) in enumerate(call.saves):
                # an error for the whole call: each job gets its own copy
                answer = copy(answers) if isinstance(answers, BeeQueueError) else answers[index]
                outcome = self._outcome(job, form, answer)
                if outcome is True:
                    stored.append((job, form))
                elif outcome is not False:
                    errors[job] = outcome
            complete(call.answered, None)

        try:
            for saves in _in_calls(jobs, errors):
                calls.append(self._send(saves, on_answers))
                if len(saves) > 1:
                    await asyncio.sleep(0)  # this call leaves now, and Redis stores it while the next one is encoded
            if calls:
                await asyncio.wait([call.answered for call in calls], timeout=timeout_s)
        except asyncio.CancelledError:
            self._withdraw(calls)
            raise
        failed = errors | self._withdraw(calls)  # a copy: later answers must not change it
        for call in calls:
            del call.command  # it refers to the call: the cycle would be left to the garbage collector
        for job, form in stored:
            self._stored(job, form)
        return failed

    def _send(self, saves: list[tuple[Job, _Form]], on_answers: Callable[[_Call, Any], None]) -> _Call:
        """Sends the saves of one script call; an answer may come before this returns."""
        call = _Call(saves)
        for job, _ in saves:
            job.saving = True
        form = saves[0][1]
        if len(saves) > 1:
            forms = [(form.id, form.entry) for _, form in saves]
            call.command = self._store.add_all(forms, lambda answers: on_answers(call, answers))
        else:
            call.command = self._store.add(form.id, form.entry, form.delay, lambda answer: on_answers(call, [answer]))
        return call

    def _withdraw(self, calls: Iterable[_Call]) -> dict[Job, Exception]:
        """Withdraws the calls that have not been sent; returns an error for each job without an answer."""
        left: dict[Job, Exception] = {}
        for call in calls:
            if not call.answered.done():
                withdrawn = self._store.withdraw(call.command)
                for job, _ in call.saves:
                    job.saving = not withdrawn
                    left[job] = timed_out(maybe_applied=not withdrawn)
        return left

    def _outcome(self, job: Job, form: _Form, answer: Answer) -> Outcome:
        """Updates a job from the answer to its save, in the step that parses the reply."""
        job.saving = False
        if isinstance(answer, BeeQueueError):
            return answer
        if answer is None:
            # the id is in use: by this job itself, if it was saved under that id before
            job.id = form.id if form.id == job.saved_as else None
            return False
        job.id = job.saved_as = answer
        job.created_at = form.created_at
        if self._ordered:
            # in this step: the job's events may follow the reply in the same read
            self._tracker.bind(job)
        return True

    def _stored(self, job: Job, form: _Form) -> None:
        """Does the rest, which can wait until the caller of `save` continues."""
        if not self._ordered:
            # as bee-queue 2.0.0 does: the job misses an event that came before this
            self._tracker.bind(job)
        if form.delay is not None:
            self._job_is_due(form.delay)


class _Form(NamedTuple):
    """A job's stored form, taken when `save` was called."""

    id: str
    """Empty: the next automatic id."""
    entry: bytes
    delay: float | None
    created_at: Any


class _Call:
    """One script call of a bulk save, and the jobs that it saves."""

    command: Command

    def __init__(self, saves: list[tuple[Job, _Form]]) -> None:
        self.saves = saves
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def timed_out(done: str = "saved", *, maybe_applied: bool) -> ConnectionLost:
    """The error of a call past its time-out: the job was not, or may have been, `done`."""
    if maybe_applied:
        return ConnectionLost(f"Redis did not answer within the time-out; the job may have been {done}", maybe_applied=True)
    return ConnectionLost(f"Redis could not be reached within the time-out; the job was not {done}", maybe_applied=False)


def _is_being_saved(job: Job) -> BeeQueueError:
    return BeeQueueError(f"{job!r} is being saved already")


def _form_to_save(job: Job) -> _Form:
    """Raises `TypeError` or `ValueError` when the caller has put something wrong into `options` without the setters."""
    if job.saving:
        raise _is_being_saved(job)
    delay = job.options.get("delay")
    if delay is not None and (isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < 2**53):
        raise ValueError(f"the option delay must be epoch milliseconds, not {delay!r}")
    return _Form("" if job.id is None else id_from(job.id), job.encode(), delay, job.options.get("timestamp"))


def _in_calls(jobs: Iterable[Job], errors: dict[Job, Exception]) -> Iterator[list[tuple[Job, _Form]]]:
    """Yields jobs in the caller's order, those of one script call together; puts jobs that cannot be saved into `errors`."""
    together: list[tuple[Job, _Form]] = []
    size = 0
    for job in jobs:
        try:
            form = _form_to_save(job)
        except (TypeError, ValueError, BeeQueueError) as error:
            errors[job] = error
            continue
        is_full = len(together) == JOBS_A_CALL or size + len(form.entry) > BYTES_A_CALL
        if together and (form.delay is not None or is_full):
            yield together
            together, size = [], 0
            if job.saving:  # another caller has begun to save it meanwhile
                errors[job] = _is_being_saved(job)
                continue
        together.append((job, form))
        size += len(form.entry)
        if form.delay is not None:
            yield together
            together, size = [], 0
    if together:
        yield together
