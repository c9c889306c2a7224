"""A queue for code that has no event loop (Flask, Django, scripts): it saves jobs, waits for results and looks jobs up.

    queue = Queue("mail", "redis://localhost")
    job = queue.save(queue.create_job({"to": "x"}).retries(2))
    sent = queue.result(job, timeout=5_000)

Its jobs are plain `beequeue.Job`s. They are passed to the queue's methods: their own `save()` and the like are for asyncio.

All these queues of a process share one daemon thread with an event loop, which starts at the first call; listeners run in it.
A forked child starts its own, with connections of its own; Python 3.12 and later warn of a fork behind the first call. (uWSGI
runs threads only with `enable-threads`.)
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from beequeue.errors import BeeQueueError, ConnectionLost, QueueClosed
from beequeue.job import Job
from beequeue.queue import Queue as AsyncQueue
from beequeue.settings import Duration, QueueOptions, milliseconds
from beequeue.store.store import Health
from beequeue.wire.address import RedisSetting

log = logging.getLogger("beequeue")

Result = TypeVar("Result")

EXIT_S = 1.0
"""How long the interpreter's exit may wait for the queues that were left open; half of it is for closing them."""


class Queue:
    """A producer's queue whose methods wait: call them from any thread but that of the listeners, also from many at once.

    Arguments are those of `beequeue.Queue`, `is_worker` being False: jobs are processed there. Raises `TypeError` or
    `ValueError` naming a wrong one. Connects at the first call, or on entry as a context manager. One that saves without ever
    asking for a result needs neither `get_events` nor `store_jobs`.

    Every method that asks Redis waits until that is up, and may raise `RedisFailure`, `QueueClosed` once the queue has been
    closed, and `BeeQueueError` when a listener calls it. With a `timeout` (ms or a `timedelta`) it raises `ConnectionLost` when
    Redis has not answered by then; `maybe_applied` is True when something was sent that changes a job. A wait that is
    interrupted, as by `KeyboardInterrupt`, cancels the call. What had been sent by then may still happen; nothing is sent
    later.
    """

    def __init__(self, name: str, redis: RedisSetting = None, **settings: Unpack[QueueOptions]) -> None:
        if settings.setdefault("is_worker", False):
            raise ValueError("is_worker must be False: jobs are processed by a beequeue.Queue")
        if not settings.setdefault("auto_connect", True):
            raise ValueError("auto_connect must be True: a synchronous queue connects at its first call")
        if settings.get("quit_command_client") is False:
            raise ValueError("quit_command_client must not be False: nobody else uses a synchronous queue's connection")
        self.name = name
        self._make = functools.partial(AsyncQueue, name, redis, **settings)
        # never connected: it has checked the arguments, and owns the jobs until they are saved
        settings["auto_connect"] = False
        unopened = AsyncQueue(name, redis, **settings)
        self.backoff_strategies = unopened.backoff_strategies
        self._owners = [unopened]
        self._closed = False

    def __repr__(self) -> str:
        return f"<sync.Queue {self.name}{' closed' if self._closed else ''}>"

    def __enter__(self) -> Self:
        self._call(AsyncQueue.connect)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def create_job(self, data: Any = None) -> Job:
        """A job that carries `data` (whatever JSON carries; None is `{}`). Nothing is sent before `save`."""
        return self._owners[0].create_job(data)

    def save(self, job: Job, timeout: Duration | None = None) -> Job:
        """Stores the job and makes it available (script `add_job`); returns it, its `id` filled in.

        `id` is None when its own id was in use: nothing was written then. Raises `TypeError` when it is no job, or JSON cannot
        carry its data, `ValueError` when it is another queue's. Without a `timeout` (ms or a `timedelta`) it waits for a Redis
        that is down. With one it raises `ConnectionLost` by then, whose `maybe_applied` is False when the job was not sent, and
        will not be: it can be saved again. It is True when Redis did not answer, and the job may have been saved.
        """
        if timeout is None:
            return self._call(lambda queue: self._own(job, queue).save())
        errors = self.save_all((job,), timeout)
        if job in errors:
            raise errors[job]
        return job

    def save_all(self, jobs: Iterable[Job], timeout: Duration | None = None) -> dict[Job, Exception]:
        """Saves many jobs in few round trips; returns what went wrong, by job. Raises `TypeError` for
        what is no job, `ValueError` like `save`.

        With a `timeout` (ms or a `timedelta`, for all together) those that were not saved by then have a `ConnectionLost`, as
        `save` tells.
        """
        listed = list(jobs)
        timeout_ms = None if timeout is None else milliseconds("timeout", timeout)
        return self._call(lambda queue: queue._saver.save_all([self._own(job, queue) for job in listed], timeout_ms))

    def result(self, job: Job, timeout: Duration | None = None) -> Any:
        """Waits for the end of a job that this queue has saved or fetched in this process, and returns its handler's result.

        `timeout` is in ms or a `timedelta`. Raises `JobFailed`, `OutcomeUnknown`, `TimeoutError`, `QueueClosed` when the queue
        is closed first, and `BeeQueueError` at once when it cannot hear of the job's end.
        """
        return self._call(lambda queue: self._own(job, queue).result(timeout))

    def get_job(self, job_id: str | int, *, timeout: Duration | None = None) -> Job | None:
        """The job of that id, or None; raises `UnreadableData`."""
        return self._call(lambda queue: queue.get_job(job_id), timeout)

    def get_jobs(
        self, kind: str, start: int = 0, end: int = 100, size: int = 100, *, timeout: Duration | None = None
    ) -> list[Job]:
        """The jobs in the key `kind`: those at `start` to `end` of a list or `delayed`, about `size` of a set."""
        return self._call(lambda queue: queue.get_jobs(kind, start, end, size), timeout)

    def remove_job(self, job_id: str | int, *, timeout: Duration | None = None) -> Self:
        """Deletes the job of that id from every key, if there is one; returns the queue."""
        timeout_ms = None if timeout is None else milliseconds("timeout", timeout)
        self._call(lambda queue: queue._producer.remove(job_id, timeout_ms))
        return self

    def check_health(self, *, timeout: Duration | None = None) -> Health:
        """How many jobs are in each key, and the newest automatic id."""
        return self._call(AsyncQueue.check_health, timeout)

    # --- life ------------------------------------------------------------------------------------------------------------

    def close(self, timeout: Duration = 5_000) -> None:
        """Closes this process's connections; from now on calls raise `QueueClosed`, and so do those that wait for results.

        Calls under way have until `timeout` (ms or a `timedelta`) to be answered, unless a connection is down. A second call
        does nothing, nor does one before the first use. Raises `OperationTimedOut` when Redis did not answer,
        `ConnectionRefused` when the queue had never been able to open.
        """
        milliseconds("timeout", timeout)
        background = _background
        background.check_caller()
        # first the mark, then the look: a call that opens the queue meanwhile either sees the one or is seen by the other
        self._closed = True
        if background.is_started():
            background.run(lambda: background.close(self, timeout))

    def _call(self, method: Callable[[AsyncQueue], Coroutine[Any, Any, Result]], timeout: Duration | None = None) -> Result:
        """Runs `method` in the background thread; a `timeout` is for what only reads."""
        background = _background
        limit_s = None if timeout is None else milliseconds("timeout", timeout) / 1000

        async def call() -> Result:
            try:
                async with asyncio.timeout(limit_s) as limit:
                    return await method(self._opened(background))
            except TimeoutError:
                if limit.expired():
                    raise ConnectionLost("Redis did not answer within the time-out", maybe_applied=False) from None
                raise

        if self._closed:
            raise QueueClosed
        return background.run(call)

    def _opened(self, background: _Background) -> AsyncQueue:
        """This process's asynchronous queue; called in the background thread."""
        if self._closed:
            raise QueueClosed
        queue = background.queues.get(self)
        if queue is None:
            queue = background.queues[self] = self._make()
            queue.backoff_strategies = self.backoff_strategies
            self._owners.append(queue)
        return queue

    def _own(self, job: Job, queue: AsyncQueue) -> Job:
        """The job, handed to this process's queue: it may have been created before the first use, or before a fork."""
        if not isinstance(job, Job):
            raise TypeError(f"job must be a Job, not {job!r}")
        if job.queue is not queue:
            if job.queue not in self._owners:
                raise ValueError(f"{job!r} was created by another queue")
            job.queue = queue
        return job


