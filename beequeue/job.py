"""A job: what it carries, what its worker may do with it, and who listens to it. No I/O.

A job's entry in the hash `<prefix>:<name>:jobs` is JSON with the members data, options, status and progress, in
that order; the id is the hash field. Whatever talks to Redis is the queue's: a job only passes it on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Protocol

import orjson

from beequeue.errors import OutcomeUnknown, UnreadableData
from beequeue.events import ENDS, Emitter, Event, load_json
from beequeue.settings import Duration, PointInTime, milliseconds

Strategy = Callable[["Job"], int | float | None]
"""From a job whose attempt failed to the ms before the next one; None or a negative number: do not retry."""


def _exponential(job: Job) -> int:
    delay: int = job.options["backoff"]["delay"]
    job.options["backoff"]["delay"] = delay * 2
    return delay


BUILT_IN_STRATEGIES: Mapping[str, Strategy] = {
    "immediate": lambda job: 0,
    "fixed": lambda job: job.options["backoff"]["delay"],
    "exponential": _exponential,
}


def now_ms() -> int:
    """This process's clock, in ms since the epoch."""
    return int(time.time() * 1000)


class Owner(Protocol):
    """What a job asks of its queue."""

    backoff_strategies: dict[str, Strategy]

    async def save_job(self, job: Job) -> None: ...
    async def report_progress(self, job: Job, value: Any) -> int: ...
    def check_result_is_possible(self, job: Job) -> None: ...
    def listener_failed(self, event: str, error: Exception) -> None: ...
    def listener_awaits(self, event: str, result: Awaitable[Any]) -> None: ...


