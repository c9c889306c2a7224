"""The heartbeat of a worker whose event loop is blocked: a thread that reports its jobs meanwhile, and says what blocks.

A handler that computes, or waits in a call that is not `async`, blocks the loop and with it the loop's own heartbeat; after a
stall interval its job would go to another worker, and run twice. The thread asks a loop that has not given a sign for a while.
If there is no answer, it stands in: it reports all jobs that are held, on a connection of its own, until the loop is back.

As long as the loop lives the thread sleeps, but for two looks at a variable in each stall interval. A handler that blocks for
ever holds its jobs for ever, like an `async` one that never ends. A loop that does not run any more holds none. What keeps
Python's own lock (an extension that computes without giving it back), or stops the process, stops the thread too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Protocol

from beequeue.run import name_of
from beequeue.store import Store

log = logging.getLogger("beequeue")

LEAST_S = 0.1
"""The shortest time in which a loop must give a sign; a stall interval below three times as much is too short for this."""
MOST_S = 86_400.0
"""The longest stall interval that this goes by; the system's waits have an end."""
LONGEST_CALL_S = 2.0
"""How long the thread waits for Redis."""
_PACKAGE = os.path.dirname(__file__) + os.sep
_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Below these a frame tells less than the one that called it."""


class Held(Protocol):
    """A job in the worker's hands."""

    id: str
    task: asyncio.Task[None] | None


class Heart:
    """One thread for one worker of the running loop: `held` names its jobs, `handler` is what it runs on them."""

    def __init__(self, store: Store, queue: str, handler: object, held: Callable[[], Iterable[Held]], interval_ms: int) -> None:
        self._store = store
        self._queue = queue
        self._handler = handler
        self._held = held
        interval_s = min(interval_ms / 1000, MOST_S)
        # the loop beats each half interval: there is a quarter left when the thread knows that it does not
        self._calm_s = max(interval_s * 5 / 8, LEAST_S)
        self._answer_s = max(interval_s / 8, LEAST_S)
        self._repeat_s = max(interval_s / 2, LEAST_S)
        self._connection = store.blocking_connection(min(LONGEST_CALL_S, self._repeat_s))
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._sign_at = time.monotonic()
        self._stop = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._watch, name="beequeue heart", daemon=True)

    def start(self) -> None:
        """Begins to watch the loop."""
        try:
            self._thread.start()
        except RuntimeError as error:  # the system gives no thread: the loop's own heartbeat is there
            log.warning("queue %s: nothing watches the event loop: %s", self._queue, error)

    def sign(self) -> None:
        """The loop lives."""
        self._sign_at = time.monotonic()

    async def stop(self, grace_s: float) -> None:
        """Ends the thread, and waits so long for it; one that Redis keeps waiting ends within `LONGEST_CALL_S`."""
        self._stop.set()
        self._connection.close()
        if not self._thread.is_alive():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._ended.wait()
            self._thread.join()

    # --- in the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not self._stop.wait(self._sign_at + self._calm_s - time.monotonic()):
                if time.monotonic() - self._sign_at >= self._calm_s and not self._answers():
                    self._stand_in()
        except Exception:  # ours; the loop's own heartbeat goes on
            log.exception("queue %s: the thread that watches the event loop has ended", self._queue)
        finally:
            self._connection.close()
            self._tell_loop(self._ended.set)

    def _tell_loop(self, what: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # it is closed, and the queue never was
            self._stop.set()

    def _answers(self) -> bool:
        """Whether the loop takes another turn soon, or is none any more.

        When this thread has overslept too, the whole process stood still: the loop is asked once more.
        """
        while True:
            asked_at = time.monotonic()
            self._tell_loop(self.sign)
            if self._stop.wait(self._answer_s) or self._sign_at >= asked_at or not self._loop.is_running():
                self._sign_at = max(self._sign_at, asked_at)
                return True
            if time.monotonic() - asked_at < 2 * self._answer_s:
                return False

    def _stand_in(self) -> None:
        """Reports what is held until the loop is back."""
        last_sign, warned = self._sign_at, False
        while self._sign_at == last_sign and self._loop.is_running():
            if held := list(self._held()):
                failure = self._report(held)  # before a line is logged: that may wait for what blocks the loop
                if not warned:
                    log.warning("queue %s: %s", self._queue, self._what_blocks(held))
                    warned = True
                if failure is not None and not self._stop.is_set():
                    log.warning("queue %s: the heartbeat beside a blocked event loop: %s", self._queue, failure)
            if self._stop.wait(self._repeat_s):
                return
        self._connection.close()
        if warned:
            log.warning("queue %s: the event loop is back after %.1f s", self._queue, self._sign_at - last_sign)

    def _report(self, held: list[Held]) -> Exception | None:
        """Tells Redis; what went wrong, if anything did."""
        try:
            self._store.heartbeat_blocking(self._connection, {run.id for run in held})
        except Exception as error:  # whatever the driver makes of a socket that `stop` has closed
            return error
        return None

    def _what_blocks(self, held: list[Held]) -> str:
        """One line: whose handler it is, for how long, and where it is now."""
        task = asyncio.current_task(self._loop)
        job = next((run for run in held if run.task is not None and run.task is task), None)
        frames = _inner_frames(sys._current_frames().get(self._loop_thread))
        what = "something" if job is None else f"the handler {name_of(self._handler)} of job {job.id}"
        own = [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
        places = dict.fromkeys((*own[-1:], *frames[-1:]))
        place = "".join(f", in {frame.f_code.co_filename}:{frame.f_lineno}" for frame in places)
        silent_s = time.monotonic() - self._sign_at
        return f"{what} has blocked the event loop for {silent_s:.1f} s{place}; a thread reports the jobs meanwhile"


def _inner_frames(frame: FrameType | None) -> list[FrameType]:
    """A thread's frames, the outermost first, from where this package has called what is not its own."""
    frames: list[FrameType] = []
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]