class _Background:
    """One process's event loop, in a thread of its own from the first `run` on. `queues` is touched only in that thread."""

    def __init__(self) -> None:
        self.queues: dict[Queue, AsyncQueue] = {}
        self._lock = threading.RLock()  # reentrant: a signal handler may call a queue, too
        self._thread: threading.Thread | None = None
        self._ended = False
        self._selector: selectors.DefaultSelector
        self._loop: asyncio.AbstractEventLoop
        self._end_wanted: asyncio.Event

    def is_started(self) -> bool:
        return self._thread is not None

    def check_caller(self) -> None:
        """Raises `BeeQueueError` in the one thread that must not wait."""
        if threading.current_thread() is self._thread:
            raise BeeQueueError("a listener cannot call a synchronous queue: the call would wait for the listener")

    def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Runs `work` in the thread, and waits for its end."""
        self.check_caller()
        with self._lock:
            if self._thread is None:
                self._start()
            # whatever is handed over before the end is still run
            future = None if self._ended else asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            if future is None:
                raise QueueClosed
            return future.result()
        except (QueueClosed, ConnectionLost):
            if self._ended and threading.current_thread().daemon:
                threading.Event().wait()  # the interpreter is ending, and this thread with it: nobody is to hear of it
            raise
        finally:
            if future is not None:
                future.cancel()  # does something only when the wait was interrupted

    async def close(self, queue: Queue, timeout: Duration) -> None:
        """Closes a queue, if it has been opened here, and forgets it."""
        opened = self.queues.get(queue)
        if opened is not None:
            try:
                await opened.close(timeout)
            finally:
                self.queues.pop(queue, None)

    def let_go(self) -> None:
        """In a forked child: gives up the sockets that are the parent's too, so that Redis sees it when the parent closes them.

        Nothing is closed, and no number becomes free: what still holds one can do no harm with it.
        """
        if self._thread is not None and not self._ended:
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (self._selector.fileno(), *(key.fd for key in self._selector.get_map().values())):
                os.dup2(nothing, descriptor, inheritable=False)
            os.close(nothing)

    # --- the thread ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._end_wanted = asyncio.Event()
        thread = threading.Thread(target=self._live, name="beequeue sync", daemon=True)
        thread.start()
        self._thread = thread
        atexit.register(self.end)

    def _live(self) -> None:
        until_ended = self._loop.create_task(self._until_ended())
        while not until_ended.done():
            try:
                self._loop.run_until_complete(until_ended)
            except BaseException as error:
                log.error("a listener raised %r in the thread of the synchronous queues, which goes on", error)
        self._loop.close()

    async def _until_ended(self) -> None:
        await self._end_wanted.wait()
        self._loop.set_exception_handler(lambda loop, context: None)
        for queue in self.queues.values():
            self._loop.create_task(queue.close(round(EXIT_S / 4 * 1000)))
        # that ends whatever calls there are, too
        if ending := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(ending, timeout=EXIT_S / 2)

    def end(self) -> None:
        """At the interpreter's exit: closes what is open and ends the thread, within `EXIT_S`."""
        if self is not _background or self._thread is None:  # a forked child's copy
            return
        with self._lock:
            self._ended = True
            self._loop.call_soon_threadsafe(self._end_wanted.set)
        self._thread.join(EXIT_S)


_background = _Background()
_inherited: list[_Background] = []
"""What a forked child has of its parents': kept, so that nothing of it is ever finalised."""


def _after_fork_in_child() -> None:
    """The parent's thread does not run here, and a lock that it held is never released."""
    global _background
    _background.let_go()
    _inherited.append(_background)
    _background = _Background()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
