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
from beequeue.worker.attempt import Handler, Run, is_async
from beequeue.worker.exchange import Intake
from beequeue.worker.heartbeat import Heart
from beequeue.worker.outcome import fail, fail_as_stored, retry_delay, succeed
from beequeue.worker.strangers import strangers
from beequeue.worker.threads import Threads

log = logging.getLogger("beequeue")

GRACE_S = 1.0
"""How long a close past its time-out waits for what it has cancelled, and for Redis."""


class Consumer:
    """Runs `handler` on the jobs of a queue, at most `concurrency` at once."""

    def __init__(self, store: Store, host: Host, handler: Handler, concurrency: int) -> None:
        self.running = 0
        self.late_finishes = 0
        self._store = store
        self._host = host
        self._settings = host.settings
        self._handler = handler
        self._held: dict[Run, None] = {}
        self._beating: asyncio.Task[None] | None = None
        self._heart = Heart(store, host.name, handler, self._reported, host.settings.stall_interval, host._report)
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._intake: Intake[Run] = Intake(store, host, concurrency, self._hold, self._begin, self._ended, self._changed)
        self._threads = None if is_async(handler) else Threads(host.name, handler, concurrency, self._intake.release)

    def start(self) -> None:
        """Begins to take jobs."""
        self._beating = supervised(self._beat, "heartbeat", self._host._report)
        self._heart.start()
        self._intake.pump_soon()

    def owns_current_task(self) -> bool:
        """Whether the caller is one of this worker's handlers."""
        task = asyncio.current_task()
        return any(run.task is task for run in self._held)

    # --- a run -----------------------------------------------------------------------------------------------------------

    def _hold(self, taken: list[Taken]) -> list[Run]:
        """Occupies a slot with each job. From now on it is reported, also while a listener or a handler blocks the loop."""
        runs = [Run(job_id, entry) for job_id, entry in taken]
        self._held.update(dict.fromkeys(runs))
        return runs

    def _begin(self, runs: list[Run]) -> None:
        for run in runs:
            if self._intake.closing:
                continue  # to be handed back
            run.under_way = True
            try:
                run.job = Job.decode(self._host, run.id, run.entry)
            except UnreadableData as unreadable:
                self._host._report(unreadable)
                self._settle(run, Settlement("failed", run.entry, b""))
                continue
            self.running += 1
            self._start(run, run.job)

    def _start(self, run: Run, job: Job) -> None:
        """Gives the handler a task of its own, which begins at once where Python can do that, else in the loop's next turn."""
        attempt = self._attempt(run, job)
        if sys.version_info >= (3, 12) and self._loop.get_task_factory() is None:
            asyncio.Task(attempt, loop=self._loop, name="beequeue job", eager_start=True)
        else:
            self._loop.create_task(attempt, name="beequeue job")

    async def _attempt(self, run: Run, job: Job) -> None:
        """Runs the handler, and settles the job by its outcome. Whatever the handler raises is the job's failure."""
        if run.abandoned:  # before it began
            return
        run.task = asyncio.current_task()
        try:
            if self._threads is not None:
                run.call = call = self._threads.call(job)
                if call.late:
                    await self._threads.wait_for_thread(call)
            limit = job.options.get("timeout")
            if limit:
                run.result = await self._within(limit, run, job)
            else:
                run.result = await self._call(run, job)
        except BaseException as raised:
            if run.abandoned or self._all_is_cancelled():  # its job goes back, whatever this was; or the stall check has it
                self._leave(run)
                self._changed.set()
                return
            run.error = raised
            if self._threads is not None and run.call is not None and not run.call.done() and self._threads.hangs(run.call):
                run.slots = 0
        run.task = None
        self.running -= 1
        try:
            self._settle(run, self._decide(run, job))
        except Exception as fault:  # ours; without a heartbeat the stall check brings the job back
            del self._held[run]
            self._intake.release(run.slots)
            self._host._report(fault)

    def _all_is_cancelled(self) -> bool:
        """Whether somebody ends the whole program, as `asyncio.run` does with what an interrupted one has left."""
        return self._beating is not None and self._beating.cancelling() > 0

    def _leave(self, run: Run) -> None:
        run.under_way = False
        run.task = None
        self.running -= 1

    async def _within(self, limit: Any, run: Run, job: Job) -> Any:
        if not isinstance(limit, (int, float)) or limit <= 0:
            return await self._call(run, job)
        timer = asyncio.timeout(limit / 1000)
        try:
            async with timer:
                return await self._call(run, job)
        except TimeoutError:
            if timer.expired():
                raise JobTimeout(f"Job {job.id} timed out ({limit} ms)") from None
            raise

    def _call(self, run: Run, job: Job) -> Awaitable[Any]:
        if run.call is not None:
            return asyncio.wrap_future(run.call)
        outcome: Awaitable[Any] = self._handler(job)
        return outcome

    def _decide(self, run: Run, job: Job) -> Settlement:
        """The settlement for the run's outcome; a result that JSON cannot carry becomes the run's error."""
        job.id = run.id  # whatever the handler made of it
        if run.error is None:
            try:
                return succeed(job, run.result, self._settings)
            except TypeError as unserialisable:
                run.error = unserialisable
        try:
            delay = retry_delay(job, self._host.backoff_strategies)
        except BaseException as raised:
            name = type(raised).__name__
            self._host._report(raised if isinstance(raised, Exception) else BeeQueueError(f"a backoff strategy raised {name}"))
            delay = None
        try:
            return fail(job, run.error, delay, now_ms(), self._settings)
        except Exception:
            # the handler left something in the job that JSON cannot carry, or spoilt it: it fails for good, as it was stored
            as_stored = Job.decode(self._host, run.id, run.entry)
            job.data, job.options, job.progress = as_stored.data, as_stored.options, as_stored.progress
        try:
            return fail(job, run.error, None, now_ms(), self._settings)
        except TypeError:  # nested so deep that it could be read, but not be written
            return fail_as_stored(run.id, run.entry, run.error, self._settings)

    def _settle(self, run: Run, settlement: Settlement) -> None:
        run.settlement = settlement
        if run.stranger:
            self._ended(run, False)
            self._intake.release(run.slots)
            self._changed.set()
        else:
            self._intake.settle(run)

    def _ended(self, run: Run, outcome: bool | BeeQueueError) -> None:
        """The end of a run: whether Redis has settled its job, or what it said instead."""
        del self._held[run]
        if outcome is True:
            self._announce(run)
        elif outcome is not False:
            assert run.settlement is not None
            failure = OutcomeNotRecorded(f"unable to update the status of {run.settlement.status} job {run.id}")
            failure.__cause__ = outcome
            self._host._report(failure)
        elif run.finish is not None and run.finish.repeated:
            # the reply that was lost may have been this settlement's own
            if run.job is not None:
                run.job.uncertain = True
            self._announce(run)
        else:
            self.late_finishes += 1
            self._host._report(LateFinish(f"job {run.id} had been settled, removed or handed on before its handler ended"))

    def _announce(self, run: Run) -> None:
        job, error = run.job, run.error
        emit = self._host.emit
        if job is None:  # it was unreadable
            return
        if error is None:
            emit("succeeded", job, run.result)
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
            reports = self._heart.beat()
            self._heart.sign()
            answers = await asyncio.gather(*reports, return_exceptions=True)
            refused = next((answer for answer in answers if isinstance(answer, BaseException)), None)
            if isinstance(refused, BeeQueueError):
                self._host._report(refused)
            elif refused is not None:
                raise refused

    def _own(self) -> list[Run]:
        """The runs whose job is here; also for the heart's thread."""
        return [run for run in list(self._held) if not run.stranger]

    def _reported(self) -> list[Run]:
        """These, and a run for each job whose data is on its way, which may take longer than a stall interval."""
        return [*self._own(), *(Run(job_id, b"") for job_id in self._intake.arriving())]

    async def disown_strangers(self, link: Link) -> None:
        """Before anything else is sent on a new `link`: a run whose id has become another job's is not settled any more."""
        held = list(self._held)
        found = {*await strangers(self._store, link, held)}
        for run in found:
            run.stranger = True
        for run in self._intake.withdraw(found, held):
            self._ended(run, False)
            self._intake.release(run.slots)

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def drain(self, client_id: int | None, timeout_s: float) -> bool:
        """Stops taking, lets handlers end, hands back what is left; False when handlers had to be cancelled.

        In this order: no new take and no take with a finish; the open take is ended, and waited for, since cutting it would
        lose the job that is just arriving; handlers have until the time-out, then `async` ones are cancelled (a thread
        cannot be: its job stays in `active`); finishes under way are waited for; all that is still held goes back.
        """
        self._intake.close()
        deadline = self._loop.time() + timeout_s
        answers = await self._intake.end(client_id, deadline, GRACE_S, self._until)
        in_time = await self._until(lambda: not self._under_way(), deadline) and (answers or self._intake.cut_off)
        if not in_time:
            for run in self._handlers():
                self._abandon(run)
            left = self._under_way if answers else self._handlers
            await self._until(lambda: not left(), self._loop.time() + GRACE_S)
        if answers:
            await self._hand_back()
        await self._heart.stop(GRACE_S)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait((self._beating,))
        if self._threads is not None:
            self._threads.end()
        return in_time

    def _abandon(self, run: Run) -> None:
        """Cancels a run's handler; a thread cannot be, so what it comes to is reported."""
        run.abandoned = True
        if run.task is None:  # it has not been called yet
            self._leave(run)
            return
        if run.call is not None and not run.call.cancel():
            run.call.add_done_callback(functools.partial(self._ended_too_late, run.id))
        run.task.cancel()

    def _ended_too_late(self, job_id: str, call: Future[Any]) -> None:
        """In the thread of a handler that has outlived its worker."""
        failure = OutcomeNotRecorded(
            f"unable to update the status of {'succeeded' if call.exception() is None else 'failed'} job {job_id}"
        )
        failure.__cause__ = QueueClosed()
        try:
            self._loop.call_soon_threadsafe(self._host._report, failure)
        except RuntimeError:  # the loop is closed too
            log.error("%s", failure)

    def _under_way(self) -> list[Run]:
        """The runs whose handler is to run or runs, or whose settlement has not been answered."""
        return [run for run in self._held if run.under_way]

    def _handlers(self) -> list[Run]:
        """The runs whose handler is to run or runs."""
        return [run for run in self._held if run.under_way and run.settlement is None]

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
        can_go = (run for run in reversed(self._own()) if not run.under_way and (run.call is None or run.call.cancelled()))
        held = [run.id for run in can_go]
        if not held:
            return
        try:
            async with asyncio.timeout(GRACE_S):
                await self._store.hand_back(held)
        except (BeeQueueError, TimeoutError) as error:
            why = str(error) or "Redis does not answer"
            self._host._report(OutcomeNotRecorded(f"jobs {', '.join(held)} are left to the stall check: {why}"))
