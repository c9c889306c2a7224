"""A worker: takes jobs, runs the handler, settles each job and takes the next in the same step.

Shape of the hot path, because speed is decided here and in `intake`:
- replies are handled by callbacks, in the step that parses them; the only tasks are the handlers';
- finishing a job brings the next one in the same reply, so a busy slot needs one round trip a job;
- one heartbeat for all running jobs; a timer for a job only when it has a time-out.

A run is in `_held` from the moment its id is known until Redis has answered its settlement.
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
from beequeue.store.store import Settlement, Store, Taken
from beequeue.tasks import supervised
from beequeue.wire.link import Link
from beequeue.worker.attempt import Attempt, Handler, is_async
from beequeue.worker.exchange import Exchange
from beequeue.worker.heartbeat import Heartbeat
from beequeue.worker.outcome import fail, fail_as_stored, retry_delay, succeed
from beequeue.worker.reused_ids import reused_ids
from beequeue.worker.threads import Threads

log = logging.getLogger("beequeue")

GRACE_S = 1.0
"""How long a close past its time-out waits for what it has cancelled, and for Redis."""


class Consumer:
    """Runs `handler` on the jobs of a queue, at most `concurrency` at once."""

    def __init__(self, store: Store, host: Host, handler: Handler, concurrency: int) -> None:
        self.running = 0
        self.late_finishes = 0
        self.abandoned = 0
        """How many handlers had not ended when `drain` ran out of time."""
        self._store = store
        self._host = host
        self._settings = host.settings
        self._handler = handler
        self._held: dict[Attempt, None] = {}
        self._beating: asyncio.Task[None] | None = None
        self._heartbeat = Heartbeat(store, host.name, handler, self._reported, host.settings.stall_interval, host.report)
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange[Attempt] = Exchange(
            store, host, concurrency, self._hold, self._begin, self._ended, self._changed
        )
        self._threads = None if is_async(handler) else Threads(host.name, handler, concurrency, self._exchange.release)

    def start(self) -> None:
        """Begins to take jobs."""
        self._beating = supervised(self._beat, "heartbeat", self._host.report)
        self._heartbeat.start()
        self._exchange.pump_soon()

    def owns_current_task(self) -> bool:
        """Whether the caller is one of this worker's handlers."""
        task = asyncio.current_task()
        return any(attempt.task is task for attempt in self._held)

    # --- a run -----------------------------------------------------------------------------------------------------------

    def _hold(self, taken: list[Taken]) -> list[Attempt]:
        """Occupies a slot with each job. From now on it is reported, also while a listener or a handler blocks the loop."""
        attempts = [Attempt(job_id, entry) for job_id, entry in taken]
        self._held.update(dict.fromkeys(attempts))
        return attempts

    def _begin(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            if self._exchange.closing:
                continue  # to be handed back
            attempt.under_way = True
            try:
                attempt.job = Job.decode(self._host.queue, attempt.id, attempt.entry)
            except UnreadableData as unreadable:
                self._host.report(unreadable)
                self._settle(attempt, Settlement("failed", attempt.entry, b""))
                continue
            self.running += 1
            self._start(attempt, attempt.job)

    def _start(self, attempt: Attempt, job: Job) -> None:
        """Gives the handler a task of its own, which begins at once where Python can do that, else in the loop's next turn."""
        running = self._run(attempt, job)
        if sys.version_info >= (3, 12) and self._loop.get_task_factory() is None:
            asyncio.Task(running, loop=self._loop, name="beequeue job", eager_start=True)
        else:
            self._loop.create_task(running, name="beequeue job")

    async def _run(self, attempt: Attempt, job: Job) -> None:
        """Runs the handler, and settles the job by its outcome. Whatever the handler raises is the job's failure."""
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
            if attempt.abandoned or self._all_is_cancelled():  # its job goes back, whatever this was; or the stall check has it
                self._leave(attempt)
                self._changed.set()
                return
            attempt.error = raised
            if (
                self._threads is not None
                and attempt.call is not None
                and not attempt.call.done()
                and self._threads.hangs(attempt.call)
            ):
                attempt.slots = 0
        attempt.task = None
        self.running -= 1
        try:
            self._settle(attempt, self._decide(attempt, job))
        except Exception as fault:  # ours; without a heartbeat the stall check brings the job back
            del self._held[attempt]
            self._exchange.release(attempt.slots)
            self._host.report(fault)

    def _all_is_cancelled(self) -> bool:
        """Whether somebody ends the whole program, as `asyncio.run` does with what an interrupted one has left."""
        return self._beating is not None and self._beating.cancelling() > 0

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
        outcome: Awaitable[Any] = self._handler(job)
        return outcome

    def _decide(self, attempt: Attempt, job: Job) -> Settlement:
        """The settlement for the run's outcome; a result that JSON cannot carry becomes the run's error."""
        job.id = attempt.id  # whatever the handler made of it
        if attempt.error is None:
            try:
                return succeed(job, attempt.result, self._settings)
            except TypeError as unserialisable:
                attempt.error = unserialisable
        try:
            delay = retry_delay(job, job.queue.backoff_strategies)
        except BaseException as raised:
            name = type(raised).__name__
            self._host.report(raised if isinstance(raised, Exception) else BeeQueueError(f"a backoff strategy raised {name}"))
            delay = None
        try:
            return fail(job, attempt.error, delay, now_ms(), self._settings)
        except Exception:
            # the handler left something in the job that JSON cannot carry, or spoilt it: it fails for good, as it was stored
            as_stored = Job.decode(self._host.queue, attempt.id, attempt.entry)
            job.data, job.options, job.progress = as_stored.data, as_stored.options, as_stored.progress
        try:
            return fail(job, attempt.error, None, now_ms(), self._settings)
        except TypeError:  # nested so deep that it could be read, but not be written
            return fail_as_stored(attempt.id, attempt.entry, attempt.error, self._settings)

    def _settle(self, attempt: Attempt, settlement: Settlement) -> None:
        attempt.settlement = settlement
        if attempt.reused:
            self._ended(attempt, False)
            self._exchange.release(attempt.slots)
            self._changed.set()
        else:
            self._exchange.settle(attempt)

    def _ended(self, attempt: Attempt, outcome: bool | BeeQueueError) -> None:
        """The end of a run: whether Redis has settled its job, or what it said instead."""
        del self._held[attempt]
        if outcome is True:
            self._announce(attempt)
        elif outcome is not False:
            assert attempt.settlement is not None
            status = attempt.settlement.status
            failure = OutcomeNotRecorded(f"unable to update the status of {status} job {attempt.id}")
            failure.__cause__ = outcome
            self._host.report(failure)
        elif attempt.finish is not None and attempt.finish.repeated:
            # the reply that was lost may have been this settlement's own
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

    async def _beat(self) -> None:
        """Reports all running jobs, twice in each stall interval."""
        half_s = self._settings.stall_interval / 2000
        due_at = self._loop.time()
        while True:
            # by the clock: how long Redis takes to answer must not stretch the interval
            due_at = max(due_at + half_s, self._loop.time())
            await asyncio.sleep(due_at - self._loop.time())
            reports = self._heartbeat.beat()
            self._heartbeat.sign()
            answers = await asyncio.gather(*reports, return_exceptions=True)
            refused = next((answer for answer in answers if isinstance(answer, BaseException)), None)
            if isinstance(refused, BeeQueueError):
                self._host.report(refused)
            elif refused is not None:
                raise refused

    def _own(self) -> list[Attempt]:
        """The runs whose job is here; also for the heart's thread."""
        return [attempt for attempt in list(self._held) if not attempt.reused]

    def _reported(self) -> list[Attempt]:
        """These, and a run for each job whose data is on its way, which may take longer than a stall interval."""
        return [*self._own(), *(Attempt(job_id, b"") for job_id in self._exchange.arriving())]

    async def disown_reused(self, link: Link) -> None:
        """Before anything else is sent on a new `link`: a run whose id has become another job's is not settled any more."""
        held = list(self._held)
        found = {*await reused_ids(self._store, link, held)}
        for attempt in found:
            attempt.reused = True
        for attempt in self._exchange.withdraw(found, held):
            self._ended(attempt, False)
            self._exchange.release(attempt.slots)

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def drain(self, client_id: int | None, timeout_s: float) -> bool:
        """Stops taking, lets handlers end, hands back what is left; False when handlers had to be cancelled.

        In this order: no new take and no take with a finish; the open take is ended, and waited for, since cutting it would
        lose the job that is just arriving; handlers have until the time-out, then `async` ones are cancelled (a thread
        cannot be: its job stays in `active`); finishes under way are waited for; all that is still held goes back.
        """
        self._exchange.close()
        deadline = self._loop.time() + timeout_s
        answers = await self._exchange.end(client_id, deadline, GRACE_S, self._until)
        in_time = await self._until(lambda: not self._under_way(), deadline) and (answers or self._exchange.cut_off)
        if not in_time:
            handlers = self._handlers()
            self.abandoned = len(handlers)
            for attempt in handlers:
                self._abandon(attempt)
            left = self._under_way if answers else self._handlers
            await self._until(lambda: not left(), self._loop.time() + GRACE_S)
        if answers:
            await self._hand_back()
        await self._heartbeat.stop(GRACE_S)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait((self._beating,))
        if self._threads is not None:
            self._threads.end()
        return in_time

    def _abandon(self, attempt: Attempt) -> None:
        """Cancels a run's handler; a thread cannot be, so what it comes to is reported."""
        attempt.abandoned = True
        if attempt.task is None:  # it has not been called yet
            self._leave(attempt)
            return
        if attempt.call is not None and not attempt.call.cancel():
            attempt.call.add_done_callback(functools.partial(self._ended_too_late, attempt.id))
        attempt.task.cancel()

    def _ended_too_late(self, job_id: str, call: Future[Any]) -> None:
        """In the thread of a handler that has outlived its worker."""
        failure = OutcomeNotRecorded(
            f"unable to update the status of {'succeeded' if call.exception() is None else 'failed'} job {job_id}"
        )
        failure.__cause__ = QueueClosed()
        try:
            self._loop.call_soon_threadsafe(self._host.report, failure)
        except RuntimeError:  # the loop is closed too
            log.error("%s", failure)

    def _under_way(self) -> list[Attempt]:
        """The runs whose handler is to run or runs, or whose settlement has not been answered."""
        return [attempt for attempt in self._held if attempt.under_way]

    def _handlers(self) -> list[Attempt]:
        """The runs whose handler is to run or runs."""
        return [attempt for attempt in self._held if attempt.under_way and attempt.settlement is None]

    async def _until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Waits until `condition` holds, looking whenever something changed; False when the deadline came first."""
        try:
            async with asyncio.timeout_at(deadline):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    async def _hand_back(self) -> None:
        """Returns what is held and neither being settled nor in a thread that goes on."""
        can_go = (
            attempt
            for attempt in reversed(self._own())
            if not attempt.under_way and (attempt.call is None or attempt.call.cancelled())
        )
        held = [attempt.id for attempt in can_go]
        if not held:
            return
        try:
            async with asyncio.timeout(GRACE_S):
                await self._store.hand_back(held)
        except (BeeQueueError, TimeoutError) as error:
            why = str(error) or "Redis does not answer"
            self._host.report(OutcomeNotRecorded(f"jobs {', '.join(held)} are left to the stall check: {why}"))
