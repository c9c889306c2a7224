"""The threads of a worker whose handler is a plain function.

A time-out ends a job, not its thread, so there are more threads than slots. Once all of these hang, each further one keeps its
slot until it returns. A handler therefore always finds a free thread: it is called when its time-out begins, not later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from beequeue.job import Job
from beequeue.run import Handler, in_thread, name_of

log = logging.getLogger("beequeue")

MORE_THREADS = 100
"""Threads beyond the concurrency."""


class Threads:
    """Calls `handler` for `slots` jobs at once; `give_slot` is called when a thread that kept its slot has returned."""

    def __init__(self, queue: str, handler: Handler, slots: int, give_slot: Callable[[], None]) -> None:
        self._queue = queue
        self._handler = handler
        self._give_slot = give_slot
        self._count = slots + MORE_THREADS
        self._spare = MORE_THREADS
        self._pool = ThreadPoolExecutor(self._count, "beequeue handler")
        self._loop = asyncio.get_running_loop()
        self._hanging = 0
        self._all_hang = False

    def call(self, job: Job) -> Future[Any]:
        """Calls the handler."""
        return self._pool.submit(in_thread, self._handler, job)

    def hangs(self, call: Future[Any]) -> bool:
        """Counts a call that goes on after the end of its job; returns whether it keeps the slot."""
        self._hanging += 1
        call.add_done_callback(self._has_returned)
        if self._hanging == self._count:
            self._all_hang = True
            name = name_of(self._handler)
            log.warning(
                "queue %s: %d threads hang in the handler %s past its time-out: the worker takes no job until one returns",
                self._queue,
                self._hanging,
                name,
            )
        return self._hanging > self._spare

    def _has_returned(self, call: Future[Any]) -> None:
        """In the thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._count_down)

    def _count_down(self) -> None:
        self._hanging -= 1
        if self._all_hang:
            self._all_hang = False
            log.warning("queue %s: a thread of its handler has returned: the worker takes jobs again", self._queue)
        if self._hanging >= self._spare:
            self._give_slot()

    def end(self) -> None:
        """Starts no more calls; those under way go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
