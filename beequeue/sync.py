"""A queue for code without an event loop (Flask, Django, scripts): it saves jobs, waits for results and looks jobs up.

    queue = Queue("mail", "redis://localhost")
    job = queue.save(queue.create_job({"to": "x"}).retries(2))
    sent = queue.result(job, timeout=5_000)

Its jobs are `beequeue.Job`s. Pass them to the queue's methods: a job's own `save()`, `result()` and so on are for asyncio.

All synchronous queues of a process share one daemon thread with an event loop. It starts at the first call, and listeners run
in it. A forked child starts its own thread and connections; Python 3.12 and later warn of a fork after the first call. uWSGI
runs threads only with `enable-threads`.
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

__all__ = ["Queue"]

log = logging.getLogger("beequeue")

Result = TypeVar("Result")

EXIT_S = 1.0
"""How long the interpreter's exit waits, at most, for queues that were left open; half of it is for closing them."""


class Queue:
    """A producer's queue whose methods block. Many threads may call them at once; a listener must not.

    It takes the arguments of `beequeue.Queue`, except that `is_worker` must be False: a `beequeue.Queue` processes the jobs.
    Raises `TypeError` or `ValueError` that names a wrong argument. It connects at the first call, or on entry as a context
    manager. A queue that only saves, and never asks for a result, needs neither `get_events` nor `store_jobs`.

    Every method that asks Redis waits until Redis is up. It may raise `RedisFailure`, `QueueClosed` once the queue has been
    closed, and `BeeQueueError` when a listener calls it. With a `timeout` (ms or a `timedelta`) it raises `ConnectionLost` when
    Redis has not answered by then; `maybe_applied` is True when a command was sent that changes a job. An interrupted wait, by
    `KeyboardInterrupt` for example, cancels the call: commands that were sent may still take effect, and no more are sent.
    """

    def __init__(self, name: str, redis: RedisSetting = None, **settings: Unpack[QueueOptions]) -> None:
        if settings.setdefault("is_worker", False):
            raise ValueError("is_worker must be False: jobs are processed by a beequeue.Queue")
        if not settings.setdefault("auto_connect", True):
            raise ValueError("auto_connect must be True: a synchronous queue connects at its first call")
        if settings.get("quit_command_client") is False:
            raise ValueError("quit_command_client must not be False: nobody else uses a synchronous queue's connection")
        self.name = name
        """The queue's name, as given."""
        self._make = functools.partial(AsyncQueue, name, redis, **settings)
        # a queue that never connects checks the arguments, and owns the jobs until they are saved
        settings["auto_connect"] = False
        unopened = AsyncQueue(name, redis, **settings)
        self.backoff_strategies = unopened.backoff_strategies
        """As in `beequeue.Queue`; `Job.backoff` accepts these names."""
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
        """Makes a job that carries `data`, which JSON must be able to carry; None becomes `{}`. `save` sends it."""
        return self._owners[0].create_job(data)

    def save(self, job: Job, timeout: Duration | None = None) -> Job:
        """Stores the job in `jobs` and its id in `waiting` or `delayed` (scripts `add_job`, `add_delayed_job`).

        Returns the job with its `id` filled in; `id` is None when its own id was in use, and nothing was written then. Raises
        `TypeError` when the argument is no job or JSON cannot carry its data, and `ValueError` when the job is another queue's.

        Without a `timeout` (ms or a `timedelta`) it waits for a Redis that is down. With one it raises `ConnectionLost` after
        that time. Its `maybe_applied` is False when the job was not sent and will not be: it can be saved again. It is True
        when Redis did not answer, and the job may have been saved.
        """
        if timeout is None:
            return self._call(lambda queue: self._own(job, queue).save())
        errors = self.save_all((job,), timeout)
        if job in errors:
            raise errors[job]
        return job

    def save_all(self, jobs: Iterable[Job], timeout: Duration | None = None) -> dict[Job, Exception]:
        """Saves many jobs as `save` does, in few round trips; returns the jobs that were not saved, each with its error.

        `timeout` (ms or a `timedelta`) is for all jobs together. A job that was not saved by then has a `ConnectionLost`, as
        `save` describes. Raises `TypeError` for an argument that is no job, and `ValueError` for another queue's job.
        """
        listed = list(jobs)
        timeout_ms = None if timeout is None else milliseconds("timeout", timeout)
        return self._call(lambda queue: queue._saver.save_all([self._own(job, queue) for job in listed], timeout_ms))

    def result(self, job: Job, timeout: Duration | None = None) -> Any:
        """Waits until a job that this queue saved or fetched in this process has ended; returns its handler's result.

        `timeout` is in ms or a `timedelta`. The result arrives with the message on `events`; Redis does not store it. Raises
        `JobFailed`, `OutcomeUnknown`, `TimeoutError`, `QueueClosed` when the queue is closed first, and `BeeQueueError` at once
        when the queue has no `get_events` or no `store_jobs`, or does not know the job.
        """
        return self._call(lambda queue: self._own(job, queue).result(timeout))

    def get_job(self, job_id: str | int, *, timeout: Duration | None = None) -> Job | None:
        """Reads the job with this id from `jobs` (script `get_job`), or returns None. Raises `UnreadableData`."""
        return self._call(lambda queue: queue.get_job(job_id), timeout)

    def get_jobs(
        self, kind: str, start: int = 0, end: int = 100, size: int = 100, *, timeout: Duration | None = None
    ) -> list[Job]:
        """Lists jobs in the state `kind`: `waiting`, `active`, `delayed`, `succeeded` or `failed`.

        For the first three, `start` and `end` are the first and the last index in that key. For the sets `succeeded` and
        `failed` it returns any `size` jobs. Raises `ValueError` or `TypeError` that names a wrong argument.
        """
        return self._call(lambda queue: queue.get_jobs(kind, start, end, size), timeout)

    def remove_job(self, job_id: str | int, *, timeout: Duration | None = None) -> Self:
        """Takes the job out of every key (script `remove_job`), if there is one; returns the queue."""
        timeout_ms = None if timeout is None else milliseconds("timeout", timeout)
        self._call(lambda queue: queue._producer.remove(job_id, timeout_ms))
        return self

    def check_health(self, *, timeout: Duration | None = None) -> Health:
        """Counts the jobs of each state at one moment (script `check_health`) and reads the last automatic id (key `id`)."""
        return self._call(AsyncQueue.check_health, timeout)

    # --- life ------------------------------------------------------------------------------------------------------------

    def close(self, timeout: Duration = 5_000) -> None:
        """Closes this process's connections. Later calls raise `QueueClosed`, and so do calls that wait for results.

        Other calls under way may use `timeout` (ms or a `timedelta`) to be answered, unless a connection is down. Does nothing
        at a second call, or before the first use. Raises `OperationTimedOut` when Redis did not answer, and `ConnectionRefused`
        when Redis never accepted the queue's connections.
        """
        milliseconds("timeout", timeout)
        background = _background
        background.check_caller()
        # set the mark first, then look: a call that opens the queue meanwhile sees the mark, or is seen here
        self._closed = True
        if background.is_started():
            background.run(lambda: background.close(self, timeout))

    def _call(self, method: Callable[[AsyncQueue], Coroutine[Any, Any, Result]], timeout: Duration | None = None) -> Result:
        """Runs `method` in the background thread; with a `timeout`, only a method that changes nothing in Redis."""
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
        """Returns this process's asynchronous queue; runs in the background thread."""
        if self._closed:
            raise QueueClosed
        queue = background.queues.get(self)
        if queue is None:
            queue = background.queues[self] = self._make()
            queue.backoff_strategies = self.backoff_strategies
            self._owners.append(queue)
        return queue

    def _own(self, job: Job, queue: AsyncQueue) -> Job:
        """Gives the job to this process's queue: it may have been created before the first use, or before a fork."""
        if not isinstance(job, Job):
            raise TypeError(f"job must be a Job, not {job!r}")
        if job.queue is not queue:
            if job.queue not in self._owners:
                raise ValueError(f"{job!r} was created by another queue")
            job.queue = queue
        return job


