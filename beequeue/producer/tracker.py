"""The jobs of this process that wait for their own events: which job an event belongs to, and how each job ends.

Owns `jobs`, from id to job, and the way of an event from the message to the job. Knows no connection: its caller passes each
message to `read`, calls `hand_on` at the end of a read, and `end_unseen` after a reconnect.

No message reports the end of a job that was removed, or that ran on a worker that sends no events. So every few seconds the
tracker asks Redis about the jobs whose result somebody awaits, and, on an ordered queue, about all jobs that have been bound
for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from beequeue.errors import BeeQueueError, OutcomeUnknown, QueueClosed, UnreadableData
from beequeue.events import ENDS, Event
from beequeue.host import Host
from beequeue.job import Job, failure_from, is_same_job, stamp_of
from beequeue.producer.guard import LARGE_BYTES, Guard
from beequeue.store.store import Found, Store
from beequeue.tasks import supervised

JOBS_A_LOOK_UP = 100
"""How many jobs one call of a script asks about."""
LOOK_EVERY_S = 5.0
"""How often the tracker asks about the jobs whose result somebody awaits."""
SWEEP_EVERY_S = 5.0
"""How long a job must have been bound before a sweep asks about it, and the pause between two sweeps."""
SWEEP_PAUSE_S = 0.02
"""How long a sweep pauses after a call that found few ended jobs, or nine times as long as the call took if that is longer."""

LookUp = Callable[[Sequence[str]], Awaitable[list[Found]]]
"""From ids to the state of their jobs; on an ordered queue the answer must not overtake a message."""


class Tracker:
    """The jobs of one queue that wait for their own events."""

    def __init__(self, host: Host, store: Store) -> None:
        self.jobs: dict[str, Job] = {}
        self.tracks = host.settings.store_jobs and host.settings.get_events
        """Whether jobs are bound at all: without events nothing would ever unbind them."""
        self.unknown_outcomes = 0
        self._host = host
        self._store = store
        self._ordered = host.settings.ordered
        self._guard = Guard(host, self.jobs, self._look_up_large)
        self._read: list[tuple[Event, Job | None, int]] = []
        """Events that were read and not yet delivered, each with its job and that job's `bound`."""
        self._awaited: dict[Job, int] = {}
        """The jobs whose result somebody awaits, and how many do."""
        self._looking: asyncio.Task[None] | None = None
        self._too_large: dict[Job, str] = {}
        self._looking_at_large: asyncio.Task[None] | None = None
        self._asked: list[set[str]] = []
        """For each look-up under way the ids it asks about, less those that were retried since."""
        self._sweeping: asyncio.Task[None] | None = None
        self._must_sweep = self._ordered
        """Whether the next job that is bound has to start a sweep."""
        self._stopped = False

    # --- bindings ----------------------------------------------------------------------------------------------------

    def bind(self, job: Job) -> None:
        """Registers `job` for the events of its id. An older job with this id ends as `OutcomeUnknown`."""
        if not self.tracks:
            return
        assert job.id is not None
        older = self.jobs.get(job.id)
        self.jobs[job.id] = job
        job.bound += 1
        job.last_event = None
        if older is not None and older is not job and not self.is_ending(job.id):
            self._end_unknown(older, job.id, "its id has been given to another job")
        if self._must_sweep:
            self._must_sweep = False
            self._sweeping = supervised(self._sweep, "sweep", self._host.report)

    def unbind(self, job: Job, job_id: str) -> None:
        """Removes a binding that was made too early."""
        if self.jobs.get(job_id) is job:
            del self.jobs[job_id]

    def forget(self, job_id: str, reason: str) -> None:
        """Ends the job that is bound to an id as `OutcomeUnknown`, unless its end has been read already."""
        job = self.jobs.get(job_id)
        if job is not None and not self.is_ending(job_id):
            del self.jobs[job_id]
            # in a later step, like any event: this one may be parsing a reply
            asyncio.get_running_loop().call_soon(self._end_unknown, job, job_id, reason)

    def retried(self, job_id: str) -> None:
        """Discards what a look-up under way finds about this job: it was asked before the retry."""
        for asked in self._asked:
            asked.discard(job_id)

    def is_ending(self, job_id: str) -> bool:
        """Whether the job's last event has been read but not delivered."""
        return any(event.id == job_id and event.name in ENDS for event, _, _ in self._read)

    # --- events ------------------------------------------------------------------------------------------------------

    def read(self, payload: bytes) -> None:
        """Decodes a message of the channel `events`, in the step that parses it; reports one that is unreadable.

        On one socket this step decides which job the event belongs to: a job that is bound later must not receive it. On two
        sockets the step that delivers it decides, as in bee-queue.
        """
        if len(payload) >= LARGE_BYTES and not self._guard.admits(payload):
            return
        try:
            event = Event.decode(payload)
        except UnreadableData as error:
            self._guard.complaints.add(error.with_traceback(None))  # the traceback's frames hold the whole message
            return
        job = self.jobs.get(event.id) if self._ordered else None
        self._read.append((event, job, 0 if job is None else job.bound))

    def hand_on(self) -> None:
        """Delivers the events that were read, in one later step: after the code that awaits a reply in the same read."""
        if self._read:
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        read, self._read = self._read, []
        read.reverse()
        try:
            while read:
                self._deliver_one(*read.pop())
        finally:
            if read:  # a listener tries to end the program: the other events are still delivered
                self._read[:0] = reversed(read)
                self.hand_on()

    def _deliver_one(self, event: Event, job: Job | None, bound: int) -> None:
        """Gives an event to the queue's listeners, then to its job; unbinds a job that has ended."""
        self._host.emit("job " + event.name, event.id, event.data)
        if not self._ordered:
            job = self.jobs.get(event.id)
            bound = 0 if job is None else job.bound
        if job is None:
            return
        if job.bound != bound:  # it has been bound again since, for a retry: the event belongs to the earlier attempt
            job.emit(event.name, event.data)
            return
        job.receive(event)
        # a listener may have bound the job again, for a retry; it has no last event then
        if event.name in ENDS and job.last_event is event and self.jobs.get(event.id) is job:
            del self.jobs[event.id]

    # --- ends without an event ---------------------------------------------------------------------------------------

    async def end_unseen(self, look_up: LookUp) -> None:
        """After a reconnect, ends the jobs that ended while no message could arrive: pub/sub has no replay.

        `look_up` must ask on the new link, after its subscription.
        """
        for ended in await self._ended_unseen([(job, job_id) for job_id, job in self.jobs.items()], look_up):
            self._end_as_found(*ended)

    async def _ended_unseen(self, jobs: Sequence[tuple[Job, str]], look_up: LookUp) -> list[tuple[Job, str, Found]]:
        """Returns those of `jobs` that have ended in Redis although no event has reported it."""
        ended = []
        asked = {job_id for _, job_id in jobs}
        self._asked.append(asked)
        try:
            for start in range(0, len(jobs), JOBS_A_LOOK_UP):
                chunk = jobs[start : start + JOBS_A_LOOK_UP]
                for (job, job_id), found in zip(chunk, await look_up([job_id for _, job_id in chunk]), strict=True):
                    if found.state != "open" or not _is_entry_of(job, found):
                        ended.append((job, job_id, found))
        finally:
            self._asked = [each for each in self._asked if each is not asked]
        return [each for each in ended if each[1] in asked and each[0].last_event is None and not self.is_ending(each[1])]

    def _end_as_found(self, job: Job, job_id: str, found: Found) -> None:
        """Unbinds a job and ends it by its state in Redis: with its failure, or as `OutcomeUnknown`."""
        self.unbind(job, job_id)
        if found.state == "failed" and _is_entry_of(job, found):
            job.receive(Event(job_id, "failed", failure_from(found.trace)))
        elif found.state == "succeeded" and _is_entry_of(job, found):
            self._end_unknown(job, job_id, "it succeeded, but no event brought its result, and results are not stored")
        else:
            self._end_unknown(job, job_id, "it is gone, and no event reported its end")

    def _end_unknown(self, job: Job, job_id: str, reason: str) -> None:
        self.unknown_outcomes += 1
        job.receive(Event(job_id, "unknown", OutcomeUnknown(f"job {job_id}: {reason}")))

    async def _sweep(self) -> None:
        """Asks about the jobs that have been bound for a while, as long as any job is bound."""
        while self.jobs:
            job_ids = [*self.jobs]
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                for start in range(0, len(job_ids), JOBS_A_LOOK_UP):
                    await asyncio.sleep(await self._let_go(job_ids[start : start + JOBS_A_LOOK_UP]))
            except BeeQueueError as error:
                self._host.report(error)
        self._must_sweep = True

    async def _let_go(self, job_ids: Sequence[str]) -> float:
        """Ends those of some jobs that have ended in Redis; returns how long to pause, in s."""
        bound = [(job, job_id) for job_id in job_ids if (job := self.jobs.get(job_id)) is not None]
        if not bound:
            return 0.0
        now = asyncio.get_running_loop().time
        began_at = now()
        suspects = await self._suspects(bound)
        rest_s = max(SWEEP_PAUSE_S, 9 * (now() - began_at))
        for job, job_id, found in await self._ended_unseen(suspects, self._store.look_up):
            if self.jobs.get(job_id) is job:
                self._end_as_found(job, job_id, found)
        # when most jobs have ended, as without events, the sweep must keep up with the saves
        return 0.0 if 2 * len(suspects) > len(bound) else rest_s

    async def _suspects(self, jobs: Sequence[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Returns those of `jobs` to look up: a look-up decodes their data, which may be large."""
        suspects: list[tuple[Job, str]] = []
        for start in range(0, len(jobs), JOBS_A_LOOK_UP):
            chunk = jobs[start : start + JOBS_A_LOOK_UP]
            which = await self._store.ended([(job_id, stamp_of(job.created_at)) for job, job_id in chunk])
            suspects += (each for each in chunk if each[1] in which)
        return suspects

    # --- results -----------------------------------------------------------------------------------------------------

    async def end_of(self, job: Job) -> Event:
        """Waits for a job's last event; asks every `LOOK_EVERY_S` whether the job has ended without one."""
        if job.last_event is not None:
            return job.last_event
        if job.ended is None:
            job.ended = asyncio.get_running_loop().create_future()
        self._awaited[job] = self._awaited.get(job, 0) + 1
        if not self._stopped and (self._looking is None or self._looking.done()):
            self._looking = supervised(self._look_regularly, "results", self._host.report)
        try:
            return await asyncio.shield(job.ended)
        finally:
            self._awaited[job] -= 1
            if not self._awaited[job]:
                del self._awaited[job]
                job.ended = None

    async def _look_regularly(self) -> None:
        found_before: set[Job] = set()
        while self._awaited:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                suspects = await self._suspects([(job, job.id or "") for job in self._awaited])
                ended = await self._ended_unseen(suspects, self._store.look_up)
            except BeeQueueError as error:
                self._host.report(error)
                continue
            for job, job_id, found in ended:
                # on two sockets the answer may have overtaken the event, which has until the next look
                if self._ordered or job in found_before:
                    self._end_as_found(job, job_id, found)
            found_before = {job for job, _, _ in ended}

    def _look_up_large(self, job: Job, job_id: str) -> None:
        """Asks Redis about a job whose end came in a message that is too large to decode."""
        self._too_large[job] = job_id
        if not self._stopped and (self._looking_at_large is None or self._looking_at_large.done()):
            self._looking_at_large = supervised(self._look_at_large, "large results", self._host.report)

    async def _look_at_large(self) -> None:
        while self._too_large:
            asked, self._too_large = [*self._too_large.items()], {}
            try:
                for ended in await self._ended_unseen(asked, self._store.look_up):
                    self._end_as_found(*ended)
            except BeeQueueError as error:
                self._host.report(error)

    # --- closing -----------------------------------------------------------------------------------------------------

    async def stop_looking(self) -> None:
        """Stops asking Redis: from now on only events end a job."""
        self._guard.complaints.close()
        self._stopped, self._must_sweep = True, False
        for looking in (self._looking, self._looking_at_large, self._sweeping):
            if looking is not None:
                looking.cancel()
                await asyncio.wait((looking,))

    def close(self) -> None:
        """Ends every wait for a result with `QueueClosed`."""
        for job in {*self.jobs.values(), *self._awaited}:
            if job.last_event is None:
                job.end(Event(job.id or "", "closed", QueueClosed()))


def _is_entry_of(job: Job, found: Found) -> bool:
    """Whether the entry found under a job's id is the job's own."""
    return is_same_job(stamp_of(job.created_at), found.timestamp)
