"""A job: what it carries, what its worker may do with it, and who listens to it. No I/O.

A job's entry in the hash `<prefix>:<name>:jobs` is JSON with the members data, options, status and progress, in
that order; the id is the hash field. Whatever talks to Redis is the queue's: a job only passes it on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Protocol

from beequeue.errors import BeeQueueError, OutcomeUnknown, UnreadableData
from beequeue.events import ENDS, Emitter, Event
from beequeue.settings import Duration, PointInTime, milliseconds
from beequeue.wire.node_json import dump_json, load_json

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


def id_as_text(job_id: bytes) -> str:
    """An id in Redis as a string; what is not UTF-8 survives the way back."""
    return job_id.decode("utf-8", "surrogateescape")


def id_as_bytes(job_id: str) -> bytes:
    """An id as Redis has it."""
    return job_id.encode("utf-8", "surrogateescape")


def id_from(value: str | int) -> str:
    """`value` as a job id: ids are text, also where they look like numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"a job id must be a string or an int, not {value!r}")
    job_id = str(value)
    if not job_id:
        raise ValueError("a job id must not be empty")
    try:
        job_id.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"a job id must be text that UTF-8 can carry, not {job_id!r}") from None
    return job_id


def stamp_of(created_at: Any) -> str:
    """A timestamp as the scripts write it, for `is_same_job`; empty when it is not a number."""
    return f"{created_at:.0f}" if isinstance(created_at, (int, float)) else ""


def is_same_job(stamp: str, other: str) -> bool:
    """Whether two jobs with one id are the same job: Redis gives an id again when it has come back empty.

    Compares when they were created. An empty stamp tells nothing, so the answer is then yes.
    """
    return not stamp or not other or stamp == other


class Commands(Protocol):
    """What a job has its queue do in Redis."""

    async def save(self, job: Job) -> None: ...
    async def fetch(self, job_id: str | int) -> Job | None: ...
    async def remove(self, job_id: str | int) -> None: ...
    async def retry(self, job: Job) -> tuple[int, int]: ...
    async def is_in_set(self, job: Job, kind: str) -> bool: ...
    async def report_progress(self, job: Job, value: Any) -> int: ...
    async def end_of(self, job: Job) -> Event: ...


class Owner(Protocol):
    """What a job asks of its queue."""

    backoff_strategies: dict[str, Strategy]

    @property
    def _producer(self) -> Commands: ...
    def _listener_failed(self, event: str, error: BaseException) -> None: ...
    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None: ...


