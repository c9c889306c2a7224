"""The jobs of this process that wait for their own events: bound, told, forgotten.

Owns the registry and the way of an event from the message to the job. Knows nothing of connections: whoever reads messages
calls `read` for each and `hand_on` at the end of a read; whoever has reconnected calls `settle_unseen`. It also asks, every
few seconds, about the jobs whose result somebody waits for, since no message tells of a job that was removed, or that ran
on a worker which sends none.

A stranger may publish, too. What costs memory or time is bounded: a large message is not decoded unless it is about a job that
is tracked or somebody listens to such events, one beyond `max_event_bytes` never is, and few errors are reported at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from beequeue.errors import BeeQueueError, JobFailed, OutcomeUnknown, QueueClosed, UnreadableData
from beequeue.events import ENDS, Event, Registry, peek
from beequeue.host import Host
from beequeue.job import Job, is_same_job, stamp_of
from beequeue.settings import MAX_EVENT_BYTES
from beequeue.store.store import Found
from beequeue.tasks import supervised

LOOK_UP_AT_ONCE = 100
"""How many jobs are asked about in one call of a script."""
LOOK_EVERY_S = 5.0
"""How often the jobs whose result somebody waits for are asked about."""
SWEEP_EVERY_S = 5.0
"""How long a job has been bound, at least, when it is looked for, and how long a sweep waits before the next."""
SWEEP_PAUSE_S = 0.02
"""How long a sweep rests after a call that found few ended jobs; and nine times as long as that call took."""
LARGE_BYTES = 65_536
"""From this size on a message is looked at before it is decoded; below, that would cost more than it saves."""
REPORTS_AT_ONCE = 20
"""How many messages that cannot be read are reported one by one in each `REPORT_EVERY_S`; the others are counted."""
REPORT_EVERY_S = 10.0

LookUp = Callable[[Sequence[str]], Awaitable[list[Found]]]
"""From ids to what has become of them; the answer must not overtake a message on a queue that is ordered."""
WhichEnded = Callable[[Sequence[tuple[str, str]]], Awaitable[set[str]]]
"""From ids and timestamps of jobs to the ids of those that have ended, or are other jobs' now; ordered likewise."""


