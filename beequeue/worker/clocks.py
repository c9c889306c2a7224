"""The two clocks: one raises delayed jobs when they are due, the other recovers the jobs of silent workers.

They decide when to ask; the scripts of the store do the work. A clock reports an error and continues, unless the connection was
closed, as its owner can do with a shared one. Both run under `supervised`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial

from beequeue.errors import BeeQueueError, JobStalled, QueueClosed, UnreadableData
from beequeue.host import Host
from beequeue.job import Job, now_ms
from beequeue.store.store import Store, Taken
from beequeue.tasks import supervised
from beequeue.worker.outcome import fail_for_good, fail_unread

RETRY_S = 1.0
"""How long the clock of delayed jobs waits after an error before it asks again."""


class EagerTimer:
    """Calls `trigger` at the earliest time it was given, but no later than `max_delay_ms` after the last call.

    Times are epoch ms of `clock`. None, NaN and negative times mean "as late as allowed".
    """

    def __init__(
        self,
        max_delay_ms: int,
        trigger: Callable[[], None],
        *,
        clock: Callable[[], float] = now_ms,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] | None = None,
    ) -> None:
        if isinstance(max_delay_ms, bool) or not isinstance(max_delay_ms, int) or max_delay_ms <= 0:
            raise ValueError(f"maximum delay must be a positive integer, not {max_delay_ms!r}")
        self._max_delay_ms = max_delay_ms
        self._trigger = trigger
        self._clock = clock
        self._call_later = call_later or asyncio.get_running_loop().call_later
        self._handle: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._stopped = False

    def schedule(self, when: float | None) -> None:
        """Triggers at `when`, unless an earlier time is scheduled; at once when `when` has passed."""
        if self._stopped:
            return
        now = self._clock()
        latest = now + self._max_delay_ms
        if when is None or math.isnan(when) or when < 0:
            when = latest
        if when <= now:
            self._arm(latest)
            self._trigger()
        elif self._handle is None or min(when, latest) < self._due:
            self._arm(min(when, latest))

    def stop(self) -> None:
        """Ends the timer: it never triggers again."""
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = due
        self._handle = self._call_later(max(0.0, due - self._clock()) / 1000, self._fire)

    def _fire(self) -> None:
        self._handle = None
        # a timer may fire early, and the clock may have been set back: wait for the rest, but never longer than allowed
        if self._due > self._clock():
            self._arm(min(self._due, self._clock() + self._max_delay_ms))
            return
        self._arm(self._clock() + self._max_delay_ms)
        self._trigger()


class DelayedActivator:
    """Raises delayed jobs when they are due (`raised jobs`, count), one call of the script at a time."""

    def __init__(self, store: Store, host: Host) -> None:
        self._store = store
        self._host = host
        self._wanted = asyncio.Event()
        self._timer = EagerTimer(host.settings.near_term_window, self._wanted.set)
        self._task = supervised(self._activate_when_wanted, "delayed jobs", host.report)

    def look_at(self, when: float | None) -> None:
        """A job is due at `when` (epoch ms): looks then, at the latest."""
        self._timer.schedule(when)

    def look_now(self) -> None:
        """Looks at once, for jobs that became due while nobody looked."""
        self._wanted.set()

    async def close(self) -> None:
        """Stops looking."""
        self._timer.stop()
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def _activate_when_wanted(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                raised, look_again = await self._store.raise_delayed(now_ms(), self._host.settings.delayed_debounce)
            except BeeQueueError as error:
                self._host.report(error)
                if isinstance(error, QueueClosed):
                    return
                self._timer.schedule(now_ms() + RETRY_S * 1000)
                continue
            except Exception:
                self._wanted.set()  # for the task that starts again
                raise
            if raised:
                self._host.emit("raised jobs", raised)
            self._timer.schedule(look_again)


class StallChecker:
    """Recovers the jobs of silent workers (`stalled`, id), once or repeatedly.

    A job that has stalled more than `max_stalls` times fails instead (`failed` and `failed:fatal`, job, error).
    """

    def __init__(self, store: Store, host: Host) -> None:
        self._store = store
        self._host = host
        self._settings = host.settings
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def check(self) -> int:
        """Checks once; returns how many jobs were recovered. Raises the error that Redis answered."""
        settings = self._settings
        recovered, refused = 0, None
        async for stalled, too_often in self._store.check_stalled(settings.stall_interval, settings.max_stalls):
            for job_id in stalled:
                self._host.emit("stalled", job_id)
            recovered += len(stalled)
            try:
                for taken in too_often if refused is None else ():
                    await self._fail(taken)
            except BeeQueueError as error:  # the other jobs are still recovered
                refused = error
        if refused is not None:
            raise refused
        return recovered

    async def _fail(self, taken: Taken) -> None:
        """Settles a job that has stalled too often, unless it has ended since. If this fails, the next check does it."""
        job, limit = None, self._settings.max_stalls
        error = JobStalled(f"job {taken.id} stalled more than {limit} time{'' if limit == 1 else 's'}")
        try:
            job = Job.decode(self._host.queue, taken.id, taken.entry)
            settlement = fail_for_good(job, taken.entry, error, self._settings)
        except UnreadableData as unreadable:
            self._host.report(unreadable)
            settlement = fail_unread(taken.entry)
        if await self._store.settle_stalled(taken, settlement) and job is not None:
            self._host.emit("failed", job, error)
            self._host.emit("failed:fatal", job, error)

    async def check_and_repeat(self, interval_ms: int) -> int:
        """Checks now, and from now on `interval_ms` after each check, in place of any earlier interval; raises like `check`."""
        if self._task is not None:
            self._task.cancel()
        try:
            return await self.check()
        finally:
            self.repeat(interval_ms)

    def repeat(self, interval_ms: int) -> None:
        """Checks repeatedly from now on, `interval_ms` after each check."""
        if self._closed:
            return
        if self._task is not None:
            self._task.cancel()
        self._task = supervised(partial(self._check_repeatedly, interval_ms), "stall check", self._host.report)

    @property
    def repeats(self) -> bool:
        """Whether it checks repeatedly."""
        return self._task is not None

    async def close(self) -> None:
        """Stops checking repeatedly, and never starts again."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _check_repeatedly(self, interval_ms: int) -> None:
        while True:
            await asyncio.sleep(interval_ms / 1000)
            try:
                await self.check()
            except BeeQueueError as error:
                self._host.report(error)
                if isinstance(error, QueueClosed):
                    return
