"""A queue as its producer and its worker see it: open or closed, in which event loop, and where errors go.

`Queue` owns one `Host` and hands it to its parts, which know nothing else of the queue. The host opens the queue at the first
use, checks each call, counts the calls under way, and owns the queue's tasks. It does not know what opening involves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Set
from typing import Any, Protocol

from beequeue.errors import NotConnected, QueueClosed, TaskFailed, WrongLoop, with_cause
from beequeue.job import Owner
from beequeue.settings import QueueSettings
from beequeue.tasks import Calls
from beequeue.wire.forks import process

log = logging.getLogger("beequeue")


class PublicQueue(Owner, Protocol):
    """The queue that a host belongs to."""

    name: str
    settings: QueueSettings

    def emit(self, event: str, *args: Any) -> bool: ...
    def _listens_to(self, event: str) -> bool: ...


class Host:
    """The inside of one queue. `open` returns the work that connects it; the host calls it once and runs that in a task."""

    def __init__(self, queue: PublicQueue, open: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.queue: Owner = queue
        """The owner of the jobs that the parts decode."""
        self.name = queue.name
        self.settings = queue.settings
        self.emit = queue.emit
        self.listens_to = queue._listens_to
        self.calls = Calls()
        """The calls that wait for Redis."""
        self.opening: asyncio.Task[None] | None = None
        self.is_ready = False
        self.is_closed = False
        self._open = open
        self._opening_is_awaited = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._forks = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- opening ---------------------------------------------------------------------------------------------------------

    def begin_opening(self) -> asyncio.Task[None]:
        """Starts to open the queue in the running loop, unless that has begun; returns the task that opens it."""
        if self.opening is None:
            loop = asyncio.get_running_loop()
            connecting = self._open()
            self._loop = loop
            self._thread = threading.get_ident()
            self._forks = process.forks
            self.opening = self.spawn(connecting, "opening")
        return self.opening

    def open_at_first_use(self) -> asyncio.Task[None]:
        """Like `begin_opening`; raises `NotConnected` when only `connect()` may open the queue and has not been called."""
        if self.opening is None and not self.settings.auto_connect:
            raise NotConnected("the queue is not connected: await connect() first")
        return self.begin_opening()

    async def opened(self) -> None:
        """Waits until the queue is connected: the first step of every public call.

        Raises `QueueClosed`, `WrongLoop`, `NotConnected`, and `ConnectionRefused` when Redis has refused the connection.
        """
        self.check()
        if not self.is_ready:
            self._opening_is_awaited = True
            await asyncio.shield(self.open_at_first_use())
            self.check()  # it may have been closed meanwhile

    def check(self) -> None:
        """Raises `QueueClosed`, or `WrongLoop` when the caller runs in another loop, thread or process than the queue."""
        if self.is_closed:
            raise QueueClosed
        if self._loop is None:
            return
        if self._forks != process.forks:
            raise WrongLoop(f"queue {self.name} was opened before a fork and cannot be used in the child: make a new one there")
        # one loop runs in a thread at a time; asking asyncio for it costs a system call in Python 3.11
        if not (self._loop.is_running() and self._thread == threading.get_ident()):
            raise WrongLoop(f"queue {self.name} belongs to the event loop that opened it and cannot be used from another one")

    def check_closable(self) -> bool:
        """Whether there is something to close: False when the queue was never opened, or by the parent of this process.

        Raises `WrongLoop` when another loop has opened it.
        """
        if self._loop is None or self._forks != process.forks:
            return False
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(f"queue {self.name} belongs to the event loop that opened it and is closed from another one")
        return True

    # --- tasks and errors ------------------------------------------------------------------------------------------------

    def report(self, error: Exception) -> None:
        """Emits `error`; logs it when nobody listens."""
        if not self.emit("error", error):
            trace = error.__cause__ if isinstance(error, TaskFailed) else None
            log.error("queue %s: %s: %s", self.name, type(error).__name__, with_cause(error), exc_info=trace)

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Runs `work` in a named task that the queue owns, and reports its failure."""
        task = asyncio.get_running_loop().create_task(work, name=f"beequeue {self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or not isinstance(error := task.exception(), Exception) or isinstance(error, QueueClosed):
            return
        # callers and tasks that await the opening get its refusal
        was_raised = error is self.refusal() and (self._opening_is_awaited or task is not self.opening)
        if not was_raised:
            self.report(error)

    def refusal(self) -> BaseException | None:
        """The error that the opening has ended with, if it has."""
        if self.opening is None or not self.opening.done() or self.opening.cancelled():
            return None
        return self.opening.exception()

    async def end_tasks(self, keep: Set[asyncio.Task[Any] | None], grace_s: float) -> None:
        """Cancels the queue's tasks except those in `keep`, and waits at most `grace_s` for them to end."""
        unfinished = self._tasks - keep
        for task in unfinished:
            task.cancel()
        if unfinished:
            _, left = await asyncio.wait(unfinished, timeout=grace_s)
            if left:
                log.warning("queue %s: %d listeners keep running, although they were cancelled", self.name, len(left))
