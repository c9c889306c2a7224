"""Background tasks that live as long as their owner, none of which ends unnoticed.

A connection's keeper, the heartbeat, the clocks and the look-ups run under `supervised`. It reports an unexpected error with
its traceback and starts the work again after a pause. It knows nothing about the work itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from beequeue.errors import BeeQueueError, TaskFailed

log = logging.getLogger("beequeue")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
"""The pause before failed work starts again; doubles with each failure in a row."""
CALM_S = 60.0
"""A failure after this long counts as the first in a row."""


def supervised(work: Callable[[], Awaitable[None]], name: str, report: Callable[[BeeQueueError], None]) -> asyncio.Task[None]:
    """Starts a task that calls `work` until it returns; cancelling the task ends it.

    When `work` raises, `report` receives a `TaskFailed` that names the task and has the error as its cause. Then `work` is
    called again, after 1 s at first and 15 s at most. `report` runs in the task; an exception of its own is only logged.
    """
    return asyncio.get_running_loop().create_task(_run(work, name, report), name=f"beequeue {name}")


async def _run(work: Callable[[], Awaitable[None]], name: str, report: Callable[[BeeQueueError], None]) -> None:
    pause_s = FIRST_PAUSE_S
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    while True:
        began_at = loop.time()
        try:
            return await work()
        except (Exception, asyncio.CancelledError) as error:
            if task.cancelling():
                raise
            if loop.time() - began_at >= CALM_S:
                pause_s = FIRST_PAUSE_S
            failure = TaskFailed(f"{name}: {type(error).__name__}: {error}; starting again in {pause_s:g} s")
            failure.__cause__ = error
        try:
            report(failure)
        except Exception:
            log.exception("%s: its failure could not be reported", name)
        del failure  # its cause's traceback refers to this frame
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class Calls:
    """Counts the calls under way: put `with calls:` around a wait for an answer."""

    __slots__ = ("_over", "count")

    def __init__(self) -> None:
        self.count = 0
        self._over: asyncio.Future[None] | None = None

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if self._over is not None and not self.count and not self._over.done():
            self._over.set_result(None)

    def over(self) -> asyncio.Future[None]:
        """A future that completes when no call is under way; for one caller at a time."""
        self._over = asyncio.get_running_loop().create_future()
        if not self.count:
            self._over.set_result(None)
        return self._over