class Tracker:
    """Which job an event belongs to, for one queue. `look_up` and `which_ended` are to be set before anything is asked."""

    look_up: LookUp
    which_ended: WhichEnded

    def __init__(self, host: Host, *, ordered: bool, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.jobs: Registry[Job] = Registry()
        self.unknown_outcomes = 0
        self._host = host
        self._ordered = ordered
        self._read: list[tuple[Event, Job | None, int]] = []
        self._awaited: dict[Job, int] = {}
        self._looking: asyncio.Task[None] | None = None
        self._max_event_bytes = max_event_bytes
        self._unread = Complaints(host._report)
        self._too_large: dict[Job, str] = {}
        self._looking_at_large: asyncio.Task[None] | None = None
        self._asked: list[set[str]] = []
        """What each look-up under way has asked about, less what has been retried since."""
        self._sweeping: asyncio.Task[None] | None = None
        self._must_sweep = ordered
        """Whether the next job that is bound has to start a sweep."""
        self._stopped = False

    # --- events ------------------------------------------------------------------------------------------------------

    def bind(self, job: Job) -> None:
        """From now on `job` receives the events of its id."""
        assert job.id is not None
        older = self.jobs.bind(job)
        job.bound += 1
        job.last_event = None
        if older is not None and not self.is_ending(job.id):
            self._lose(older, job.id, "its id has been given to another job")
        if self._must_sweep:
            self._must_sweep = False
            self._sweeping = supervised(self._sweep, "sweep", self._host._report)

    def read(self, payload: bytes) -> None:
        """A message of the channel `events`, in the step that parses it; what is unreadable is reported."""
        if len(payload) >= LARGE_BYTES and not self._is_worth_decoding(payload):
            return
        try:
            event = Event.decode(payload)
        except UnreadableData as error:
            self._unread.add(error.with_traceback(None))  # whose frames have the whole message
            return
        # on one socket the step that reads it decides; on two, as in bee-queue, the step that tells it
        job = self.jobs.get(event.id) if self._ordered else None
        self._read.append((event, job, 0 if job is None else job.bound))

    def _is_worth_decoding(self, payload: bytes) -> bool:
        """False for a message that concerns nobody here, and for one that is too large, which is reported."""
        head = peek(payload)
        job = None
        if head is not None:
            job = self.jobs.get(head[0])
            # on two sockets the job may be bound before the event is told
            if job is None and self._ordered and not self._host._listens_to("job " + head[1]):
                return False
        if len(payload) <= self._max_event_bytes:
            return True
        limit = f"max_event_bytes is {self._max_event_bytes:,}"
        self._unread.add(UnreadableData(f"a message of {len(payload):,} bytes is too large, {limit}: {payload[:200]!r}"))
        if head is not None and job is not None and head[1] in ENDS:
            # whoever sent it: Redis knows whether the job has ended
            self._too_large[job] = head[0]
            if not self._stopped and (self._looking_at_large is None or self._looking_at_large.done()):
                self._looking_at_large = supervised(self._look_at_large, "large results", self._host._report)
        return False

    async def _look_at_large(self) -> None:
        while self._too_large:
            asked, self._too_large = [*self._too_large.items()], {}
            try:
                ended = await self._ended_unseen(asked, self.look_up)
            except BeeQueueError as error:
                self._host._report(error)
                continue
            for job, job_id, found in ended:
                self._settle(job, job_id, found)

    def hand_on(self) -> None:
        """Delivers what was read in one later step: after the code that waited for a save's reply in the same read."""
        if self._read:
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        read, self._read = self._read, []
        read.reverse()
        try:
            while read:
                self._deliver_one(*read.pop())
        finally:
            if read:  # a listener ends the program, or tries to: the others hear of theirs all the same
                self._read[:0] = reversed(read)
                self.hand_on()

    def _deliver_one(self, event: Event, job: Job | None, bound: int) -> None:
        self._host.emit("job " + event.name, event.id, event.data)
        if not self._ordered:
            job = self.jobs.get(event.id)
            bound = 0 if job is None else job.bound
        if job is None:
            return
        if job.bound == bound:
            self.jobs.deliver(event, job)
        else:  # it has been bound anew since, for a retry: an end that belongs to the run before
            job.emit(event.name, event.data)

    def forget(self, job_id: str, reason: str) -> None:
        """Settles the job that is bound to an id as `OutcomeUnknown`, unless its end has been read already."""
        job = self.jobs.get(job_id)
        if job is not None and not self.is_ending(job_id):
            del self.jobs[job_id]
            # told in a later step, as events are: this one may be parsing a reply
            asyncio.get_running_loop().call_soon(self._lose, job, job_id, reason)

    def unbind(self, job: Job, job_id: str) -> None:
        """Takes back a binding that was made too early."""
        if self.jobs.get(job_id) is job:
            del self.jobs[job_id]

    def retried(self, job_id: str) -> None:
        """A retry has been answered: whatever a look-up that was asked before finds is about the run before."""
        for asked in self._asked:
            asked.discard(job_id)

    def is_ending(self, job_id: str) -> bool:
        """Whether the last event of a job has been read and not yet delivered."""
        return any(event.id == job_id and event.name in ENDS for event, _, _ in self._read)

    # --- what no event told ------------------------------------------------------------------------------------------

    async def settle_unseen(self, look_up: LookUp) -> None:
        """After a reconnect: settles the jobs that ended while no message could come (pub/sub has no replay).

        `look_up` must ask on the link that is subscribed anew already.
        """
        for job, job_id, found in await self._ended_unseen([(job, job_id) for job_id, job in self.jobs.items()], look_up):
            self._settle(job, job_id, found)

    async def _ended_unseen(self, jobs: Sequence[tuple[Job, str]], look_up: LookUp) -> list[tuple[Job, str, Found]]:
        """Those of `jobs` that have ended, as far as Redis knows, while no event has told so."""
        ended = []
        asked = {job_id for _, job_id in jobs}
        self._asked.append(asked)
        try:
            for start in range(0, len(jobs), LOOK_UP_AT_ONCE):
                chunk = jobs[start : start + LOOK_UP_AT_ONCE]
                for (job, job_id), found in zip(chunk, await look_up([job_id for _, job_id in chunk]), strict=True):
                    if found.state != "open" or not _is_entry_of(job, found):
                        ended.append((job, job_id, found))
        finally:
            self._asked = [each for each in self._asked if each is not asked]
        return [each for each in ended if each[1] in asked and each[0].last_event is None and not self.is_ending(each[1])]

    async def _sweep(self) -> None:
        """Asks about the jobs that have been bound for a while, as long as any is; lets those go that have ended."""
        while self.jobs:
            job_ids = [*self.jobs]
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                for start in range(0, len(job_ids), LOOK_UP_AT_ONCE):
                    await asyncio.sleep(await self._let_go(job_ids[start : start + LOOK_UP_AT_ONCE]))
            except BeeQueueError as error:
                self._host._report(error)
        self._must_sweep = True

    async def _let_go(self, job_ids: Sequence[str]) -> float:
        """Settles those of some jobs that have ended; returns how long to rest, s."""
        bound = [(job, job_id) for job_id in job_ids if (job := self.jobs.get(job_id)) is not None]
        if not bound:
            return 0.0
        now = asyncio.get_running_loop().time
        began_at = now()
        which = await self.which_ended([(job_id, stamp_of(job.created_at)) for job, job_id in bound])
        rest_s = max(SWEEP_PAUSE_S, 9 * (now() - began_at))
        suspects = [each for each in bound if each[1] in which]
        for job, job_id, found in await self._ended_unseen(suspects, self.look_up):
            if self.jobs.get(job_id) is job:
                self._settle(job, job_id, found)
        # where most have ended, as without events, a sweep must not be slower than those who save
        return 0.0 if 2 * len(suspects) > len(bound) else rest_s

    def _settle(self, job: Job, job_id: str, found: Found) -> None:
        if self.jobs.get(job_id) is job:
            del self.jobs[job_id]
        if found.state == "failed" and _is_entry_of(job, found):
            job.receive(Event(job_id, "failed", JobFailed(summary(found.trace))))
        elif found.state == "succeeded" and _is_entry_of(job, found):
            self._lose(job, job_id, "it succeeded, but no event told its result, and results are not stored")
        else:
            self._lose(job, job_id, "it is gone, and no event told of its end")

    # --- results -----------------------------------------------------------------------------------------------------

    async def end_of(self, job: Job) -> Event:
        """Waits for the last event of a job; asks every `LOOK_EVERY_S` whether it has ended without one."""
        if job.last_event is not None:
            return job.last_event
        if job.ended is None:
            job.ended = asyncio.get_running_loop().create_future()
        self._awaited[job] = self._awaited.get(job, 0) + 1
        if not self._stopped and (self._looking is None or self._looking.done()):
            self._looking = supervised(self._look_regularly, "results", self._host._report)
        try:
            return await asyncio.shield(job.ended)
        finally:
            self._awaited[job] -= 1
            if not self._awaited[job]:
                del self._awaited[job]
                job.ended = None

    async def _look_regularly(self) -> None:
        suspects: set[Job] = set()
        while self._awaited:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                ended = await self._ended_unseen([(job, job.id or "") for job in self._awaited], self.look_up)
            except BeeQueueError as error:
                self._host._report(error)
                continue
            for job, job_id, found in ended:
                # on two sockets the answer may have overtaken the event: that has until the next look
                if self._ordered or job in suspects:
                    self._settle(job, job_id, found)
            suspects = {job for job, _, _ in ended}

    # --- the end -----------------------------------------------------------------------------------------------------

    async def stop_looking(self) -> None:
        """From now on only events settle a job."""
        self._unread.close()
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

    def _lose(self, job: Job, job_id: str, reason: str) -> None:
        self.unknown_outcomes += 1
        job.receive(Event(job_id, "unknown", OutcomeUnknown(f"job {job_id}: {reason}")))


class Complaints:
    """Errors about messages, which a stranger can cause by the million: some are reported, the others counted."""

    def __init__(self, report: Callable[[Exception], None]) -> None:
        self._report = report
        self._reported = 0
        self._counted = 0
        self._period: asyncio.TimerHandle | None = None

    def add(self, error: Exception) -> None:
        """Reports an error, if not too many have been within the last `REPORT_EVERY_S`."""
        if self._period is None:
            self._period = asyncio.get_running_loop().call_later(REPORT_EVERY_S, self._end_period)
            self._reported = 0
        if self._reported < REPORTS_AT_ONCE:
            self._reported += 1
            self._report(error)
        else:
            self._counted += 1

    def _end_period(self) -> None:
        self._period = None
        if self._counted:
            counted, self._counted = self._counted, 0
            within = f"within {REPORT_EVERY_S:g} s could not be read, and are not reported one by one"
            self.add(UnreadableData(f"{counted:,} more messages on the events channel {within}"))

    def close(self) -> None:
        """From now on nothing that was counted is told."""
        if self._period is not None:
            self._period.cancel()


def _is_entry_of(job: Job, found: Found) -> bool:
    """Whether what was found is this job, and not another one that has been given its id since."""
    return is_same_job(stamp_of(job.created_at), found.timestamp)


def summary(trace: str) -> str:
    """The line of a stack trace that has the message: Python's last, Node's first."""
    lines = trace.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback ") else 0]
