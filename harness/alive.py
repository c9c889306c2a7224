"""Keeps a fixed number of jobs alive, even when jobs fail or vanish.

A job is alive while it is being saved, or is saved and has not ended: alive = saving + saved - ended. A job that ends makes
room for the next one. So does a job that is lost: its save failed, or its end never came.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from beequeue import BeeQueueError, ConnectionLost, linear_backoff

MAYBE_SAVED_S = 5
"""How long a save that may have been applied waits for its job's end."""
GIVE_UP_S = 30
"""A saved job that has not ended after this time counts as vanished. The time covers two stall checks."""
WIND_DOWN_S = 2
"""How long the jobs under way may take to end when the program stops."""

log = logging.getLogger("harness")


class Alive:
    """Calls `save` for each job that is missing from `size`; `save` returns the id of the job that it saved."""

    def __init__(self, size: int, save: Callable[[], Awaitable[str | None]]) -> None:
        self.restarted = 0
        """How many jobs were lost and replaced."""
        self._size = size
        self._save = save
        self._stopping = False
        self._failures = 0  # of saves, in a row
        self._vanished_jobs = 0  # not yet reported
        self._saving: set[asyncio.Task[None]] = set()
        self._saved: dict[str | None, float] = {}  # id -> when; saved and not ended
        self._early: set[str | None] = set()  # ended before the reply to their save was handled: the race

    @property
    def count(self) -> int:
        """How many jobs are alive."""
        return len(self._saving) + len(self._saved) - len(self._early)

    def fill(self) -> None:
        """Starts the jobs that are missing."""
        while self.count < self._size and not self._stopping:
            self._saving.add(asyncio.create_task(self._start()))

    def ended(self, job_id: str) -> None:
        """A job has ended, as the queue's own event reports."""
        if self._saved.pop(job_id, None) is None:
            self._early.add(job_id)
        self.fill()

    def vanished(self, job_id: str | None, error: object = None) -> None:
        """Starts a job in place of one whose end nobody will report; a listener for a job's `unknown`."""
        if self._saved.pop(job_id, None) is not None:
            self._vanished_jobs += 1
            self.restarted += 1
            self.fill()

    def give_up_vanished(self) -> None:
        """Replaces the jobs that should have ended long ago: Redis, or a message, was lost."""
        horizon = time.monotonic() - GIVE_UP_S
        for job_id in [job_id for job_id, saved_at in self._saved.items() if saved_at < horizon]:
            self.vanished(job_id)
        if self._vanished_jobs:
            log.warning("client: %d jobs had vanished or ended unseen; their chains were restarted", self._vanished_jobs)
            self._vanished_jobs = 0

    async def wind_down(self) -> None:
        """Starts no more jobs, and waits a moment for those under way."""
        self._stopping = True
        deadline = time.monotonic() + WIND_DOWN_S
        while self.count and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _start(self) -> None:
        try:
            job_id = await self._save()
        except BeeQueueError as error:
            await self._save_failed(error)
        else:
            if self._failures:
                log.info("client: saves work again")
            self._failures = 0
            if job_id in self._early:
                self._early.remove(job_id)
            else:
                self._saved[job_id] = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        self._saving.discard(task)
        if not self._saving:
            self._early.clear()  # ends of jobs that were given up: no save is left that could claim them
        self.fill()

    async def _save_failed(self, error: BeeQueueError) -> None:
        """Waits until the chain may restart; a save that may have been applied waits for its job's end."""
        self._failures += 1
        if self._failures == 1:
            log.warning("client: a save failed: %s", error)
        if isinstance(error, ConnectionLost) and error.maybe_applied:
            await asyncio.sleep(MAYBE_SAVED_S)
            if self._early:
                self._early.pop()  # it was applied, and its end has started the next job
                return
        else:
            await asyncio.sleep(linear_backoff(self._failures) / 1000)
        self.restarted += 1
