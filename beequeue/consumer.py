"""A worker: takes jobs, runs the handler, settles each job and takes the next in the same step.

Shape of the hot path, because speed is decided here:
- a slot is one long-lived task that awaits the handler itself; `concurrency` slots, no task for each job;
- while a slot is free there is exactly one blocking take; its answers are handled in callbacks, not by a task;
- finishing a job brings the next one in the same reply, so a busy slot needs one round trip a job;
- one heartbeat for all running jobs; a timer for a job only when it has a time-out.

What a run holds is in `_held` from the moment its id is known until Redis has answered its settlement.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from beequeue.errors import BeeQueueError, CommandError, JobTimeout, LateFinish, OutcomeNotRecorded, UnreadableData
from beequeue.events import encode_event
from beequeue.job import Job, Strategy, now_ms
from beequeue.link import Command
from beequeue.settings import QueueSettings
from beequeue.store import Settlement, Store, Taken

Handler = Callable[[Job], Any]
"""An `async def` or a plain function, which runs in a thread; what it returns is the job's result."""

UNBLOCK_EVERY_S = 0.05
GRACE_S = 1.0
"""How long a close past its time-out waits for what it has cancelled, and for Redis."""
LONGEST_REFUSAL_DELAY_MS = 15_000


class Host(Protocol):
    """What a worker asks of its queue."""

    settings: QueueSettings
    backoff_strategies: dict[str, Strategy]

    def decode_job(self, job_id: str, entry: bytes) -> Job: ...
    def emit(self, event: str, *args: Any) -> bool: ...
    def report(self, error: Exception) -> None: ...


# --- decisions: plain functions over values -----------------------------------------------------------------------


def retry_delay(job: Job, strategies: Mapping[str, Strategy]) -> int | None:
    """ms before the failed `job` runs again (0: at once), or None when it has failed for good.

    Calls the job's strategy, which may change the job's backoff; raises what the strategy raises.
    """
    retries = job.options.get("retries", 0)
    if not isinstance(retries, (int, float)) or retries <= 0:
        return None
    backoff = job.options.get("backoff")
    name = backoff.get("strategy") if isinstance(backoff, dict) else "immediate"
    strategy = strategies.get(str(name))
    if strategy is None:
        return None
    delay = strategy(job)
    if not isinstance(delay, (int, float)) or math.isnan(delay) or delay < 0:
        return None
    return math.ceil(delay)


def stack_trace(error: BaseException) -> str:
    """The traceback as text, without the frames of this module."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def succeed(job: Job, result: Any, settings: QueueSettings) -> Settlement:
    """The settlement of a job whose handler returned `result`; raises `TypeError` when JSON cannot carry it."""
    assert job.id is not None
    message = encode_event(job.id, "succeeded", result) if settings.send_events else b""
    job.status = "succeeded"
    return Settlement("succeeded", b"" if settings.remove_on_success else job.encode(), message)


def fail(job: Job, error: BaseException, delay: int | None, now: int, settings: QueueSettings) -> Settlement:
    """The settlement of a job whose handler raised `error`: tried again after `delay` ms, or failed when that is None."""
    assert job.id is not None
    status = "failed" if delay is None else "retrying"
    job.status = status
    job.options["stacktraces"].insert(0, stack_trace(error))
    if delay is not None:
        job.options["retries"] -= 1
    message = encode_event(job.id, status, str(error) or type(error).__name__) if settings.send_events else b""
    entry = b"" if delay is None and settings.remove_on_failure else job.encode()
    return Settlement(status, entry, message, now + delay if delay else None)


# --- the worker ------------------------------------------------------------------------------------------------------


class Run:
    """One job in this worker's hands. Keyed by itself, not by id: one worker can hold an id twice."""

    __slots__ = ("finish", "id", "in_thread")

    def __init__(self, job_id: str) -> None:
        self.id = job_id
        self.in_thread = False
        self.finish: Command | None = None