class _Background:
    """One process's event loop, in a thread that the first `run` starts. Only that thread touches `queues`."""

    def __init__(self) -> None:
        self.queues: dict[Queue, AsyncQueue] = {}
        self._lock = threading.RLock()  # reentrant: a signal handler may call a queue
        self._thread: threading.Thread | None = None
        self._ended = False
        self._selector: selectors.DefaultSelector
        self._loop: asyncio.AbstractEventLoop
        self._end_wanted: asyncio.Event

    def is_started(self) -> bool:
        return self._thread is not None

    def check_caller(self) -> None:
        """Raises `BeeQueueError` in the background thread, which must not wait for itself."""
        if threading.current_thread() is self._thread:
            raise BeeQueueError("a listener cannot call a synchronous queue: the call would wait for the listener")

    def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Runs `work` in the background thread and waits until it ends."""
        self.check_caller()
        with self._lock:
            if self._thread is None:
                self._start()
            # work handed over before the thread's end still runs
            future = None if self._ended else asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            if future is None:
                raise QueueClosed
            return future.result()
        except (QueueClosed, ConnectionLost):
            if self._ended and threading.current_thread().daemon:
                threading.Event().wait()  # the interpreter ends this daemon thread too; its traceback would help nobody
            raise
        finally:
            if future is not None:
                future.cancel()  # has an effect only when the wait was interrupted

    async def close(self, queue: Queue, timeout: Duration) -> None:
        """Closes a queue that was opened here, and forgets it."""
        opened = self.queues.get(queue)
        if opened is not None:
            try:
                await opened.close(timeout)
            finally:
                self.queues.pop(queue, None)

    def let_go(self) -> None:
        """In a forked child: gives up the parent's sockets, so that Redis notices when the parent closes them.

        Each descriptor is made to point to `/dev/null`. None is closed, so no number is reused: an object that still holds one
        can do no harm with it.
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
                log.error("a listener raised %r in the thread of the synchronous queues, which continues", error)
        self._loop.close()

    async def _until_ended(self) -> None:
        await self._end_wanted.wait()
        self._loop.set_exception_handler(lambda loop, context: None)
        for queue in self.queues.values():
            self._loop.create_task(queue.close(round(EXIT_S / 4 * 1000)))
        # closing the queues ends the calls under way, too
        if ending := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(ending, timeout=EXIT_S / 2)

    def end(self) -> None:
        """At the interpreter's exit: closes the open queues and ends the thread, within `EXIT_S`."""
        if self is not _background or self._thread is None:  # a forked child's copy of its parent's
            return
        with self._lock:
            self._ended = True
            self._loop.call_soon_threadsafe(self._end_wanted.set)
        self._thread.join(EXIT_S)


_background = _Background()
_inherited: list[_Background] = []
"""In a forked child, the objects of its parents. They are kept so that none is ever finalised."""


def _after_fork_in_child() -> None:
    """Replaces the parent's object: its thread does not run here, and a lock that it held is never released."""
    global _background
    _background.let_go()
    _inherited.append(_background)
    _background = _Background()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
