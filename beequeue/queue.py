"""The facade: a queue's public life (open, create jobs, process, listen, close), and the wiring of its parts.

Connections: one for commands; one for takes, for a worker; one for events, when somebody listens. With `ordered_events`
whatever names one job goes on the events' connection (RESP3), whose order removes the race of bee-queue's issues 78 and 189.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from beequeue.connections import command_client
from beequeue.errors import (
    BeeQueueError,
    CommandError,
    ConnectionRefused,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    QueueClosed,
    TaskFailed,
    UnreadableData,
    WrongLoop,
    said,
)
from beequeue.events import Emitter, Registry
from beequeue.job import BUILT_IN_STRATEGIES, Job, Strategy
from beequeue.producer.producer import Producer
from beequeue.producer.tracker import Tracker
from beequeue.settings import Duration, QueueOptions, QueueSettings, milliseconds, text, whole_number
from beequeue.store.store import Health, Store
from beequeue.tasks import Calls
from beequeue.wire.address import RedisSetting
from beequeue.wire.client import Client
from beequeue.wire.connection import Connection
from beequeue.wire.forks import process
from beequeue.wire.link import UNFIT, Link
from beequeue.worker.attempt import Handler
from beequeue.worker.clocks import DelayedActivator, StallChecker
from beequeue.worker.consumer import GRACE_S, Consumer
from beequeue.worker.outcome import message_of

log = logging.getLogger("beequeue")


class Queue(Emitter):
    """A bee-queue, in the role its settings give it: producer, worker, or both.

    `name` and the setting `prefix` name its keys in Redis, `<prefix>:<name>:…`. `redis` is a URL (`redis://`, `rediss://`,
    `valkey://`, `valkeys://`, `unix://`), a dict of redis-py's connection arguments, a `redis.asyncio.Redis` to take the
    settings of, a `Client` (see `beequeue.connect`) whose connection several queues use for commands, or None for
    127.0.0.1:6379. The settings are those of `QueueSettings`. Raises `TypeError` or `ValueError` naming a wrong one.

    Connects at once when made inside a running loop (unless `auto_connect=False`), otherwise at first use; `async with`
    opens and closes it. Every call waits until it is connected. `jobs` holds the jobs that still wait for their own events.

    Events: `ready`; `error` (error); on the worker `succeeded` (job, result), `retrying`, `failed`, `failed:fatal` (job,
    error), the last two also where a check finds that a job has stalled too often; `stalled` (id); `raised jobs` (count); and
    for every job of the queue, whoever made it: `job succeeded` (id, result), `job failed`, `job retrying` (id, error),
    `job progress` (id, value).
    """

    def __init__(self, name: str, redis: RedisSetting | Client = None, **settings: Unpack[QueueOptions]) -> None:
        super().__init__()
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, not {name!r}")
        self.name = text("name", name)
        self.settings = QueueSettings(**settings)  # type: ignore[arg-type]  # durations become ms there
        self.key_prefix = f"{self.settings.prefix}:{name}:"
        self.backoff_strategies: dict[str, Strategy] = dict(BUILT_IN_STRATEGIES)
        self.paused = False
        self._calls = Calls()
        self._tracker = Tracker(self, ordered=self.settings.ordered, max_event_bytes=self.settings.max_event_bytes)
        self._producer = Producer(self, self._tracker)
        self._connect_parts(redis)
        self._client_id: int | None = None
        self._consumer: Consumer | None = None
        self._processing = False
        self._activator: DelayedActivator | None = None
        self._stall_checker = StallChecker(self._store, self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._forks = 0
        self._opening: asyncio.Task[None] | None = None
        self._opening_is_awaited = False
        self._closing: asyncio.Task[None] | None = None
        self._ready = False
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: set[asyncio.Task[Any] | None] = set()
        self._ended = asyncio.Event()
        if self.settings.auto_connect:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                pass  # connects at first use
            else:
                self._open()

    def _connect_parts(self, redis: RedisSetting | Client) -> None:
        """Makes the connections that the settings ask for, without opening them, and the store that talks through them."""
        settings = self.settings
        self._shares = isinstance(redis, Client)
        if isinstance(redis, Client):
            self.client = redis
        else:
            self.client = command_client(redis, reconnect=settings.reconnect, ensure_scripts=settings.ensure_scripts)
        connection = functools.partial(
            Connection, self.client.address, reconnect=settings.reconnect, report=self._report, group=self.client.group
        )
        # the worker waits by itself before it repeats a take
        self._takes = connection("take", set_up=self._set_up_takes, keeps_refused=False) if settings.is_worker else None
        self._subscription = None
        if settings.get_events or settings.activate_delayed_jobs:
            self._subscription = connection(
                "event",
                protocol=3 if settings.ordered else 2,
                set_up=self._subscribe,
                on_message=self._message,
                on_read_end=self._tracker.hand_on,
            )
        commands = self.client.connection
        jobs = self._subscription if settings.ordered and self._subscription is not None else commands
        self._store: Store = Store(self.key_prefix, commands, self._takes, jobs)
        self._tracker.look_up, self._tracker.which_ended = self._store.look_up, self._store.ended

    def __repr__(self) -> str:
        state = "closed" if self._closed else "closing" if self.paused else "ready" if self._ready else "not ready"
        return f"<Queue {self.name} {state} running={self.running} tracked={len(self.jobs)}>"

    @property
    def jobs(self) -> Registry[Job]:
        """The jobs that still wait for their own events, by id. Assigning to it replaces them."""
        return self._tracker.jobs

    @jobs.setter
    def jobs(self, jobs: Mapping[str, Job]) -> None:
        kept = dict(jobs)
        self._tracker.jobs.clear()
        self._tracker.jobs.update(kept)

    @property
    def running(self) -> int:
        """How many handlers run in this process now."""
        return 0 if self._consumer is None else self._consumer.running

    @property
    def tracked(self) -> int:
        """How many jobs still wait for their own events."""
        return len(self.jobs)

    @property
    def reconnects(self) -> int:
        """How often a connection of this queue was lost and came back; with one that is shared, of that too."""
        connections = (self.client.connection, self._takes, self._subscription)
        return sum(connection.reconnects for connection in connections if connection is not None)

    @property
    def late_finishes(self) -> int:
        """How many handlers ended after their job had been settled, removed or handed on."""
        return 0 if self._consumer is None else self._consumer.late_finishes

    @property
    def unknown_outcomes(self) -> int:
        """How many tracked jobs ended as `OutcomeUnknown`."""
        return self._tracker.unknown_outcomes

    def is_running(self) -> bool:
        """False from the moment `close()` is called."""
        return not self.paused

    def to_key(self, suffix: str) -> str:
        """The full name of one of the queue's keys or channels."""
        return self.key_prefix + suffix

    # --- opening ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            with contextlib.suppress(BeeQueueError):
                await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> bool:
        """Connects if that has not begun yet, and returns True when the queue is ready.

        Waits for a Redis that is not up yet. Raises `ConnectionRefused` when Redis says no, `QueueClosed`.
        """
        self._check_usable()
        if self._opening is None:
            self._open()
        await self._usable()
        return True

    async def ready(self) -> Self:
        """Returns the queue when it is connected, subscribed, and its scripts are loaded; raises like `connect`.

        With `auto_connect=False` and before `connect()` it returns at once.
        """
        self._check_usable()
        if self._opening is None and not self.settings.auto_connect:
            return self
        await self.connect()
        return self

    def _open(self) -> None:
        self.client.attach(self._report, self._look_at_held)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._forks = process.forks
        settings = self.settings
        if settings.activate_delayed_jobs:
            self._activator = DelayedActivator(
                self._store,
                self,
                near_term_window_ms=settings.near_term_window,
                debounce_ms=settings.delayed_debounce,
            )
        self._opening = self._spawn(self._connect(), "opening")

    async def _connect(self) -> None:
        opening = [connection.open() for connection in (self._takes, self._subscription) if connection is not None]
        if not self._shares:
            opening.append(self.client.open())
        await asyncio.gather(*opening)
        self._ready = True
        if self._activator is not None:
            self._activator.look_now()
        asyncio.get_running_loop().call_soon(self.emit, "ready")

    async def _set_up_takes(self, link: Link) -> None:
        try:
            self._client_id = await link.call(b"CLIENT", b"ID")
        except CommandError as error:
            if UNFIT.match(str(error)):
                raise
            self._client_id = None  # closing then waits for the open take instead of ending it
        await self._look_at_held(link)

    async def _look_at_held(self, link: Link) -> None:
        """A connection on which jobs are settled is being set up."""
        if self._consumer is not None:
            await self._consumer.disown_reused(link)

    async def _subscribe(self, link: Link) -> None:
        if self.settings.get_events:
            await link.call(b"SUBSCRIBE", self._store.events_channel)
        if self.settings.activate_delayed_jobs:
            await link.call(b"SUBSCRIBE", self._store.earlier_channel)
            if self._ready and self._activator is not None:  # it is back: what was announced meanwhile is not repeated
                self._activator.look_now()
        if self.settings.ordered:
            await self._tracker.settle_unseen(lambda job_ids: self._store.look_up(job_ids, link))

    async def _usable(self) -> Store:
        """Every public call's first step: connected, open, and in the right loop."""
        self._check_usable()
        if not self._ready:
            self._opening_is_awaited = True
            await asyncio.shield(self._begin_opening())
            self._check_usable()  # it may have been closed meanwhile
        return self._store

    def _begin_opening(self) -> asyncio.Task[None]:
        if self._opening is None:
            if not self.settings.auto_connect:
                raise NotConnected("the queue is not connected: await connect() first")
            self._open()
            assert self._opening is not None
        return self._opening

    def _check_usable(self) -> None:
        if self._closed:
            raise QueueClosed
        if self._loop is not None and self._forks != process.forks:
            raise WrongLoop(f"queue {self.name} was opened before a fork and is used in the child: make one there")
        # one loop runs in a thread at a time; asking asyncio for it costs a system call in Python 3.11
        if self._loop is not None and not (self._loop.is_running() and self._thread == threading.get_ident()):
            raise WrongLoop(f"queue {self.name} belongs to the event loop that opened it and is used from another one")

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def create_job(self, data: Any = None) -> Job:
        """A job that carries `data` (whatever JSON carries; None is `{}`). Nothing is sent before `Job.save`."""
        return Job(self, data)

    async def save_all(self, jobs: Iterable[Job]) -> dict[Job, Exception]:
        """Saves many jobs of this queue, a thousand in a round trip, each as `Job.save` does; fills in their ids.

        Returns the jobs that could not be saved and what each would have raised: `TypeError`, `RedisFailure`.
        One whose own id is in use is not among them: its `id` is None. Raises, before anything is sent, `TypeError` for what is
        no job, `ValueError` for a job of another queue, `QueueClosed`.
        """
        return await self._producer.save_all(jobs)

    async def get_job(self, job_id: str | int) -> Job | None:
        """The job with this id, read from `jobs` (script `get_job`), or None.

        With `store_jobs` it is the very object that `queue.jobs` holds, if it holds one; else a new one, which receives its own
        events from now on, unless it has ended already (`result()` then tells how). An object that is held is not refreshed:
        `Job.from_id` shows what is stored. Raises `UnreadableData`, `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.get(job_id)

    async def get_jobs(self, kind: str, start: int = 0, end: int = 100, size: int = 100) -> list[Job]:
        """Jobs in the state `kind`: `waiting`, `active`, `delayed`, `succeeded` or `failed`, read from that key and `jobs`.

        `start` and `end`, both included, are indices into the first three; negative ones count from the end. `waiting` and
        `active` have the job that was pushed last first, so the next one to be taken is the last of `waiting`; `delayed` is in
        the order of time. Of the other two come any `size` jobs. Objects that `jobs` holds are returned themselves; the others
        are new, and receive no events. An entry that cannot be read is reported through `error` and left out.

        Raises `ValueError` or `TypeError` naming a wrong argument, `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.list_jobs(kind, start, end, size)

    async def remove_job(self, job_id: str | int) -> Self:
        """Takes the job out of every key, like `Job.remove`; returns the queue. Nothing happens when there is none."""
        await self._producer.remove(job_id)
        return self

    async def clean(self, kind: str, older_than: Duration = 0, limit: int = 1_000) -> int:
        """Deletes jobs that ended, from `jobs` and from `kind` (`succeeded` or `failed`); returns how many.

        Those that were created at least `older_than` ms (or a `timedelta`) ago, by `options.timestamp`, since when a job ended
        is not stored; at most `limit` of them, in no particular order. Without this, or `remove_on_success` and
        `remove_on_failure`, ended jobs stay for ever. Raises `ValueError` or `TypeError` naming a wrong argument,
        `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.clean(kind, older_than, limit)

    async def check_health(self) -> Health:
        """Counts the jobs of each state, all at one moment (script `check_health`), and reads the last automatic id.

        Raises `RedisFailure`, `QueueClosed`.
        """
        store = await self._usable()
        with self._calls:
            return await store.check_health()

    async def destroy(self) -> int:
        """Deletes all keys of the queue, the counter of ids too; returns how many there were.

        Stops nothing: workers go on; a job in `jobs` ends as `OutcomeUnknown` when it is next asked about. Raises
        `RedisFailure`, `QueueClosed`.
        """
        store = await self._usable()
        with self._calls:
            return await store.destroy()

    def _job_is_due(self, when: float) -> None:
        """A delayed job has been saved here, for `when` (epoch ms): looks then, if this queue raises delayed jobs."""
        if self._activator is not None:
            self._activator.look_at(when)

    # --- events ----------------------------------------------------------------------------------------------------------

    def _message(self, channel: bytes, payload: bytes) -> None:
        """A published message, in the step that parses it."""
        if channel == self._store.events_channel:
            try:
                self._tracker.read(payload)
            except Exception as error:  # it must not cut the connection, whatever it is
                failure = UnreadableData(f"a message on the events channel: {type(error).__name__}: {error}; {payload[:200]!r}")
                self._report(failure)
        elif self._activator is not None:
            try:
                self._activator.look_at(float(payload))
            except ValueError:
                self._activator.look_at(None)

    def _report(self, error: Exception) -> None:
        """Emits `error`; without a listener it is logged."""
        if not self.emit("error", error):
            trace = error.__cause__ if isinstance(error, TaskFailed) else None
            log.error("queue %s: %s: %s", self.name, type(error).__name__, said(error), exc_info=trace)

    def _listener_failed(self, event: str, error: BaseException) -> None:
        if event == "error":  # not in circles
            log.error("queue %s: a listener of error raised", self.name, exc_info=error)
            return
        failure = ListenerFailed(f"a listener of {event!r} raised {type(error).__name__}: {message_of(error)}")
        failure.__cause__ = error
        self._report(failure)

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        async def listen() -> None:
            try:
                await result
            except Exception as error:
                self._listener_failed(event, error)

        self._spawn(listen(), f"listener of {event}")

    # --- processing ------------------------------------------------------------------------------------------------------

    def process(self, handler: Handler, concurrency: int = 1) -> Self:
        """Starts to take jobs and run `handler` on each, at most `concurrency` at once; returns the queue.

        The handler is an `async def` with the job as its argument, or a plain function, which runs in a thread; what it
        returns is the job's result, what it raises fails the job. It must not await its own queue's `close()`, nor, when it
        takes the last free slot, another job's `result()`. Begins with a stall check, repeated every
        `stalled_check_interval`. Raises `BeeQueueError` on a non-worker, when called twice, and when closed.
        """
        if not self.settings.is_worker:
            raise BeeQueueError("Cannot call Queue#process on a non-worker")
        if self._processing:
            raise BeeQueueError("Cannot call Queue#process twice")
        if self.paused:
            raise QueueClosed
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {handler!r}")
        whole_number("concurrency", concurrency, at_least=1)
        self._check_usable()
        self._begin_opening()
        self._processing = True
        self._spawn(self._start_processing(handler, concurrency), "start of processing")
        return self

    async def run(self, handler: Handler, concurrency: int = 1) -> None:
        """Like `process`, and returns when the queue has been closed."""
        self.process(handler, concurrency)
        await self._usable()
        await self._ended.wait()

    async def _start_processing(self, handler: Handler, concurrency: int) -> None:
        await asyncio.shield(self._begin_opening())
        try:
            await self._stall_checker.check()
        except Exception as error:  # whatever it is, jobs are taken all the same, and the check is repeated
            if not self.paused:
                self._report(error)
        if self.paused:
            return
        interval = self.settings.stalled_check_interval
        interval = self.settings.stall_interval if interval is None else interval
        if interval and not self._stall_checker.repeats:
            self._stall_checker.repeat(interval)
        self._consumer = Consumer(self._store, self, handler, concurrency)
        self._consumer.start()

    async def check_stalled_jobs(self, interval: Duration | None = None) -> int:
        """Moves the jobs of silent workers from `active` to `waiting` (`stalled`, id, for each); returns how many.

        With `max_stalls`, one that was brought back that often already goes to `failed` and is not counted (`failed` and
        `failed:fatal`, job, `JobStalled`, here; `job failed` everywhere).
        With an `interval` (ms or `timedelta`, above 0) it is repeated that long after each check, until `close()`, in place
        of a worker's automatic check. At most one check in each `stall_interval` does anything, whoever asks; it takes two to
        find a job. Raises what Redis answered to the first one; later failures are reported through `error`.
        """
        interval_ms = 0 if interval is None else milliseconds("interval", interval)
        await self._usable()
        with self._calls:
            if interval_ms:
                return await self._stall_checker.check_and_repeat(interval_ms)
            return await self._stall_checker.check()

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def close(self, timeout: Duration = 5_000) -> None:
        """Closes the queue; a second call waits for the first and ends as it did.

        1. From now on `is_running()` is False; the clocks stop. 2. A worker takes no more jobs, and handlers have until
        `timeout` (ms or `timedelta`) to end; saving still works. 3. What is still held goes back to `waiting`. 4. Every later
        call raises `QueueClosed`; those under way have the rest of `timeout` to be answered, unless a connection is down.
        5. The connections are closed. 6. Raises `OperationTimedOut` when handlers had to be cancelled, or Redis did not answer;
        `ConnectionRefused` when it had never let the queue in. From a handler of its own it raises at once.

        A job that is arriving is waited for past `timeout`, as long as its data moves: cutting the connection would lose it.
        """
        timeout_ms = milliseconds("timeout", timeout) or 5_000
        if self._consumer is not None and self._consumer.owns_current_task():
            raise BeeQueueError("a handler cannot close its own queue: close() waits for the handler")
        if self._closing is None:
            if self._loop is None or self._forks != process.forks:  # never opened, or the parent's
                self.paused = self._closed = True
                return
            if asyncio.get_running_loop() is not self._loop:
                raise WrongLoop(f"queue {self.name} belongs to the event loop that opened it and is closed from another one")
            self.paused = True
            self._closing = asyncio.create_task(self._close(timeout_ms / 1000), name=f"beequeue {self.name}: closing")
        self._closers.add(asyncio.current_task())
        await asyncio.shield(self._closing)

    async def _close(self, timeout_s: float) -> None:
        await first_error_wins(self._drain(timeout_s), self._close_connections)
        assert self._opening is not None
        if not self._opening.cancelled() and isinstance(refused := self._opening.exception(), ConnectionRefused):
            raise refused

    async def _drain(self, timeout_s: float) -> None:
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        await self._stall_checker.close()
        if self._activator is not None:
            await self._activator.close()
        if self._consumer is not None and not await self._consumer.drain(self._client_id, timeout_s):
            raise OperationTimedOut(self._consumer.abandoned)
        self._closed = True
        if not await self._calls_are_over(deadline - now()):
            raise OperationTimedOut

    async def _calls_are_over(self, timeout_s: float) -> bool:
        """Waits for the answers to what has been called, or until a connection is down; False when neither comes in time."""
        if not self._calls.count:
            return True
        ends: list[asyncio.Future[Any]] = [self._calls.over()]
        for connection in (self.client.connection, self._subscription):
            if connection is not None:
                if connection.link is None:
                    return True
                ends.append(connection.link.lost)
        ended, _ = await asyncio.wait(ends, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        return bool(ended)

    async def _close_connections(self) -> None:
        self._closed = True
        await self._tracker.stop_looking()
        quits = self.settings.quit_command_client
        closing = [connection.close() for connection in (self._takes, self._subscription) if connection is not None]
        if not self._shares if quits is None else quits:
            closing.append(self.client.close())
        failures = [failure for failure in await asyncio.gather(*closing, return_exceptions=True) if failure is not None]
        self.client.detach(self._report)
        self._tracker.close()
        self._ended.set()
        unfinished = self._tasks - self._closers  # a listener that waits for this very close goes on behind it
        for task in unfinished:
            task.cancel()
        if unfinished:
            _, left = await asyncio.wait(unfinished, timeout=GRACE_S)
            if left:
                log.warning("queue %s: %d listeners go on, although they were cancelled", self.name, len(left))
        if failures:
            raise failures[0]

    def _spawn(self, work: Any, what: str) -> asyncio.Task[Any]:
        """A named task that the queue owns; its failure is reported."""
        task = asyncio.get_running_loop().create_task(work, name=f"beequeue {self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        opening = self._opening
        refusal = opening.exception() if opening is not None and opening.done() and not opening.cancelled() else None
        is_told = error is refusal and (self._opening_is_awaited or task is not opening)
        if isinstance(error, Exception) and not isinstance(error, QueueClosed) and not is_told:
            self._report(error)


async def first_error_wins(work: Awaitable[None], clean_up: Callable[[], Awaitable[None]]) -> None:
    """Awaits `work`, then `clean_up` in any case; when both raise, raises what `work` did."""
    try:
        await work
    except BaseException:
        try:
            await clean_up()
        except Exception as error:
            log.warning("closing: %s: %s", type(error).__name__, error)
        raise
    await clean_up()
