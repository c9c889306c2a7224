"""A job: its data and options, its listeners, and its stored form. No I/O.

Redis stores a job as an entry of the hash `<prefix>:<name>:jobs`. The field is the job's id; the value is JSON with the members
data, options, status and progress, in that order. A job passes each call that needs Redis on to its queue.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Protocol

from beequeue.errors import BeeQueueError, JobFailed, OutcomeUnknown, UnreadableData
from beequeue.events import ENDS, Emitter, Event
from beequeue.settings import Duration, PointInTime, milliseconds, shown
from beequeue.wire.node_json import dump_json, load_json

Strategy = Callable[["Job"], int | float | None]
"""Gets a job whose attempt failed; returns the ms to wait before the next attempt. None or a negative number: no retry."""


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
    """Decodes an id from Redis; bytes that are not UTF-8 survive the way back."""
    return job_id.decode("utf-8", "surrogateescape")


def id_as_bytes(job_id: str) -> bytes:
    """Encodes an id for Redis."""
    return job_id.encode("utf-8", "surrogateescape")


def id_from(value: str | int) -> str:
    """Checks a caller's job id and returns it as text: ids are text, even when they look like numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"a job id must be a string or an int, not {value!r}")
    try:
        job_id = str(value)
    except ValueError:
        raise ValueError(f"a job id must be text, or an int that Python can print, not {shown(value)}") from None
    if not job_id:
        raise ValueError("a job id must not be empty")
    try:
        id_as_bytes(job_id)
    except UnicodeEncodeError:
        raise ValueError(f"a job id must be text that UTF-8 can carry, not {job_id!r}") from None
    return job_id


def stamp_of(created_at: Any) -> str:
    """A job's time of creation as the scripts print it, in whole ms; empty when it is no number."""
    return f"{created_at:.0f}" if isinstance(created_at, (int, float)) else ""


def is_same_job(stamp: str, other: str) -> bool:
    """Whether two jobs with one id are the same job, by their stamps; an empty stamp matches any.

    Ids are reused: a Redis that comes back empty counts from 1 again, and callers choose ids of their own. Nothing but the time
    of creation stays the same throughout a job's life.
    """
    return not stamp or not other or stamp == other


def failure_from(trace: str) -> JobFailed:
    """The failure that a stack trace tells of. Python writes the message in the last line, Node in the first."""
    lines = trace.strip().splitlines() or [""]
    return JobFailed(lines[-1 if lines[0].startswith("Traceback ") else 0])


class Saves(Protocol):
    """The part of a queue that saves its jobs."""

    async def save(self, job: Job) -> None: ...


class Commands(Protocol):
    """The part of a queue that does everything else with its jobs in Redis."""

    async def fetch(self, job_id: str | int) -> Job | None: ...
    async def remove(self, job_id: str | int) -> None: ...
    async def retry(self, job: Job) -> tuple[int, int]: ...
    async def is_in_set(self, job: Job, kind: str) -> bool: ...
    async def report_progress(self, job: Job, value: Any) -> int: ...
    async def end_of(self, job: Job) -> Event: ...


class Owner(Protocol):
    """A job's queue, as the job sees it."""

    backoff_strategies: dict[str, Strategy]

    @property
    def _saver(self) -> Saves: ...
    @property
    def _producer(self) -> Commands: ...
    def _listener_failed(self, event: str, error: BaseException) -> None: ...
    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None: ...


