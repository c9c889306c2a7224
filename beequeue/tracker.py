"""The jobs of this process that wait for their own events: bound, told, forgotten.

Owns the registry and the way of an event from the message to the job. Knows nothing of connections: whoever reads messages
calls `read` for each and `hand_on` at the end of a read; whoever has reconnected calls `settle_unseen`.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from beequeue.errors import JobFailed, QueueClosed, UnreadableData
from beequeue.events import Event, Registry
from beequeue.job import Job
from beequeue.link import Link
from beequeue.store import Store

LOOK_UP_AT_ONCE = 100
"""How many jobs are asked about in one call of a script."""


class Host(Protocol):
    """What the tracker asks of its queue."""

    def emit(self, event: str, *args: Any) -> bool: ...
    def report(self, error: Exception) -> None: ...


class Tracker:
    """Which job an event belongs to, for one queue."""

    def __init__(self, host: Host) -> None:
        self.jobs: Registry[Job] = Registry()
        self.unknown_outcomes = 0
        self._host = host
        self._read: list[Event] = []

    def bind(self, job: Job) -> None:
        """From now on `job` receives the events of its id."""
        older = self.jobs.bind(job)
        if older is not None:
            self._lose(older, "its id has been given to another job")

    def read(self, payload: bytes) -> None:
        """A message of the channel `events`, in the step that parses it; what is unreadable is reported."""
        try:
            self._read.append(Event.decode(payload))
        except UnreadableData as error:
            self._host.report(error)

    def hand_on(self) -> None:
        """Delivers what was read in one later step: after the code that waited for a save's reply in the same read."""
        if self._read:
            events, self._read = self._read, []
            asyncio.get_running_loop().call_soon(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            self._host.emit("job " + event.name, event.id, event.data)
            self.jobs.deliver(event)

    async def settle_unseen(self, link: Link, store: Store) -> None:
        """After a reconnect: settles the jobs that ended while no message could come (pub/sub has no replay).

        Asks on `link`, which is subscribed already: an event that still comes is delivered before the answer is handled.
        """
        tracked = list(self.jobs.items())
        for start in range(0, len(tracked), LOOK_UP_AT_ONCE):
            chunk = tracked[start : start + LOOK_UP_AT_ONCE]
            found = await store.look_up(link, [job_id for job_id, _ in chunk])
            for (job_id, job), (state, timestamp, trace) in zip(chunk, found, strict=True):
                same = timestamp == str(job.options["timestamp"])
                if self.jobs.get(job_id) is not job or (state == "open" and same):
                    continue
                del self.jobs[job_id]
                if state == "failed" and same:
                    job.receive(Event(job_id, "failed", JobFailed(_summary(trace))))
                elif state == "succeeded" and same:
                    self._lose(job, "it succeeded while the connection was down, and results are not stored")
                else:
                    self._lose(job, "its entry was gone when the connection came back")

    def close(self) -> None:
        """Ends every wait for a result with `QueueClosed`."""
        for job_id, job in self.jobs.items():
            job.end(Event(job_id, "closed", QueueClosed()))

    def _lose(self, job: Job, reason: str) -> None:
        self.unknown_outcomes += 1
        job.lose(reason)


def _summary(trace: str) -> str:
    """The line of a stack trace that has the message: Python's last, Node's first."""
    lines = trace.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback ") else 0]
