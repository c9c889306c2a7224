"""Everything that is done to jobs from outside a handler, except saving: fetch, list, remove, retry, clean, progress, results.

On an ordered queue it binds a fetched or retried job in the step that parses the reply, so that no event can come between. With
two sockets it binds as bee-queue 2.0.0 does, after the call. The public method that calls a method here documents it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from beequeue.errors import BeeQueueError, OutcomeUnknown, UnreadableData
from beequeue.events import Event, encode_event
from beequeue.host import Host
from beequeue.job import Job, failure_from, id_from, is_same_job, now_ms, stamp_of
from beequeue.producer.saver import timed_out
from beequeue.producer.tracker import Tracker
from beequeue.settings import Duration, milliseconds, whole_number
from beequeue.store.store import Retried, Store, Stored
from beequeue.wire.link import complete

ENTRIES_A_READ = 1_000
"""How many entries of `jobs` one command reads."""

ENDED = ("succeeded", "failed")
LISTED = ("waiting", "active", "delayed", *ENDED)
HOLDING_IDS = (*LISTED, "stalling")


class Producer:
    """The jobs of one queue, seen from outside."""

    def __init__(self, host: Host, store: Store, tracker: Tracker) -> None:
        self._host = host
        self._store = store
        self._tracker = tracker
        self._ordered = host.settings.ordered

    # --- one job -----------------------------------------------------------------------------------------------------

    async def fetch(self, job_id: str | int) -> Job | None:
        """`Job.from_id`: reads the entry of `jobs` into a new object."""
        return await self._get(id_from(job_id), self._read)

    async def get(self, job_id: str | int) -> Job | None:
        """`Queue.get_job`: returns the object bound to the id, or a new one, which it binds unless the job has ended."""
        job = await self._get(id_from(job_id), self._read_and_bind if self._ordered else self._read_known)
        if job is not None and not self._ordered:
            self._bind_if_open(job)
        return job

    async def _get(self, job_id: str, read: Callable[[str, Stored | None], Job | None]) -> Job | None:
        await self._host.opened()
        answered: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()

        def on_stored(reply: Stored | BeeQueueError | None) -> None:
            if answered.done():  # the caller was cancelled: a job that nobody gets must not be bound
                return
            try:
                complete(answered, reply if isinstance(reply, BeeQueueError) else read(job_id, reply))
            except UnreadableData as error:
                complete(answered, error)
            except Exception as error:  # the caller must get it, or it would wait forever
                complete(answered, UnreadableData(f"the stored job {job_id} cannot be read: {type(error).__name__}: {error}"))

        with self._host.calls:
            return await self._store.wait(self._store.get(job_id, on_stored), answered)

    def _read(self, job_id: str, stored: Stored | None) -> Job | None:
        """Makes a new object of a stored job; it knows how the job ended, if it has."""
        if stored is None:
            return None
        job = Job.decode(self._host.queue, job_id, stored.entry)
        job.saved_as = job_id
        if stored.state == "failed":
            traces = job.options["stacktraces"]
            job.end(Event(job_id, "failed", failure_from(traces[0] if traces and isinstance(traces[0], str) else "")))
        elif stored.state == "succeeded":
            job.end(Event(job_id, "unknown", OutcomeUnknown(f"job {job_id} succeeded, and results are not stored")))
        return job

    def _read_known(self, job_id: str, stored: Stored | None) -> Job | None:
        """Like `_read`, but returns the bound object if there is one."""
        job = self._read(job_id, stored)
        return None if job is None else self._known(job)

    def _read_and_bind(self, job_id: str, stored: Stored | None) -> Job | None:
        job = self._read_known(job_id, stored)
        if job is not None:
            self._bind_if_open(job)
        return job

    def _known(self, stored: Job) -> Job:
        """Returns the bound object of a stored job; the job itself when none is bound, or that of another job."""
        assert stored.id is not None
        bound = self._tracker.jobs.get(stored.id)
        return bound if bound is not None and is_same_job(stamp_of(bound.created_at), stamp_of(stored.created_at)) else stored

    def _bind_if_open(self, job: Job) -> None:
        assert job.id is not None
        if job.last_event is None and self._tracker.jobs.get(job.id) is not job:
            self._tracker.bind(job)

    async def remove(self, job_id: str | int, timeout_ms: int | None = None) -> None:
        """`Queue.remove_job` and `Job.remove`: takes the id out of every key. Raises `ConnectionLost` after `timeout_ms`."""
        job_id = id_from(job_id)
        sent = False

        def on_reply(reply: Any) -> None:
            if not isinstance(reply, BeeQueueError):
                # in this step: the reply to a save under the same id may follow in the same read
                self._tracker.forget(job_id, "it was removed")
            complete(answered, reply)

        try:
            async with asyncio.timeout(None if timeout_ms is None else timeout_ms / 1000) as limit:
                await self._host.opened()
                answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                command = self._store.remove(job_id, on_reply)
                try:
                    with self._host.calls:
                        await answered
                except asyncio.CancelledError:
                    sent = not self._store.withdraw(command)
                    raise
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out("removed", maybe_applied=sent) from None

    async def retry(self, job: Job) -> tuple[int, int]:
        """`Job.retry`: moves the id from `failed` or `succeeded` to `waiting`."""
        if job.id is None:
            raise BeeQueueError("a job without an id cannot be retried: save it first")
        job_id, end = job.id, job.last_event
        await self._host.opened()
        answered: asyncio.Future[Retried | None] = asyncio.get_running_loop().create_future()

        def on_retried(reply: Retried | BeeQueueError | None) -> None:
            if reply is None and not bound:
                self._tracker.forget(job_id, "it has no entry in jobs")
            elif isinstance(reply, Retried):
                self._tracker.retried(job_id)
                if self._ordered:  # the events of the earlier attempt have been read already
                    self._bind_again(job)
            complete(answered, reply)

        bound = not self._ordered and self._bind_again(job)
        command = self._store.retry(job_id, on_retried)
        try:
            with self._host.calls:
                reply = await answered
            if reply is None:
                raise BeeQueueError(f"job {job_id} cannot be retried: it has no entry in jobs")
        except (BeeQueueError, asyncio.CancelledError) as error:
            not_done = isinstance(error, BeeQueueError) or self._store.withdraw(command)
            if bound and not_done:
                self._tracker.unbind(job, job_id)
                job.last_event = end
            raise
        if job.last_event is end:  # another object receives the events of the new attempt
            job.last_event = None
        return reply.was_failed, reply.waiting

    def _bind_again(self, job: Job) -> bool:
        """Binds a job that is retried, unless another object of the same job is bound and has not ended."""
        assert job.id is not None
        if not self._tracker.tracks or (job.id in self._tracker.jobs and not self._tracker.is_ending(job.id)):
            return False
        self._tracker.bind(job)
        return True

    async def is_in_set(self, job: Job, kind: str) -> bool:
        """`Job.is_in_set`: looks for the id in one key."""
        if job.id is None:
            raise BeeQueueError("a job without an id cannot be in a set: save it first")
        if kind not in HOLDING_IDS:
            raise ValueError(f"is_in_set takes one of {', '.join(HOLDING_IDS)}, not {kind!r}")
        await self._host.opened()
        with self._host.calls:
            return await self._store.is_in(kind, job.id)

    async def report_progress(self, job: Job, value: Any) -> int:
        """`Job.report_progress`: publishes one message on `events`."""
        if value is None:
            raise ValueError("Progress cannot be empty")
        if job.id is None:
            raise BeeQueueError("a job without an id cannot report progress: save it first")
        message = encode_event(job.id, "progress", value)
        await self._host.opened()
        job.progress = value
        with self._host.calls:
            return await self._store.publish(message)

    async def end_of(self, job: Job) -> Event:
        """`Job.result`: waits for the job's last event."""
        if job.last_event is not None:
            return job.last_event
        await self._host.opened()
        if not self._tracker.tracks:
            raise BeeQueueError("result() needs a queue with get_events and store_jobs")
        if job.last_event is None and (job.id is None or self._tracker.jobs.get(job.id) is not job):
            raise BeeQueueError("result() is for a job that this queue has saved or fetched")
        return await self._tracker.end_of(job)

    # --- many jobs ---------------------------------------------------------------------------------------------------

    async def list_jobs(self, kind: str, start: int, end: int, size: int) -> list[Job]:
        """`Queue.get_jobs`: reads ids from `kind`, then their entries from `jobs`."""
        await self._host.opened()
        if kind not in LISTED:
            raise ValueError(f"Improper queue type {kind!r}: it must be one of {', '.join(LISTED)}")
        start, end = whole_number("start", start), whole_number("end", end)
        whole_number("size", size, at_least=1)
        with self._host.calls:
            ids = await self._scan(kind, size) if kind in ENDED else await self._store.ids_from(kind, start, end)
            jobs = []
            for first in range(0, len(ids), ENTRIES_A_READ):
                some = ids[first : first + ENTRIES_A_READ]
                for job_id, entry in zip(some, await self._store.entries(some), strict=True):
                    if entry is None:  # removed since its id was read
                        continue
                    try:
                        jobs.append(self._known(Job.decode(self._host.queue, job_id, entry)))
                    except UnreadableData as error:
                        self._host.report(error)
            return jobs

    async def _scan(self, kind: str, size: int) -> list[str]:
        count = min(size, self._host.settings.redis_scan_count)
        found: dict[str, None] = {}  # SSCAN may return an id twice
        cursor = None
        while cursor != b"0" and len(found) < size:
            cursor, ids = await self._store.scan(kind, cursor or b"0", count)
            found.update(dict.fromkeys(ids))
        return [*found][:size]

    async def clean(self, kind: str, older_than: Duration, limit: int) -> int:
        """`Queue.clean`: deletes ended jobs, page by page of a scan."""
        await self._host.opened()
        if kind not in ENDED:
            raise ValueError(f"clean takes one of {', '.join(ENDED)}, not {kind!r}")
        whole_number("limit", limit, at_least=1)
        created_until = now_ms() - milliseconds("older_than", older_than)
        deleted = 0
        cursor = None
        with self._host.calls:
            while cursor != b"0" and deleted < limit:
                cursor, ids = await self._store.scan(kind, cursor or b"0", self._host.settings.redis_scan_count)
                if ids:
                    deleted += await self._store.clean(kind, created_until, limit - deleted, ids)
        return deleted