class Job(Emitter):
    """One job of a queue; made by `Queue.create_job`, or handed to a handler.

    `id` is a string, None until saved. `status` is `created`, `succeeded`, `failed` or `retrying`, as this process knows
    it; `uncertain` on a worker says that the connection was lost while it was recorded, by this run or by another.
    `progress` is the last value reported. `options` holds timestamp, stacktraces and what the setters put there.
    Events: `succeeded` (result), `failed` (error), `retrying` (error), `progress` (value).
    """

    __slots__ = ("_end", "_waiter", "data", "id", "options", "progress", "queue", "status", "uncertain")

    def __init__(
        self, queue: Owner, data: Any = None, *, job_id: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.queue = queue
        self.id = job_id
        self.data: Any = {} if data is None else data
        self.options: dict[str, Any] = {} if options is None else options
        self.options.setdefault("timestamp", now_ms())
        self.options.setdefault("stacktraces", [])
        self.status = "created"
        self.uncertain = False
        self.progress: Any = 0
        self._end: Event | None = None
        self._waiter: asyncio.Future[Event] | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status}>"

    # --- before save -------------------------------------------------------------------------------------------------

    def set_id(self, job_id: str | int) -> Job:
        """Gives the job an id of the caller's own instead of the next automatic one. Avoid numbers: those are automatic."""
        self.id = str(job_id)
        return self

    def retries(self, count: int) -> Job:
        """How often a failed attempt is repeated, ≥ 0."""
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"retries must be an int, not {count!r}")
        if count < 0:
            raise ValueError("Retries cannot be negative")
        self.options["retries"] = count
        return self

    def backoff(self, strategy: str, delay: Duration | None = None) -> Job:
        """How long a retry waits: `immediate`, `fixed`, `exponential` or a name in `queue.backoff_strategies`.

        `delay` is in ms, or a `timedelta`; every strategy but `immediate` needs one above 0.
        """
        if strategy not in self.queue.backoff_strategies:
            raise ValueError("unknown strategy")
        if strategy == "immediate" and delay is None:
            self.options["backoff"] = {"strategy": strategy}
            return self
        try:
            delay = milliseconds("delay", 0 if delay is None else delay, at_least=0 if strategy == "immediate" else 1)
        except (TypeError, ValueError):
            raise ValueError("delay must be a positive integer") from None
        self.options["backoff"] = {"strategy": strategy, "delay": delay}
        return self

    def delay_until(self, when: PointInTime) -> Job:
        """The time at which the job becomes available: epoch ms or an aware `datetime`; one that has passed means now."""
        if isinstance(when, datetime):
            if when.tzinfo is None:
                raise ValueError(f"invalid delay timestamp: {when!r} has no time zone")
            when = when.timestamp() * 1000
        if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < 2**53:
            raise ValueError(f"invalid delay timestamp: {when!r} is neither epoch milliseconds nor an aware datetime")
        if when > now_ms():
            self.options["delay"] = int(when)
        else:
            self.options.pop("delay", None)
        return self

    def timeout(self, duration: Duration) -> Job:
        """How long one attempt may run, in ms or as a `timedelta`; 0 means without limit."""
        try:
            self.options["timeout"] = milliseconds("timeout", duration)
        except ValueError:
            raise ValueError("Timeout cannot be negative") from None
        return self

    # --- what the queue does for it ----------------------------------------------------------------------------------

    async def save(self) -> Job:
        """Stores the job and makes it available (script `add_job`); returns the job, its `id` filled in.

        `id` is None when its own id was in use: nothing was written then. Raises `TypeError` when JSON cannot carry `data`
        (nothing was sent), `ConnectionLost`, `CommandError`, `QueueClosed`.
        """
        await self.queue.save_job(self)
        return self

    async def report_progress(self, value: Any) -> int:
        """Publishes `value` (any JSON but null) on the events channel; returns how many subscribers it reached."""
        return await self.queue.report_progress(self, value)

    async def result(self, timeout: Duration | None = None) -> Any:
        """Waits for the end of this saved job and returns its handler's result.

        `timeout` is in ms or a `timedelta`. Raises `JobFailed`, `OutcomeUnknown`, `TimeoutError`, `QueueClosed` when the queue
        is closed first, and `BeeQueueError` at once when the queue has no `get_events` or no `store_jobs`, or has not saved
        this job. With `ordered_events=False` the event may be lost, and only `timeout` ends the wait.
        """
        limit = None if timeout is None else milliseconds("timeout", timeout) / 1000
        if self._end is None:
            self.queue.check_result_is_possible(self)
            if self._waiter is None:
                self._waiter = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(limit):
                await asyncio.shield(self._waiter)
        assert self._end is not None
        if isinstance(self._end.data, Exception):
            raise self._end.data
        return self._end.data

    # --- events ------------------------------------------------------------------------------------------------------

    def receive(self, event: Event) -> None:
        """Takes an event that the registry delivers: bookkeeping first, then the listeners."""
        name = event.name
        if name == "progress":
            self.progress = event.data
        elif name == "retrying":
            self.options["retries"] = max(0, self.options.get("retries", 0) - 1)
        elif name in ENDS:
            self.end(event)
        self.emit(name, event.data)

    def lose(self, reason: str) -> None:
        """Settles a job whose end nobody saw as `OutcomeUnknown`."""
        assert self.id is not None
        error = OutcomeUnknown(f"job {self.id}: {reason}")
        self.end(Event(self.id, "unknown", error))
        self.emit("unknown", error)

    def end(self, event: Event) -> None:
        """Remembers the last event, for `result()`."""
        self._end = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(event)

    def _listener_failed(self, event: str, error: Exception) -> None:
        self.queue.listener_failed(event, error)

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        self.queue.listener_awaits(event, result)

    # --- the stored form ---------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The entry for the hash `jobs`; raises `TypeError` when JSON cannot carry it."""
        return orjson.dumps({"data": self.data, "options": self.options, "status": self.status, "progress": self.progress})

    def to_data(self) -> str:
        """The entry for the hash `jobs`, as a string."""
        return self.encode().decode()

    @classmethod
    def decode(cls, queue: Owner, job_id: str, entry: bytes) -> Job:
        """Reads an entry of the hash `jobs`; raises `UnreadableData` when it is not one."""
        stored = load_json(entry, f"stored job (id {job_id})")
        if type(stored) is not dict or type(options := stored.get("options", {})) is not dict:
            raise UnreadableData(f"the stored job {job_id} is not an object with data and options: {entry[:200]!r}")
        job = cls(queue, stored.get("data"), job_id=job_id, options=options)
        job.status = stored.get("status", "created")
        job.progress = stored.get("progress", 0)
        return job
