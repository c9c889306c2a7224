"""Saving jobs: one, or many by few script calls.

A job is bound to its id in the step that parses the reply which names it, when the queue is ordered: its events may stand right
behind that reply. With two sockets it is bound as in bee-queue 2.0.0, when whoever waits for the save goes on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from beequeue.errors import BeeQueueError, ConnectionLost
from beequeue.host import Host
from beequeue.job import Job, id_from
from beequeue.store.store import Store
from beequeue.wire.link import Command, complete

AT_ONCE = 1_000
"""How many jobs a bulk save has in flight."""
IN_A_CALL, BYTES_IN_A_CALL = 100, 2**16
"""How many jobs, and of what size, one script stores before others have their turn in Redis."""

Outcome = bool | BeeQueueError
"""Of one save: whether the job was stored, or what went wrong."""


class Saver:
    """Stores one queue's jobs in `jobs` and makes them available; `bind` has each receive its events."""

    def __init__(self, host: Host, bind: Callable[[Job], None], *, ordered: bool) -> None:
        self._host = host
        self._calls = host._calls
        self._bind = bind
        self._ordered = ordered

    async def save(self, job: Job) -> None:
        """Stores one; raises what went wrong."""
        form = _form_to_save(job)
        job.saving = True
        try:
            store = await self._host._usable()
        except BaseException:
            job.saving = False
            raise
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        command = store.add(form.id, form.entry, form.delay, lambda reply: complete(answered, self._outcome(job, form, reply)))
        with self._calls:
            try:
                was_stored = await answered
            except asyncio.CancelledError:
                job.saving = job.saving and not store.withdraw(command)
                raise
        if was_stored:
            self._stored(job, form)

    async def save_all(self, jobs: Sequence[Job], timeout_ms: int | None) -> dict[Job, Exception]:
        """Stores many, each once; what went wrong with which. Past `timeout_ms` it waits for none of them."""
        errors: dict[Job, Exception] = {}
        now = asyncio.get_running_loop().time
        deadline = None if timeout_ms is None else now() + timeout_ms / 1000
        try:
            async with asyncio.timeout_at(deadline):
                store = await self._host._usable()
        except TimeoutError:
            return {job: late(maybe_applied=False) for job in jobs}
        with self._calls:
            for start in range(0, len(jobs), AT_ONCE):
                some = jobs[start : start + AT_ONCE]
                if deadline is not None and start > 0 and now() >= deadline:
                    errors.update((job, late(maybe_applied=False)) for job in some)
                else:
                    left_s = None if deadline is None else max(0.0, deadline - now())
                    errors.update(await self._save_at_once(store, some, left_s))
        return errors

    async def _save_at_once(self, store: Store, jobs: Sequence[Job], timeout_s: float | None) -> dict[Job, Exception]:
        unanswered = 1  # until all are sent: a reply may come at once
        answers: set[int] = set()
        errors: dict[Job, Exception] = {}
        stored: list[tuple[Job, _Form]] = []
        all_answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answered(number: int, saves: list[tuple[Job, _Form]], replies: Any) -> None:
            nonlocal unanswered
            answers.add(number)
            failed = isinstance(replies, BeeQueueError)
            for index, (job, form) in enumerate(saves):
                outcome = self._outcome(job, form, copy(replies) if failed else replies[index])
                if outcome is True:
                    stored.append((job, form))
                elif outcome is not False:
                    errors[job] = outcome
            unanswered -= 1
            if not unanswered:
                complete(all_answered, None)

        calls: list[tuple[Command, list[tuple[Job, _Form]]]] = []

        def take_back() -> dict[Job, Exception]:
            """For what has no answer yet; what has not been sent must not be sent later."""
            left: dict[Job, Exception] = {}
            for number, (command, saves) in enumerate(calls):
                if number not in answers:
                    withdrawn = store.withdraw(command)
                    for job, _ in saves:
                        job.saving = not withdrawn
                        left[job] = late(maybe_applied=not withdrawn)
            return left

        try:
            for number, saves in enumerate(_in_calls(jobs, errors)):
                unanswered += 1
                calls.append((self._add_all(store, saves, functools.partial(answered, number, saves)), saves))
                if len(saves) > 1:
                    await asyncio.sleep(0)  # it leaves, and Redis stores it while the next ones are written
            answered(-1, [], [])
            await asyncio.wait((all_answered,), timeout=timeout_s)
        except asyncio.CancelledError:
            take_back()
            raise
        failed = errors | take_back()  # as it is now: a reply that is late is told to nobody
        for job, form in stored:
            self._stored(job, form)
        return failed

    def _add_all(self, store: Store, saves: list[tuple[Job, _Form]], answered: Callable[[Any], None]) -> Command:
        for job, _ in saves:
            job.saving = True
        form = saves[0][1]
        if len(saves) > 1:
            return store.add_all([(form.id, form.entry) for _, form in saves], answered)
        return store.add(form.id, form.entry, form.delay, lambda reply: answered([reply]))

    def _outcome(self, job: Job, form: _Form, reply: Any) -> Outcome:
        """What the reply to a save says of its job, which is told."""
        job.saving = False
        if isinstance(reply, BeeQueueError):
            return reply
        if reply is None:
            # in use: by the job itself, if it was saved under this id before
            job.id = form.id if form.id == job.saved_as else None
            return False
        job.id = job.saved_as = Store.job_id(reply)
        job.created_at = form.created_at
        if self._ordered:
            # here, in the step that parses the reply: the job's events may stand right behind it
            self._bind(job)
        return True

    def _stored(self, job: Job, form: _Form) -> None:
        """What can wait until the caller of `save` goes on."""
        if not self._ordered:
            # bee-queue 2.0.0's way: an event that came before this is lost to the job
            self._bind(job)
        if form.delay is not None:
            self._host._job_is_due(form.delay)