class Job(Emitter):
    """One job of a queue; made by `Queue.create_job`, or handed to a handler.

    `id` is a string, None until saved. `status` is `created`, `succeeded`, `failed` or `retrying`, as this process knows
    it; `uncertain` on a worker says that the connection was lost while it was recorded, by this run or by another.
    `progress` is the last value reported. `options` holds timestamp, stacktraces and what the setters put there.
    Events: `succeeded` (result), `failed` (error), `retrying` (error), `progress` (value), and
    `unknown` (error) when it has ended and nobody can tell how.
    """

    __slots__ = (
        "bound",
        "created_at",
        "data",
        "ended",
        "id",
        "last_event",
        "options",
        "progress",
        "queue",
        "saved_as",
        "saving",
        "status",
        "uncertain",
    )

    def __init__(
        self, queue: Owner, data: Any = None, *, job_id: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.queue = queue
        """The queue that made or fetched the job."""
        self.id = job_id
        """A string, also where it looks like a number; None until the job is saved."""
        self.data: Any = {} if data is None else data
        """Any value that JSON carries; a handler reads it."""
        self.options: dict[str, Any] = {} if options is None else options
        """Stored with the job: `timestamp` (epoch ms of its creation), `stacktraces` (newest first), and what setters set."""
        if "timestamp" not in self.options:
            self.options["timestamp"] = now_ms()
        self.created_at: Any = self.options["timestamp"]
        """The timestamp of its entry in `jobs`, None when that has none; see `is_same_job`. `options` may change later."""
        if type(self.options.get("stacktraces")) is not list:
            self.options["stacktraces"] = []
        self.status = "created"
        """`created`, `succeeded`, `failed` or `retrying`, as far as this process knows."""
        self.uncertain = False
        """On a worker: the connection was lost while the outcome was recorded, by this attempt or by another."""
        self.progress: Any = 0
        """The last value that was reported; 0 before."""
        self.last_event: Event | None = None
        """The event that ended it, as far as this process has heard."""
        self.ended: asyncio.Future[Event] | None = None
        """Completes with `last_event`, while somebody waits for it."""
        self.bound = 0
        """How often it was bound to its id, to receive events."""
        self.saving = False
        self.saved_as: str | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status}>"

    # --- before save -------------------------------------------------------------------------------------------------

    def set_id(self, job_id: str | int) -> Job:
        """Gives the job an id of the caller's own instead of the next automatic one. Avoid numbers: those are automatic.

        Any text but an empty one; an int becomes text. Raises `TypeError`, `ValueError`.
        """
        self.id = id_from(job_id)
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
        if not isinstance(strategy, str) or strategy not in self.queue.backoff_strategies:
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
        if int(when) > now_ms():
            self.options["delay"] = math.ceil(when)
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
        """Stores the job and makes it available (scripts `add_job`, `add_delayed_job`); returns it, its `id` filled in.

        When its own id is in use nothing is written; `id` is None then, except on a job that was saved before, which keeps it.
        Raises `TypeError` when JSON cannot carry the job (nothing was sent), `BeeQueueError` when it is being saved already,
        `RedisFailure`, `QueueClosed`. When it is cancelled before it was sent, it is not sent later.
        """
        await self.queue._producer.save(self)
        return self

    async def report_progress(self, value: Any) -> int:
        """Publishes `value` (any JSON but null) on the channel `events`; returns how many subscribers it reached.

        It is stored with the job when the job is settled. Raises `ValueError` for None, `BeeQueueError` for a job without
        an id, `TypeError` when JSON cannot carry `value`, `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.report_progress(self, value)

    async def remove(self) -> Job:
        """Takes the job out of every key (script `remove_job`); returns it. Does nothing when it is gone already.

        No event is published; a result that this queue waits for ends as `OutcomeUnknown`. A worker that runs the job reports
        a late finish. Raises `BeeQueueError` for a job without an id, `RedisFailure`, `QueueClosed`.
        """
        if self.id is None:
            raise BeeQueueError("a job without an id cannot be removed: save it first")
        await self.queue._producer.remove(self.id)
        return self

    async def retry(self) -> tuple[int, int]:
        """Moves the job, when it has ended, back to `waiting` (script `retry_job`); its own events come once more.

        Returns 1 if it was in `failed`, else 0, and the length of `waiting`. A job that has not ended runs anyway and is left
        alone. The remaining retries stay as they are. Raises `BeeQueueError` for a job without an id or without an entry in
        `jobs`, `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.retry(self)

    async def is_in_set(self, name: str) -> bool:
        """Whether the job's id is in `waiting`, `active`, `succeeded`, `failed`, `delayed` or `stalling`.

        The two lists are searched from end to end (`LPOS`, Redis 6.0.6). Raises `ValueError` for another name, `BeeQueueError`
        for a job without an id, `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.is_in_set(self, name)

    @staticmethod
    async def from_id(queue: Owner, job_id: str | int) -> Job | None:
        """The job as it is stored in `jobs` now, or None: a new object, which receives no events.

        Raises `UnreadableData`, `RedisFailure`, `QueueClosed`.
        """
        return await queue._producer.fetch(job_id)

    async def result(self, timeout: Duration | None = None) -> Any:
        """Waits for the end of this saved job and returns its handler's result.

        `timeout` is in ms or a `timedelta`. The result comes with the message on `events`; it is not stored. Raises `JobFailed`
        with the worker's message; `OutcomeUnknown` when the job ended and no message told how (it was removed, its worker sends
        none, the connection was down), which is found out within about 5 s, twice that with `ordered_events=False`;
        `TimeoutError`; `QueueClosed` when the queue is closed first; and `BeeQueueError` at once when the queue has no
        `get_events` or no `store_jobs`, or has neither saved nor fetched this job.
        """
        limit = None if timeout is None else milliseconds("timeout", timeout) / 1000
        async with asyncio.timeout(limit):
            end = await self.queue._producer.end_of(self)
        if isinstance(end.data, Exception):
            raise end.data
        return end.data

    # --- events ------------------------------------------------------------------------------------------------------

    def receive(self, event: Event) -> None:
        """Takes an event that the registry delivers: bookkeeping first, then the listeners."""
        name = event.name
        if name == "progress":
            self.progress = event.data
        elif name == "retrying":
            left = self.options.get("retries")
            self.options["retries"] = max(0, left - 1) if isinstance(left, int) else 0
        elif name in ENDS or isinstance(event.data, OutcomeUnknown):
            self.end(event)
        self.emit(name, event.data)

    def end(self, event: Event) -> None:
        """Remembers the last event, for `result()`."""
        self.last_event = event
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(event)

    def _listener_failed(self, event: str, error: BaseException) -> None:
        self.queue._listener_failed(f"{event} of job {self.id}", error)

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        self.queue._listener_awaits(f"{event} of job {self.id}", result)

    # --- the stored form ---------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The entry for the hash `jobs`; raises `TypeError` when JSON cannot carry it."""
        return dump_json({"data": self.data, "options": self.options, "status": self.status, "progress": self.progress})

    def to_data(self) -> str:
        """The entry for the hash `jobs`, as a string."""
        return self.encode().decode()

    @classmethod
    def decode(cls, queue: Owner, job_id: str, entry: bytes) -> Job:
        """Reads an entry of the hash `jobs`; raises `UnreadableData` when it is not one."""
        stored = load_json(entry, f"stored job (id {job_id})")
        if type(stored) is not dict or type(options := stored.get("options", {})) is not dict:
            raise UnreadableData(f"the stored job {job_id} is not an object with data and options: {entry[:200]!r}")
        created_at = options.get("timestamp")
        job = cls(queue, stored.get("data"), job_id=job_id, options=options)
        job.created_at = created_at
        job.status = stored.get("status", "created")
        job.progress = stored.get("progress", 0)
        return job
