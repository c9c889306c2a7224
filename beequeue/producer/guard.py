"""The guard against floods of messages: any process that shares the Redis may publish on a queue's channel `events`.

It bounds the cost that a stranger can cause. A large message is decoded only if it names a tracked job, or an event that has a
listener. A message beyond `max_event_bytes` is never decoded, since that can take thirty times its size. Few errors are
reported at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from beequeue.errors import UnreadableData
from beequeue.events import ENDS, peek
from beequeue.host import Host
from beequeue.job import Job

LARGE_BYTES = 65_536
"""From this size on the guard looks at a message before it is decoded; below, the look would cost more than it saves."""
REPORTS_A_PERIOD = 20
"""How many unreadable messages are reported one by one in each period of `PERIOD_S`; the others are counted."""
PERIOD_S = 10.0


class Guard:
    """Decides which large messages a queue decodes, and reports those that are too large.

    `jobs` are the tracked jobs by id. `look_up` gets a tracked job and its id when a message that is too large reports its end.
    Redis then says whether the job has ended, so it does not matter who sent the message.
    """

    def __init__(self, host: Host, jobs: Mapping[str, Job], look_up: Callable[[Job, str], None]) -> None:
        self.complaints = Complaints(host.report)
        self._listens_to = host.listens_to
        self._ordered = host.settings.ordered
        self._max_event_bytes = host.settings.max_event_bytes
        self._jobs = jobs
        self._look_up = look_up

    def admits(self, payload: bytes) -> bool:
        """Whether to decode a message of at least `LARGE_BYTES`; reports one that is too large."""
        head = peek(payload)
        job = None if head is None else self._jobs.get(head[0])
        # with two sockets the job may still be bound before the event is delivered
        if head is not None and job is None and self._ordered and not self._listens_to("job " + head[1]):
            return False
        if len(payload) <= self._max_event_bytes:
            return True
        limit = f"max_event_bytes is {self._max_event_bytes:,}"
        self.complaints.add(UnreadableData(f"a message of {len(payload):,} bytes is too large, {limit}: {payload[:200]!r}"))
        if head is not None and job is not None and head[1] in ENDS:
            self._look_up(job, head[0])
        return False


class Complaints:
    """Reports the first errors of each period and counts the others: a stranger can cause them by the million."""

    def __init__(self, report: Callable[[Exception], None]) -> None:
        self._report = report
        self._reported = 0
        self._counted = 0
        self._period: asyncio.TimerHandle | None = None

    def add(self, error: Exception) -> None:
        """Reports an error, or counts it when this period has had its `REPORTS_A_PERIOD`."""
        if self._period is None:
            self._period = asyncio.get_running_loop().call_later(PERIOD_S, self._end_period)
        if self._reported < REPORTS_A_PERIOD:
            self._reported += 1
            self._report(error)
        else:
            self._counted += 1

    def _end_period(self) -> None:
        self._period = None
        self._reported = 0
        if self._counted:
            counted, self._counted = self._counted, 0
            within = f"within {PERIOD_S:g} s could not be read, and are not reported one by one"
            self.add(UnreadableData(f"{counted:,} more messages on the events channel {within}"))

    def close(self) -> None:
        """Ends the period; errors counted so far are not reported."""
        if self._period is not None:
            self._period.cancel()