class _Form(NamedTuple):
    """A job as it was when it was to be saved."""

    id: str
    """Empty: the next automatic one."""
    entry: bytes
    delay: float | None
    created_at: Any


def late(done: str = "saved", *, maybe_applied: bool) -> ConnectionLost:
    """What a caller gets past its time-out; the job was not, or may have been, `done`."""
    if maybe_applied:
        return ConnectionLost(f"Redis did not answer within the time-out; the job may have been {done}", maybe_applied=True)
    return ConnectionLost(f"Redis was not there within the time-out; the job was not {done}", maybe_applied=False)


def _is_being_saved(job: Job) -> BeeQueueError:
    return BeeQueueError(f"{job!r} is being saved already")


def _form_to_save(job: Job) -> _Form:
    """Raises `TypeError` or `ValueError` for what somebody put into the job past its setters."""
    if job.saving:
        raise _is_being_saved(job)
    delay = job.options.get("delay")
    if delay is not None and (isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < 2**53):
        raise ValueError(f"the option delay must be epoch milliseconds, not {delay!r}")
    return _Form("" if job.id is None else id_from(job.id), job.encode(), delay, job.options.get("timestamp"))


def _in_calls(jobs: Iterable[Job], errors: dict[Job, Exception]) -> Iterator[list[tuple[Job, _Form]]]:
    """Jobs in the order in which they are to be saved, those of one script together; what cannot be saved goes to `errors`."""
    together: list[tuple[Job, _Form]] = []
    size = 0
    for job in jobs:
        try:
            form = _form_to_save(job)
        except (TypeError, ValueError, BeeQueueError) as error:
            errors[job] = error
            continue
        is_full = len(together) == IN_A_CALL or size + len(form.entry) > BYTES_IN_A_CALL
        if together and (form.delay is not None or is_full):
            yield together
            together, size = [], 0
            if job.saving:  # meanwhile, by somebody else
                errors[job] = _is_being_saved(job)
                continue
        together.append((job, form))
        size += len(form.entry)
        if form.delay is not None:
            yield together
            together, size = [], 0
    if together:
        yield together
