"""The threads of a worker whose handler is a plain function.

A time-out ends a job, not its thread, so there are more threads than slots. When all the extra threads hang, each further
thread that hangs keeps its slot until it returns. So a handler always finds a free thread; its time-out begins with its call.

When the system refuses a thread, no job fails: the call waits until a thread is free or can start. The threads are daemons,
because a thread that waits for a call must not keep the process alive. A process that ends waits for the handlers that run
(unless it ends by `os._exit`), and calls none after that.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from beequeue.job import Job
from beequeue.worker.attempt import Handler, in_thread, name_of

log = logging.getLogger("beequeue")

MORE_THREADS = 100
"""Threads beyond the concurrency."""
RETRY_S = 1.0
"""How often the worker tries again to start a thread that the system refused."""


class Call(Future[Any]):
    """A call of a handler. `late` is set when it waits for a thread, and completes when a thread takes it."""

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__()
        self.handler = handler
        self.job = job
        self.late: Future[None] | None = None


class Pool:
    """Threads that make calls; it starts one for each call that finds none free. It does not know loops or jobs."""

    def __init__(self) -> None:
        self.short = False
        """Whether the system refused the last thread."""
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0
        """The number of threads without a call, less the number of calls without a thread."""
        self._threads: list[threading.Thread] = []
        self._ended = False
        _pools.add(self)

    def submit(self, call: Call) -> None:
        """Has a thread make the call: at once, or when one is free if `late` is set."""
        with self._lock:
            self._free -= 1
            if self._free < 0 and not self._start():
                call.late = Future()
        self._calls.put(call)

    def start_missing(self) -> None:
        """Tries to start threads for the calls that have none."""
        with self._lock:
            while self._free < 0 and self._start():
                pass

    def _start(self) -> bool:
        if self._ended:
            return False
        thread = threading.Thread(target=self._work, name=f"beequeue handler_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self.short = True
            return False
        self.short = False
        self._free += 1
        self._threads.append(thread)
        return True

    def end(self) -> None:
        """Starts no more threads, and ends each one that has no call; calls under way continue."""
        with self._lock:
            self._ended = True
            for _ in self._threads:
                self._calls.put(None)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    # --- in a thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._make(call)
            del call  # which refers to the job and its result

    def _make(self, call: Call) -> None:
        result = error = None
        if is_wanted := call.set_running_or_notify_cancel():
            if call.late is not None:
                call.late.set_result(None)
            try:
                result = in_thread(call.handler, call.job)
            except BaseException as raised:
                error = raised
        with self._lock:  # before the loop gets the result, and submits the next call
            self._free += 1
        try:
            if error is not None:
                call.set_exception(error)
            elif is_wanted:
                call.set_result(result)
        finally:
            error = None  # its traceback refers to this frame


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _at_exit() -> None:
    pools = list(_pools)
    for pool in pools:
        pool.end()
    for pool in pools:
        pool.join()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # their threads belong to the parent


class Threads:
    """Calls `handler` for `slots` jobs at once. Calls `give_slot` when a thread that kept its slot has returned."""

    def __init__(self, queue: str, handler: Handler, slots: int, give_slot: Callable[[], None]) -> None:
        self._queue = queue
        self._handler = handler
        self._give_slot = give_slot
        self._count = slots + MORE_THREADS
        self._spare = MORE_THREADS
        self._pool = Pool()
        weakref.finalize(self, self._pool.end).atexit = False
        self._loop = asyncio.get_running_loop()
        self._hanging = 0
        self._all_hang = False
        self._is_short = False

    def call(self, job: Job) -> Call:
        """Calls the handler in a thread. A call that is `late` has not begun: see `wait_for_thread`."""
        call = Call(self._handler, job)
        self._pool.submit(call)
        if self._is_short and not self._pool.short:
            self._is_short = False
            log.warning("queue %s: the system allows threads for its handler again", self._queue)
        return call

    async def wait_for_thread(self, call: Call) -> None:
        """Waits until a thread takes a call that is late."""
        assert call.late is not None
        if self._pool.short and not self._is_short:
            self._is_short = True
            name = name_of(self._handler)
            log.warning("queue %s: the system allows no more threads: calls of the handler %s wait for one", self._queue, name)
        begun = asyncio.wrap_future(call.late)
        try:
            while not begun.done():
                await asyncio.wait((begun,), timeout=RETRY_S)
                self._pool.start_missing()
        except asyncio.CancelledError:
            call.cancel()
            raise

    def hangs(self, call: Future[Any]) -> bool:
        """Counts a call that runs on after the end of its job; returns whether it keeps its slot."""
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
        """Tells the loop; called in the thread."""
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
        """Starts no more calls; calls under way continue."""
        self._pool.end()
