"""A worker: it runs the handler on each job that its exchange takes, decides the outcome, and calls the listeners.

Callbacks handle replies, in the step that parses them; only handlers have tasks. Only a job with a time-out costs
a timer. Nothing is sent to Redis from here: the exchange settles attempts, and one heartbeat reports them all.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from beequeue.errors import (
    BeeQueueError,
    JobTimeout,
    LateFinish,
    OutcomeNotRecorded,
    QueueClosed,
    UnreadableData,
)
from beequeue.host import Host
from beequeue.job import Job, now_ms
from beequeue.store.store import Settlement, Store
from beequeue.wire.link import Link
from beequeue.worker.attempt import Attempt, Handler, is_async
from beequeue.worker.exchange import Exchange
from beequeue.worker.heartbeat import Heartbeat
from beequeue.worker.outcome import fail, fail_for_good, fail_unread, retry_delay, succeed
from beequeue.worker.threads import Threads

log = logging.getLogger("beequeue")

GRACE_S = 1.0
"""How long a close past its time-out waits for the handlers that it has cancelled, and for Redis."""


class Consumer:
    """Runs `handler` on the jobs of a queue, at most `concurrency` at once."""

    def __init__(self, store: Store, host: Host, handler: Handler, concurrency: int) -> None:
        self.running = 0
        self.late_finishes = 0
        self.abandoned = 0
        """How many handlers had not ended when `drain` ran out of time."""
        self._host = host
        self._settings = host.settings
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._exchange = Exchange(store, host, concurrency, self._begin, self._ended, self._shorten)
        self._heartbeat = Heartbeat(store, host, handler, self._exchange.reported)
        self._threads = None if is_async(handler) else Threads(host.name, handler, concurrency, self._exchange.release)

    def start(self) -> None:
        """Begins to take jobs."""
        self._heartbeat.start()
        self._exchange.pump_soon()

    def owns_current_task(self) -> bool:
        """Whether the caller is one of this worker's handlers."""
        task = asyncio.current_task()
        return any(attempt.task is task for attempt in self._exchange.held)

    async def disown_reused_ids(self, link: Link) -> None:
        """See `Exchange.disown_reused_ids`."""
        await self._exchange.disown_reused_ids(link)

    # --- an attempt ------------------------------------------------------------------------------------------------------

    def _begin(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            if self._exchange.closing:
                continue  # the close hands it back
            attempt.under_way = True
            try:
                attempt.job = Job.decode(self._host.queue, attempt.id, attempt.entry)
            except UnreadableData as unreadable:
                self._host.report(unreadable)
                self._exchange.settle(attempt, fail_unread(attempt.entry))
                continue
            self.running += 1
            self._start(attempt, attempt.job)

    def _start(self, attempt: Attempt, job: Job) -> None:
        """Starts a task for the attempt, eagerly where Python can do that."""
        running = self._run(attempt, job)
        if sys.version_info >= (3, 12) and self._loop.get_task_factory() is None:
            asyncio.Task(running, loop=self._loop, name="beequeue job", eager_start=True)
        else:
            self._loop.create_task(running, name="beequeue job")

    async def _run(self, attempt: Attempt, job: Job) -> None:
        """Runs the handler, and settles the attempt by its outcome. Anything that the handler raises fails the job."""
        if attempt.abandoned:  # before it began
            return
        attempt.task = asyncio.current_task()
        try:
            if self._threads is not None:
                attempt.call = call = self._threads.call(job)
                if call.late:
                    await self._threads.wait_for_thread(call)
            limit = job.options.get("timeout")
            if limit:
                attempt.result = await self._within(limit, attempt, job)
            else:
                attempt.result = await self._call(attempt, job)
        except BaseException as raised:
            if attempt.abandoned or self._heartbeat.is_cancelled():  # the close hands the job back, or the stall check does
                self._leave(attempt)
                self._exchange.changed()
                return
            attempt.error = raised
            call_left = attempt.call if attempt.call is not None and not attempt.call.done() else None
            if self._threads is not None and call_left is not None and self._threads.hangs(call_left):
                attempt.slots = 0
        attempt.task = None
        self.running -= 1
        try:
            settlement = self._decide(attempt, job)
        except Exception as fault:  # a fault of this package
            failure = BeeQueueError(
                f"job {attempt.id} fails for good: its settlement cannot be made: {type(fault).__name__}: {fault}"
            )
            failure.__cause__ = fault
            self._host.report(failure)
            attempt.error = attempt.error or failure
            settlement = fail_for_good(job, attempt.entry, attempt.error, self._settings)
        self._exchange.settle(attempt, settlement)

    def _leave(self, attempt: Attempt) -> None:
        attempt.under_way = False
        attempt.task = None
        self.running -= 1

    async def _within(self, limit: Any, attempt: Attempt, job: Job) -> Any:
        if not isinstance(limit, (int, float)) or limit <= 0:
            return await self._call(attempt, job)
        timer = asyncio.timeout(limit / 1000)
        try:
            async with timer:
                return await self._call(attempt, job)
        except TimeoutError:
            if timer.expired():
                raise JobTimeout(f"Job {job.id} timed out ({limit} ms)") from None
            raise

    def _call(self, attempt: Attempt, job: Job) -> Awaitable[Any]:
        if attempt.call is not None:
            return asyncio.wrap_future(attempt.call)
        running: Awaitable[Any] = self._handler(job)
        return running

    def _decide(self, attempt: Attempt, job: Job) -> Settlement:
        """The settlement for the attempt's outcome; a result that JSON cannot carry becomes the attempt's error."""
        job.id = attempt.id  # the handler may have changed it
        if attempt.error is None:
            try:
                return succeed(job, attempt.result, self._settings)
            except Exception as unserialisable:
                attempt.error = unserialisable
        try:
            delay = retry_delay(job, self._host.queue.backoff_strategies)
        except BaseException as raised:
            name = type(raised).__name__
            self._host.report(raised if isinstance(raised, Exception) else BeeQueueError(f"a backoff strategy raised {name}"))
            delay = None
        try:
            return fail(job, attempt.error, delay, now_ms(), self._settings)
        except Exception:
            # the handler put something into the job that JSON cannot carry
            return self._fail_as_stored(attempt, job, attempt.error)

    def _fail_as_stored(self, attempt: Attempt, job: Job, error: BaseException) -> Settlement:
        """The settlement of a job that fails for good, with the data it was stored with."""
        as_stored = Job.decode(self._host.queue, attempt.id, attempt.entry)
        job.data, job.options, job.progress = as_stored.data, as_stored.options, as_stored.progress
        return fail_for_good(job, attempt.entry, error, self._settings)

    def _shorten(self, attempt: Attempt, refusal: BeeQueueError) -> bool:
        """Has a job fail for good whose settlement Redis never accepts; False when it was shortened already."""
        if attempt.is_shortened or attempt.job is None:
            return False
        attempt.is_shortened = True
        what = f"Redis does not accept the outcome of job {attempt.id}, probably for its size"
        attempt.error = OutcomeNotRecorded(f"{what}: {refusal}")
        attempt.settlement = self._fail_as_stored(attempt, attempt.job, attempt.error)
        return True

    def _ended(self, attempt: Attempt, outcome: bool | BeeQueueError) -> None:
        """Reports how an attempt has ended: Redis settled it (True), it came too late (False), or Redis could not settle it."""
        if outcome is True:
            self._announce(attempt)
        elif outcome is not False:
            assert attempt.settlement is not None
            failure = _not_recorded(attempt.settlement.status, attempt.id)
            failure.__cause__ = outcome
            self._host.report(failure)
        elif attempt.finish is not None and attempt.finish.repeated:
            # the first settlement may have been done, and its reply lost
            if attempt.job is not None:
                attempt.job.uncertain = True
            self._announce(attempt)
        else:
            self.late_finishes += 1
            self._host.report(LateFinish(f"job {attempt.id} had been settled, removed or handed on before its handler ended"))

    def _announce(self, attempt: Attempt) -> None:
        job, error = attempt.job, attempt.error
        emit = self._host.emit
        if job is None:  # it was unreadable
            return
        if error is None:
            emit("succeeded", job, attempt.result)
        elif job.status == "retrying":
            emit("retrying", job, error)
            emit("failed", job, error)
        else:
            emit("failed", job, error)
            emit("failed:fatal", job, error)

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def drain(self, client_id: Callable[[], int | None], timeout_s: float) -> bool:
        """Stops taking, lets handlers end, and hands back the jobs that are left; False when the time-out came first.

        The order:
        1. No new take begins, and settlements take no more jobs.
        2. The open take is ended and waited for: cutting its connection would lose a job that is just arriving.
        3. Handlers have until the time-out. Then `async` ones are cancelled; a thread cannot be, so its job stays in `active`.
        4. Settlements under way are waited for.
        5. All jobs that are still held go back to `waiting`.
        """
        self._exchange.close()
        deadline = self._loop.time() + timeout_s
        in_time = await self._exchange.end_takes(client_id, deadline, GRACE_S) or self._exchange.cut_off
        in_time = await self._exchange.until(lambda: not self._under_way(), deadline) and in_time
        if not in_time:
            handlers = self._handlers()
            self.abandoned = len(handlers)
            for attempt in handlers:
                self._abandon(attempt)
            left = self._under_way if self._exchange.answers else self._handlers
            await self._exchange.until(lambda: not left(), self._loop.time() + GRACE_S)
        if self._exchange.answers:
            await self._exchange.hand_back(GRACE_S)
        await self._heartbeat.stop(GRACE_S)
        if self._threads is not None:
            self._threads.end()
        return in_time

    def _under_way(self) -> list[Attempt]:
        """The attempts whose handler is about to run or runs, or whose settlement has not been answered."""
        return [attempt for attempt in self._exchange.held if attempt.under_way]

    def _handlers(self) -> list[Attempt]:
        """The attempts whose handler is about to run or runs."""
        return [attempt for attempt in self._under_way() if attempt.settlement is None]

    def _abandon(self, attempt: Attempt) -> None:
        """Cancels the handler of an attempt. A thread cannot be cancelled, so its end is reported."""
        attempt.abandoned = True
        if attempt.task is None:  # it has not been called yet
            self._leave(attempt)
            return
        if attempt.call is not None and not attempt.call.cancel():
            attempt.call.add_done_callback(functools.partial(self._ended_too_late, attempt.id))
        attempt.task.cancel()

    def _ended_too_late(self, job_id: str, call: Future[Any]) -> None:
        """Reports a handler that has outlived its worker. Called in the handler's thread."""
        failure = _not_recorded("succeeded" if call.exception() is None else "failed", job_id)
        failure.__cause__ = QueueClosed()
        try:
            self._loop.call_soon_threadsafe(self._host.report, failure)
        except RuntimeError:  # the loop is closed too
            log.error("%s", failure)


def _not_recorded(status: str, job_id: str) -> OutcomeNotRecorded:
    return OutcomeNotRecorded(f"unable to update the status of {status} job {job_id}")
