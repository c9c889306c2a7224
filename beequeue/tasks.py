"""Tasks that live as long as their owner: none of them ends without a word.

A connection's keeper, the heartbeat, the clocks and the look-ups run under `supervised`. An error that their own code does not
expect is reported, with its traceback, and the work begins anew after a pause. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from beequeue.errors import BeeQueueError, TaskFailed

log = logging.getLogger("beequeue")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
"""How long work that has failed waits before it begins anew; doubles with each failure in a row."""
CALM_S = 60.0
"""Work that has run so long has not failed in a row."""


def supervised(work: Callable[[], Awaitable[None]], name: str, report: Callable[[BeeQueueError], None]) -> asyncio.Task[None]:
    """Starts a task that calls `work` until it returns; cancelling the task ends it.

    What `work` raises goes to `report` as `TaskFailed`, which names the task and has the error as its cause; then `work` is
    called again, after 1 s and at most 15 s. `report` runs in the task and may raise: that is logged, and ends nothing.
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
        _tell(partial(report, failure), name)
        del failure  # which has this frame in its traceback
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _tell(report: Callable[[], None], name: str) -> None:
    try:
        report()
    except Exception:
        log.exception("%s: its failure could not be reported", name)


class Calls:
    """Counts the calls that are under way: `with calls:` around what waits for an answer."""

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
        """Completes when no call is under way; for one caller."""
        self._over = asyncio.get_running_loop().create_future()
        if not self.count:
            self._over.set_result(None)
        return self._over