class Consumer:
    """Runs `handler` on the jobs of a queue, at most `concurrency` at once."""

    def __init__(self, store: Store, host: Host, handler: Handler, concurrency: int) -> None:
        self.running = 0
        self.late_finishes = 0
        self._store = store
        self._host = host
        self._settings = host.settings
        self._concurrency = concurrency
        self._threads: ThreadPoolExecutor | None = None
        self._in_thread = not _is_async(handler)
        self._call = functools.partial(self._call_in_thread, handler) if self._in_thread else handler
        self._held: dict[Run, None] = {}
        self._free: deque[asyncio.Future[Taken | None]] = deque()
        self._slots: set[asyncio.Task[None]] = set()
        self._heart: asyncio.Task[None] | None = None
        self._take: Command | None = None
        self._reading = 0
        self._refused_in_a_row = 0
        self._refusal_timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._intake_ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begins to take jobs."""
        for number in range(self._concurrency):
            slot = asyncio.create_task(self._work(), name=f"beequeue slot {number}")
            slot.add_done_callback(self._slot_ended)
            self._slots.add(slot)
        self._heart = asyncio.create_task(self._beat(), name="beequeue heartbeat")

    def owns_current_task(self) -> bool:
        """Whether the caller is one of this worker's handlers."""
        return asyncio.current_task() in self._slots

    # --- intake: callbacks, in the step that parses the reply -----------------------------------------------------------

    def _pump(self) -> None:
        """Keeps one blocking take open while a slot is free."""
        if self._free and self._take is None and not self._reading and self._refusal_timer is None and not self._closing:
            self._take = self._store.take_blocking(self._taken)

    def _taken(self, reply: Any) -> None:
        self._take = None
        if isinstance(reply, BeeQueueError):
            self._take_refused(reply)
        elif reply is not None:
            self._refused_in_a_row = 0
            if self._closing:
                self._held[Run(reply.decode("utf-8", "surrogateescape"))] = None
            else:
                self._read(reply, len(self._free) - 1)
        self._pump()
        self._check_intake()

    def _read(self, job_id: bytes, more: int) -> None:
        """Asks for the data of a job that was taken, and for more jobs to fill the free slots."""
        self._reading += 1
        self._store.take(job_id, more, self._was_read)

    def _was_read(self, reply: Any) -> None:
        self._reading -= 1
        if isinstance(reply, BeeQueueError):
            self._host.report(reply)
        else:
            for taken in self._store.taken_from(reply):
                if self._closing or not self._free:
                    self._held[Run(taken.id)] = None
                else:
                    self._free.popleft().set_result(taken)
        self._pump()
        self._check_intake()

    def _take_refused(self, error: BeeQueueError) -> None:
        """Waits before the next take; a full Redis refuses blocking takes, but still lets jobs be moved by a script."""
        if self._closing:
            return
        if isinstance(error, CommandError) and error.code == "UNBLOCKED":
            return
        self._host.report(error)
        self._refused_in_a_row += 1
        first = self._settings.initial_redis_failure_retry_delay
        delay = min(first * 2 ** (self._refused_in_a_row - 1), LONGEST_REFUSAL_DELAY_MS)
        full = isinstance(error, CommandError) and error.code == "OOM"
        self._refusal_timer = self._loop.call_later(delay / 1000, self._after_refusal, full)

    def _after_refusal(self, full: bool) -> None:
        self._refusal_timer = None
        if full and self._free and not self._closing:
            self._read(b"", len(self._free))
        else:
            self._pump()

    def _check_intake(self) -> None:
        if self._closing and self._take is None and not self._reading:
            self._intake_ended.set()

    # --- slots -----------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closing:
            free: asyncio.Future[Taken | None] = self._loop.create_future()
            self._free.append(free)
            self._pump()
            taken = await free
            while taken is not None:
                run = Run(taken.id)
                self._held[run] = None
                if self._closing:
                    return
                try:
                    taken = await self._process(run, taken)
                except Exception:  # a fault of ours: without a heartbeat the stall check brings the job back
                    self._held.pop(run, None)
                    raise

    async def _process(self, run: Run, taken: Taken) -> Taken | None:
        """Runs the handler on a job and settles it; returns the next job, if Redis had one waiting."""
        error: BaseException | None = None
        result: Any = None
        job: Job | None = None
        try:
            job = self._host.decode_job(taken.id, taken.entry)
        except UnreadableData as unreadable:
            self._host.report(unreadable)
            settlement = Settlement("failed", taken.entry, b"")
        else:
            self.running += 1
            try:
                result = await self._attempt(run, job)
            except BaseException as raised:
                if _is_being_cancelled():
                    raise
                error = raised
            finally:
                self.running -= 1
            settlement, error = self._decide(job, taken.entry, result, error)
        reply = await self._finish(run, settlement)
        if isinstance(reply, BeeQueueError):
            failure = OutcomeNotRecorded(f"unable to update the status of {settlement.status} job {run.id}")
            failure.__cause__ = reply
            self._host.report(failure)
            return None
        settled, following = self._store.finished_from(reply)
        if not settled and run.finish is not None and run.finish.repeated and job is not None:
            # the reply that was lost may have been this settlement's own
            job.uncertain = True
            self._announce(job, result, error)
        elif not settled:
            self.late_finishes += 1
            self._host.report(LateFinish(f"job {run.id} had been settled, removed or handed on before its handler ended"))
        elif job is not None:
            self._announce(job, result, error)
        return following

    async def _attempt(self, run: Run, job: Job) -> Any:
        run.in_thread = self._in_thread
        limit = job.options.get("timeout")
        if not isinstance(limit, (int, float)) or limit <= 0:
            return await self._call(job)
        timer = asyncio.timeout(limit / 1000)
        try:
            async with timer:
                return await self._call(job)
        except TimeoutError:
            if timer.expired():
                raise JobTimeout(f"Job {job.id} timed out ({limit} ms)") from None
            raise

    def _call_in_thread(self, handler: Handler, job: Job) -> Awaitable[Any]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="beequeue handler")
        return self._loop.run_in_executor(self._threads, handler, job)

    def _decide(
        self, job: Job, stored: bytes, result: Any, error: BaseException | None
    ) -> tuple[Settlement, BaseException | None]:
        """The settlement, and the error that it is for: the handler's, or that of a result which JSON cannot carry."""
        if error is None:
            try:
                return succeed(job, result, self._settings), None
            except (TypeError, RecursionError) as unserialisable:
                error = unserialisable
        try:
            delay = retry_delay(job, self._host.backoff_strategies)
        except Exception as raised:
            self._host.report(raised)
            delay = None
        try:
            return fail(job, error, delay, now_ms(), self._settings), error
        except (TypeError, RecursionError):
            # the handler left something in the job that JSON cannot carry: settle it as it was stored
            as_stored = self._host.decode_job(job.id or "", stored)
            job.data, job.options, job.progress = as_stored.data, as_stored.options, as_stored.progress
            return fail(job, error, None, now_ms(), self._settings), error

    def _finish(self, run: Run, settlement: Settlement) -> asyncio.Future[Any]:
        """Sends the settlement; the future gets the reply, or the error that came instead, as its result."""
        answered: asyncio.Future[Any] = self._loop.create_future()

        def on_reply(reply: Any) -> None:
            self._held.pop(run, None)
            if answered.cancelled():  # the slot was given up; what the reply took must not be forgotten
                if not isinstance(reply, BeeQueueError) and (following := self._store.finished_from(reply)[1]):
                    self._held[Run(following.id)] = None
            else:
                answered.set_result(reply)

        run.finish = self._store.finish(run.id, settlement, take_next=not self._closing, on_reply=on_reply)
        return answered

    def _announce(self, job: Job, result: Any, error: BaseException | None) -> None:
        emit = self._host.emit
        if job.status == "succeeded":
            emit("succeeded", job, result)
        elif job.status == "retrying":
            emit("retrying", job, error)
            emit("failed", job, error)
        else:
            emit("failed", job, error)
            emit("failed:fatal", job, error)

    def _slot_ended(self, slot: asyncio.Task[None]) -> None:
        self._slots.discard(slot)
        if not slot.cancelled() and (error := slot.exception()) is not None:  # a fault of ours
            self._loop.call_exception_handler({"message": "a worker slot died", "exception": error, "task": slot})
            if not self._closing:
                replacement = asyncio.create_task(self._work(), name=slot.get_name())
                replacement.add_done_callback(self._slot_ended)
                self._slots.add(replacement)

    async def _beat(self) -> None:
        """Reports all running jobs at once, twice in each stall interval."""
        while True:
            await asyncio.sleep(self._settings.stall_interval / 2000)
            if self._held:
                try:
                    await self._store.heartbeat({run.id for run in self._held})
                except BeeQueueError as error:
                    self._host.report(error)

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def drain(self, client_id: int | None, timeout_s: float) -> bool:
        """Stops taking, lets handlers end, hands back what is left; False when handlers had to be cancelled.

        In this order: no new take and no take with a finish; the open take is ended, and waited for, since cutting it would
        lose the job that is just arriving; handlers have until the time-out, then `async` ones are cancelled (a thread
        cannot be: its job stays in `active`); finishes under way are waited for; all that is still held goes back.
        """
        deadline = self._loop.time() + timeout_s
        self._closing = True
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
        while self._free:
            self._free.popleft().set_result(None)
        await self._end_intake(client_id)
        slots = set(self._slots)
        if slots:
            await asyncio.wait(slots, timeout=max(0.0, deadline - self._loop.time()))
        in_time = not self._slots
        if not in_time:
            await self._cancel_handlers()
        await self._hand_back()
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.wait((self._heart,))
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        return in_time

    async def _end_intake(self, client_id: int | None) -> None:
        self._check_intake()
        while not self._intake_ended.is_set():
            if self._take is not None:
                if self._store.withdraw_take(self._take):
                    self._take = None
                    self._check_intake()
                    continue
                # again and again: one that comes before the take does nothing
                if client_id is not None:
                    self._store.unblock(client_id)
            try:
                await asyncio.wait_for(self._intake_ended.wait(), UNBLOCK_EVERY_S)
            except TimeoutError:
                pass

    async def _cancel_handlers(self) -> None:
        finishing = any(run.finish for run in self._held)
        if finishing:
            await asyncio.wait(set(self._slots), timeout=GRACE_S)
        slots = set(self._slots)
        for slot in slots:
            slot.cancel()
        if slots:
            await asyncio.wait(slots, timeout=GRACE_S)

    async def _hand_back(self) -> None:
        held = [run.id for run in reversed(self._held) if not run.finish and not run.in_thread]
        if not held:
            return
        try:
            async with asyncio.timeout(GRACE_S):
                await self._store.hand_back(held)
        except (BeeQueueError, TimeoutError) as error:
            self._host.report(error)


def _is_async(handler: Handler) -> bool:
    """Also for an object whose class has an `async def __call__`."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))  # noqa: B004


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