class Job(Emitter):
    """One job of a queue. `Queue.create_job` makes a new one; a handler gets the job that it processes.

    A job emits `succeeded` (result), `failed` (error), `retrying` (error), `progress` (value), and `unknown` (error) when it
    has ended with an unknown outcome.
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
        """A string, even when it looks like a number; None until the job is saved."""
        self.data: Any = {} if data is None else data
        """The value that the job carries, anything that JSON can."""
        self.options: dict[str, Any] = {} if options is None else options
        """Stored with the job: `timestamp` (epoch ms of its creation), `stacktraces` (newest first), and what setters set."""
        if "timestamp" not in self.options:
            self.options["timestamp"] = now_ms()
        self.created_at: Any = self.options["timestamp"]
        """The timestamp of its entry in `jobs`, which tells it from another job with the same id: see `is_same_job`.

        None when the entry has none. `options` may change later.
        """
        if type(self.options.get("stacktraces")) is not list:
            self.options["stacktraces"] = []
        self.status = "created"
        """`created`, `succeeded`, `failed` or `retrying`, as far as this process knows."""
        self.uncertain = False
        """On a worker: the connection was lost while the job was being settled. This attempt or another one has settled it."""
        self.progress: Any = 0
        """The last value reported; 0 before the first."""
        self.last_event: Event | None = None
        """The event that ended it, if this process has received one."""
        self.ended: asyncio.Future[Event] | None = None
        """Completes with `last_event`; None while nobody waits for it."""
        self.bound = 0
        """How often the tracker has bound it to its id."""
        self.saving = False
        """Whether a save is under way."""
        self.saved_as: str | None = None
        """The id under which it is stored, if it was saved or fetched here."""

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status}>"

    # --- before save -------------------------------------------------------------------------------------------------

    def set_id(self, job_id: str | int) -> Job:
        """Gives the job an id of your own instead of the next automatic one; returns the job.

        Any text except the empty one will do; an int becomes text. Avoid numbers: automatic ids are numbers. Raises
        `TypeError`, `ValueError`.
        """
        self.id = id_from(job_id)
        return self

    def retries(self, count: int) -> Job:
        """Sets how often a failed attempt is repeated, at least 0; returns the job. Raises `TypeError`, `ValueError`."""
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"retries must be an int, not {count!r}")
        if count < 0:
            raise ValueError("Retries cannot be negative")
        self.options["retries"] = count
        return self

    def backoff(self, strategy: str, delay: Duration | None = None) -> Job:
        """Sets how long a retry waits; returns the job.

        `strategy` is `immediate`, `fixed`, `exponential` or a name in `queue.backoff_strategies`. `delay` is in ms or a
        `timedelta`; every strategy except `immediate` needs one above 0. Raises `ValueError`.
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
        """Sets the time at which the job becomes available; returns the job.

        `when` is in epoch ms or an aware `datetime`; a time that has passed means now. Raises `ValueError`.
        """
        if isinstance(when, datetime):
            if when.tzinfo is None:
                raise ValueError(f"invalid delay timestamp: {when!r} has no time zone")
            when = when.timestamp() * 1000
        if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < 2**53:
            raise ValueError(f"invalid delay timestamp: {shown(when)} is neither epoch milliseconds nor an aware datetime")
        if int(when) > now_ms():
            self.options["delay"] = math.ceil(when)
        else:
            self.options.pop("delay", None)
        return self

    def timeout(self, duration: Duration) -> Job:
        """Sets how long one attempt may run, in ms or as a `timedelta`; 0 sets no limit. Returns the job.

        Raises `TypeError`, `ValueError`.
        """
        if duration < timedelta(0) if isinstance(duration, timedelta) else isinstance(duration, int) and duration < 0:
            raise ValueError("Timeout cannot be negative")
        self.options["timeout"] = milliseconds("timeout", duration)
        return self

    # --- calls that the queue answers --------------------------------------------------------------------------------

    async def save(self) -> Job:
        """Stores the job in `jobs` and its id in `waiting` or `delayed` (scripts `add_job`, `add_delayed_job`).

        Returns the job with its `id` filled in. When its own id is in use, nothing is written and `id` becomes None; a job that
        was saved before keeps its id. A call that is cancelled before it was sent is not sent later. Raises `TypeError` when
        JSON cannot carry the job (nothing was sent), `BeeQueueError` when the job is being saved already, `RedisFailure`,
        `QueueClosed`.
        """
        await self.queue._saver.save(self)
        return self

    async def report_progress(self, value: Any) -> int:
        """Publishes `value` on the channel `events`, as the event `progress`; returns how many subscribers it reached.

        `value` is anything that JSON carries, except null. The worker stores it with the job when it settles the job. Raises
        `ValueError` for None, `BeeQueueError` for a job without an id, `TypeError` when JSON cannot carry `value`,
        `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.report_progress(self, value)

    async def remove(self) -> Job:
        """Takes the job out of every key (script `remove_job`), if it is still there; returns the job.

        Publishes no event. A `result()` that waits in this queue ends as `OutcomeUnknown`; a worker that runs the job reports a
        late finish. Raises `BeeQueueError` for a job without an id, `RedisFailure`, `QueueClosed`.
        """
        if self.id is None:
            raise BeeQueueError("a job without an id cannot be removed: save it first")
        await self.queue._producer.remove(self.id)
        return self

    async def retry(self) -> tuple[int, int]:
        """Moves a job that has ended from `failed` or `succeeded` back to `waiting` (script `retry_job`).

        Its own events then come once more. The remaining retries stay as they are. A job that has not ended is left alone: it
        runs anyway. Returns 1 if the job was in `failed`, else 0, and the length of `waiting`. Raises `BeeQueueError` for a job
        without an id or without an entry in `jobs`, `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.retry(self)

    async def is_in_set(self, name: str) -> bool:
        """Whether the job's id is in `waiting`, `active`, `succeeded`, `failed`, `delayed` or `stalling`.

        Redis searches the lists `waiting` and `active` from end to end (`LPOS`, Redis 6.0.6). Raises `ValueError` for another
        name, `BeeQueueError` for a job without an id, `RedisFailure`, `QueueClosed`.
        """
        return await self.queue._producer.is_in_set(self, name)

    @staticmethod
    async def from_id(queue: Owner, job_id: str | int) -> Job | None:
        """Reads the job from `jobs` (script `get_job`): a new object that receives no events, or None when there is no job.

        Raises `BeeQueueError` for a job above 30 MB on a queue with `ordered_events`, and `UnreadableData`, `RedisFailure`,
        `QueueClosed`.
        """
        return await queue._producer.fetch(job_id)

    async def result(self, timeout: Duration | None = None) -> Any:
        """Waits until this saved job has ended and returns its handler's result.

        `timeout` is in ms or a `timedelta`; None waits without limit. The result arrives with the message on `events`; Redis
        does not store it. Raises

        - `JobFailed` with the worker's message;
        - `OutcomeUnknown` when the job ended and no message said how: it was removed, its worker sends no events, or the
          connection was down. The queue finds this out within about 5 s, or 10 s with `ordered_events=False`;
        - `TimeoutError`, and `QueueClosed` when the queue is closed first;
        - `BeeQueueError` at once when the queue has no `get_events` or no `store_jobs`, or has neither saved nor fetched this
          job.
        """
        limit = None if timeout is None else milliseconds("timeout", timeout) / 1000
        async with asyncio.timeout(limit):
            end = await self.queue._producer.end_of(self)
        if isinstance(end.data, Exception):
            raise end.data
        return end.data

    # --- events ------------------------------------------------------------------------------------------------------

    def receive(self, event: Event) -> None:
        """Takes an event that the tracker delivers: updates the job, then calls its listeners."""
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
        """Remembers the job's last event and hands it to `result()`."""
        self.last_event = event
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(event)

    def _listener_failed(self, event: str, error: BaseException) -> None:
        self.queue._listener_failed(f"{event} of job {self.id}", error)

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        self.queue._listener_awaits(f"{event} of job {self.id}", result)

    # --- the stored form ---------------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """Encodes the job as an entry of `jobs`; raises `TypeError` when JSON cannot carry it."""
        return dump_json({"data": self.data, "options": self.options, "status": self.status, "progress": self.progress})

    def to_data(self) -> str:
        """Returns the job's entry in `jobs` as a string; raises `TypeError` when JSON cannot carry the job."""
        return self.encode().decode()

    @classmethod
    def decode(cls, queue: Owner, job_id: str, entry: bytes) -> Job:
        """Makes a job from an entry of `jobs`; raises `UnreadableData` when the entry is not one of a job."""
        stored = load_json(entry, f"stored job (id {job_id})")
        if type(stored) is not dict or type(options := stored.get("options", {})) is not dict:
            raise UnreadableData(f"the stored job {job_id} is not an object with data and options: {entry[:200]!r}")
        created_at = options.get("timestamp")
        job = cls(queue, stored.get("data"), job_id=job_id, options=options)
        job.created_at = created_at
        job.status = stored.get("status", "created")
        job.progress = stored.get("progress", 0)
        return job
