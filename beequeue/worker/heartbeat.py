"""The heartbeat: a worker reports the jobs that it holds, so that no stall check gives them to another worker.

The event loop reports twice in each stall interval. A handler that computes, or waits in a call that is not `async`, blocks
the loop; after a stall interval its job would go to another worker, and run twice. So a thread of the process, the watch, asks
each loop that has been silent for a while. If the loop does not answer, a second thread reports its jobs while the loop
is blocked. It has its own connection: a Redis that does not answer holds up no other queue's heartbeat. It also logs which
handler blocks the loop.

If the loop runs but its last report has no answer, that thread reports the jobs too: on a slow link the report may wait behind
large data. It logs nothing then: if Redis is away, the connections say so.

While the loop runs freely, the watch only looks at a variable twice in each stall interval. A handler that never stops blocking
keeps its jobs, like an `async` handler that never ends. A loop that no longer runs keeps none. An extension that computes
without releasing Python's GIL, or a signal that stops the process, stops these threads too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from beequeue.errors import BeeQueueError, ConnectionLost, TaskFailed
from beequeue.host import Host
from beequeue.store.store import Store
from beequeue.tasks import supervised
from beequeue.worker.attempt import Attempt, name_of

log = logging.getLogger("beequeue")

REPORTED_AT_ONCE = 1_000
"""How many jobs one command reports, so that it does not hold Redis up."""
ANSWER_S = 0.1
"""The least time that a loop gets to answer, where the stall interval leaves time for it."""
LEAST_S = 0.005
"""The shortest time that a thread waits. A stall interval below 20 ms would need shorter waits than a thread can manage."""
MOST_S = 86_400.0
"""The longest stall interval that the watch uses; the system limits how long a thread may wait."""
LONGEST_CALL_S = 2.0
"""How long a thread waits for Redis."""
PAUSE_S = 1.0
"""How long the watch leaves a loop alone after an unexpected error."""
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
"""A frame in one of these folders is less useful than the frame that called it."""


class Watch:
    """One thread that looks at all heartbeats of the process, each when it is due, until none is left."""

    def __init__(self) -> None:
        self._heartbeats: dict[Heartbeat, float] = {}
        """When each is due."""
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, heartbeat: Heartbeat) -> None:
        """Looks at `heartbeat` from now on; raises `RuntimeError` when the system refuses a thread."""
        with self._lock:
            self._heartbeats[heartbeat] = 0.0
            if self._thread is None:
                thread = threading.Thread(target=self._look_at_all, name="beequeue heartbeat", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    del self._heartbeats[heartbeat]
                    raise
                self._thread = thread
        self._changed.set()

    def remove(self, heartbeat: Heartbeat, grace_s: float) -> None:
        """Looks at `heartbeat` no more. The thread ends with the last one; waits at most `grace_s` for that."""
        with self._lock:
            self._heartbeats.pop(heartbeat, None)
            ending = None
            if not self._heartbeats:
                ending, self._thread = self._thread, None
        self._changed.set()
        if ending is not None:
            ending.join(grace_s)

    # --- in the thread ---------------------------------------------------------------------------------------------------

    def _look_at_all(self) -> None:
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():  # `remove` has taken the last one
                    return
                if not self._heartbeats:  # their loops are closed
                    self._thread = None
                    return
                now = time.monotonic()
                due = [heartbeat for heartbeat, due_at in self._heartbeats.items() if due_at <= now]
                next_at = min(self._heartbeats.values())
            if not due:
                self._changed.wait(next_at - now)
                self._changed.clear()
            for heartbeat in due:
                self._look_at(heartbeat)

    def _look_at(self, heartbeat: Heartbeat) -> None:
        try:
            due_at = heartbeat.look()
        except Exception as error:  # a fault of this package
            heartbeat.report_soon(error)
            due_at = time.monotonic() + PAUSE_S
        with self._lock:
            if heartbeat not in self._heartbeats:
                return
            if due_at is None:
                del self._heartbeats[heartbeat]
            else:
                self._heartbeats[heartbeat] = due_at


_watch = Watch()


def _after_fork_in_child() -> None:
    """The heartbeats, the thread, and perhaps a holder of the lock belong to the parent."""
    global _watch
    _watch = Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Heartbeat:
    """Reports the jobs of one worker in the running loop. `held` returns its attempts; threads call it too."""

    def __init__(self, store: Store, host: Host, handler: object, held: Callable[[], list[Attempt]]) -> None:
        self._store = store
        self._host = host
        self._handler = handler
        self._held = held
        self._half_s = host.settings.stall_interval / 2000
        interval_s = min(host.settings.stall_interval / 1000, MOST_S)
        # the loop reports each half interval: at least about a quarter is left when the watch finds that it does not
        self._calm_s = max(interval_s * 5 / 8, LEAST_S)
        self._answer_s = max(interval_s / 8, min(ANSWER_S, interval_s * 3 / 16), LEAST_S)
        self._repeat_s = max(interval_s / 2, LEAST_S)
        self._connection = store.blocking_connection(min(LONGEST_CALL_S, max(self._repeat_s, ANSWER_S)))
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._beating: asyncio.Task[None] | None = None
        self._sign_at = time.monotonic()
        self._asked_at: float | None = None
        self._answered_at = time.monotonic()
        """When the loop sent the last report that Redis has answered."""
        self._reports: list[asyncio.Future[list[Any]]] = []
        """The last two reports that the loop sent because the watch asked. The answer to the last may be there, but unread."""
        self._stop = threading.Event()
        self._ended = asyncio.Event()
        self._stand_in: threading.Thread | None = None

    def start(self) -> None:
        """Begins to report, and lets the watch look at the loop."""
        self._beating = supervised(self._beat, "heartbeat", self._host.report)
        try:
            _watch.add(self)
        except RuntimeError as error:  # the system refuses a thread: the loop still reports
            log.warning("queue %s: nothing watches the event loop: %s", self._host.name, error)

    async def stop(self, grace_s: float) -> None:
        """Stops reporting, and waits at most `grace_s` for the second thread, which ends within `LONGEST_CALL_S`."""
        self._stop.set()
        self._connection.close()
        _watch.remove(self, grace_s)
        stand_in = self._stand_in
        if stand_in is not None and stand_in.is_alive():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._ended.wait()
                stand_in.join()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait((self._beating,))

    def is_cancelled(self) -> bool:
        """Whether all tasks are being cancelled, as `asyncio.run` does when the program is interrupted."""
        return self._beating is not None and self._beating.cancelling() > 0

    # --- in the event loop -----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Reports all jobs that are held, twice in each stall interval."""
        due_at = self._loop.time()
        while True:
            # by the clock: the time that Redis takes to answer must not stretch the interval
            due_at = max(due_at + self._half_s, self._loop.time())
            await asyncio.sleep(due_at - self._loop.time())
            reported = self._report_all()
            self._sign()
            answers = await reported
            refused = next((answer for answer in answers if isinstance(answer, BaseException)), None)
            if isinstance(refused, BeeQueueError):
                self._host.report(refused)
            elif refused is not None:
                raise refused

    def _report_all(self) -> asyncio.Future[list[Any]]:
        """Reports all jobs that are held; returns the answers to come."""
        sent = asyncio.gather(*[self._store.heartbeat(ids) for ids in self._portions()], return_exceptions=True)
        sent.add_done_callback(functools.partial(self._was_answered, time.monotonic()))
        return sent

    def _was_answered(self, sent_at: float, sent: asyncio.Future[list[Any]]) -> None:
        if sent.cancelled() or sent.exception() is not None:  # `_beat`, which waits for it, was cancelled
            return
        if not any(isinstance(answer, ConnectionLost) for answer in sent.result()):
            self._answered_at = max(self._answered_at, sent_at)

    def _sign(self) -> None:
        """Shows the watch that the loop runs, and has just reported its jobs."""
        self._sign_at = time.monotonic()

    def _answer(self) -> None:
        """Answers the watch. A loop that blocks in pieces gets here; `_beat` needs several steps, and may not finish."""
        if time.monotonic() - self._sign_at < self._repeat_s:  # `_beat` was first
            return
        if len(self._reports) < 2 or self._reports[0].done():
            # `_beat` reports a refusal when it meets one
            self._reports = [*self._reports[-1:], self._report_all()]
        self._sign()

    def _portions(self) -> list[list[str]]:
        """The ids of all jobs that are held, in portions of `REPORTED_AT_ONCE`."""
        ids = list({attempt.id for attempt in self._held()})
        return [ids[at : at + REPORTED_AT_ONCE] for at in range(0, len(ids), REPORTED_AT_ONCE)]

    # --- in the thread of the watch --------------------------------------------------------------------------------------

    def look(self) -> float | None:
        """Asks the loop, or has its jobs reported, if it is time; returns when to look again, or None: never.

        If this thread has overslept too, the whole process stood still: it asks the loop once more.
        """
        now = time.monotonic()
        if self._stand_in is not None:
            return now + self._answer_s
        asked_at = self._asked_at
        if asked_at is None:
            if (due_at := self._sign_at + self._calm_s) > now:
                if self._is_unanswered() and self._held():
                    return self._stand_in_for(self._until_it_is_answered)
                return min(due_at, max(self._answer_is_late_at(), now + self._answer_s))
        elif self._sign_at >= asked_at or not self._loop.is_running():
            self._asked_at, self._sign_at = None, max(self._sign_at, asked_at)
            return min(self._sign_at + self._calm_s, max(self._answer_is_late_at(), now + self._answer_s))
        elif (answer_by := asked_at + self._answer_s) > now:
            return answer_by
        elif now - asked_at < 2 * self._answer_s:
            self._asked_at = None
            return self._stand_in_for(self._until_it_is_back)
        self._asked_at = now
        return now + self._answer_s if self._tell_loop(self._answer) else None

    def _answer_is_late_at(self) -> float:
        return self._answered_at + self._calm_s + self._answer_s

    def _is_unanswered(self) -> bool:
        """Whether Redis has answered none of the loop's reports for too long, though the loop runs."""
        return time.monotonic() >= self._answer_is_late_at() and self._loop.is_running()

    def _stand_in_for(self, stand_in: Callable[[], None]) -> float:
        """Has a second thread report the jobs; returns when to look again."""
        report = functools.partial(self._report_meanwhile, stand_in)
        self._stand_in = threading.Thread(target=report, name="beequeue heartbeat", daemon=True)
        try:
            self._stand_in.start()
        except RuntimeError:  # the system refuses a thread
            report()
        return time.monotonic() + self._repeat_s

    def _tell_loop(self, what: Callable[[], object]) -> bool:
        """False when the loop is closed, and the queue never was."""
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            return False
        return True

    def report_soon(self, error: Exception) -> None:
        """Has the loop report an unexpected error of one of the threads."""
        failure = TaskFailed(f"heartbeat thread: {type(error).__name__}: {error}; starting again in {PAUSE_S:g} s")
        failure.__cause__ = error
        self._asked_at = None
        if not self._tell_loop(functools.partial(self._host.report, failure)):
            log.error("queue %s: %s", self._host.name, failure, exc_info=error)

    # --- in a second thread, while the loop is blocked or gets no answer ---------------------------------------------------

    def _report_meanwhile(self, stand_in: Callable[[], None]) -> None:
        try:
            stand_in()
        except Exception as error:  # a fault of this package
            self.report_soon(error)
            self._stop.wait(PAUSE_S)
        finally:
            self._connection.close()
            self._stand_in = None
            self._tell_loop(self._ended.set)

    def _until_it_is_answered(self) -> None:
        while self._is_unanswered():
            if self._held():
                self._report()
            if self._stop.wait(self._repeat_s):
                return

    def _until_it_is_back(self) -> None:
        last_sign, warned = self._sign_at, False
        while self._sign_at == last_sign and self._loop.is_running():
            if held := self._held():
                failure = self._report()  # before logging, which may wait for the same call that blocks the loop
                if not warned and time.monotonic() - last_sign >= self._calm_s + ANSWER_S:
                    log.warning("queue %s: %s", self._host.name, self._what_blocks(held))
                    warned = True
                if failure is not None and not self._stop.is_set():
                    log.warning("queue %s: the heartbeat failed while the event loop is blocked: %s", self._host.name, failure)
            if self._stop.wait(self._repeat_s):
                return
        if warned:
            log.warning("queue %s: the event loop is back after %.1f s", self._host.name, self._sign_at - last_sign)

    def _report(self) -> Exception | None:
        """Reports the jobs; returns the error, if there was one."""
        try:
            for ids in self._portions():
                self._store.heartbeat_blocking(self._connection, ids)
        except Exception as error:  # the driver may raise anything when `stop` has closed its socket
            return error
        return None

    def _what_blocks(self, held: list[Attempt]) -> str:
        """One line: which job's handler blocks the loop, for how long, and where it is now."""
        task = asyncio.current_task(self._loop)
        job = next((attempt for attempt in held if attempt.task is not None and attempt.task is task), None)
        frames = _inner_frames(sys._current_frames().get(self._loop_thread))
        what = "something" if job is None else f"the handler {name_of(self._handler)} of job {job.id}"
        own = [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
        places = dict.fromkeys((*own[-1:], *frames[-1:]))
        place = "".join(f", in {frame.f_code.co_filename}:{frame.f_lineno}" for frame in places)
        silent_s = time.monotonic() - self._sign_at
        return f"{what} has blocked the event loop for {silent_s:.1f} s{place}; a thread reports the jobs meanwhile"


def _inner_frames(frame: FrameType | None) -> list[FrameType]:
    """A thread's frames, the outermost first, from where this package called other code."""
    frames: list[FrameType] = []
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]
