"""The public API: `Queue`, which jobs are saved to, fetched from and processed on.

It makes the queue's parts and passes each call on: to the producer, the saver and the tracker (`producer/`), the consumer and
the two clocks (`worker/`), and the connections. It decides the order in which the parts start and stop, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from beequeue.connections import Connections
from beequeue.errors import (
    BeeQueueError,
    ConnectionRefused,
    ListenerFailed,
    OperationTimedOut,
    QueueClosed,
    UnreadableData,
)
from beequeue.events import Emitter
from beequeue.host import Host
from beequeue.job import BUILT_IN_STRATEGIES, Job, Strategy
from beequeue.producer.producer import Producer
from beequeue.producer.saver import Saver
from beequeue.producer.tracker import Tracker
from beequeue.settings import Duration, QueueOptions, QueueSettings, milliseconds, text, whole_number
from beequeue.store.store import Health
from beequeue.wire.address import RedisSetting
from beequeue.wire.client import Client
from beequeue.wire.link import Link
from beequeue.worker.attempt import Handler
from beequeue.worker.clocks import DelayedActivator, StallChecker
from beequeue.worker.consumer import GRACE_S, Consumer
from beequeue.worker.outcome import message_of

__all__ = ["Queue"]

log = logging.getLogger("beequeue")


class Queue(Emitter):
    """A bee-queue. Its settings make it a producer, a worker, or both.

    `name` and the setting `prefix` name its keys in Redis, `<prefix>:<name>:…`. `redis` is a URL (`redis://`, `rediss://`,
    `valkey://`, `valkeys://`, `unix://`), a dict of redis-py's connection arguments, a `redis.asyncio.Redis` whose settings the
    queue copies, a `Client` (see `beequeue.connect`) whose connection several queues share for commands, or None for
    127.0.0.1:6379. `QueueSettings` describes the settings. Raises `TypeError` or `ValueError` that names a wrong argument.

    A queue made inside a running event loop connects at once, unless `auto_connect=False`; otherwise it connects at its first
    use. `async with` opens and closes it. Every call waits until the queue is connected. `jobs` holds the jobs that still wait
    for their own events.

    The queue emits these events:

    - `ready`, and `error` (error);
    - on a worker `succeeded` (job, result), `retrying`, `failed` and `failed:fatal` (job, error). A stall check also emits the
      last two, for a job that has stalled too often;
    - `stalled` (id) for each job that a stall check brings back, and `raised jobs` (count) for delayed jobs that became due;
    - for every job of the queue, whichever process saved it: `job succeeded` (id, result), `job failed` and `job retrying`
      (id, error), `job progress` (id, value).
    """

    def __init__(self, name: str, redis: RedisSetting | Client = None, **settings: Unpack[QueueOptions]) -> None:
        super().__init__()
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, not {name!r}")
        self.name = text("name", name)
        """The queue's name, as given."""
        self.settings = QueueSettings(**settings)  # type: ignore[arg-type]  # durations become ms there
        """The settings, checked and complete; durations are in ms."""
        self.key_prefix = f"{self.settings.prefix}:{name}:"
        """The first part of each of the queue's keys and channels."""
        self.backoff_strategies: dict[str, Strategy] = dict(BUILT_IN_STRATEGIES)
        """From the name of a backoff strategy to a function: it gets the job whose attempt failed, and returns how many ms to
        wait before the next attempt; None or a negative number ends the job. Add your own."""
        self.paused = False
        """Whether `close()` has been called."""
        self._host = Host(self, self._open)
        self._connections = Connections(
            self._host,
            self.key_prefix,
            redis,
            check_held=self._check_held,
            catch_up=self._catch_up,
            on_message=self._receive,
            on_read_end=self._end_read,
        )
        self.client = self._connections.client
        """The command connection, which other queues may share."""
        self._store = self._connections.store
        self._tracker = Tracker(self._host, self._store)
        self._saver = Saver(self._host, self._store, self._tracker, self._job_is_due)
        self._producer = Producer(self._host, self._store, self._tracker)
        self._stall_checker = StallChecker(self._store, self._host)
        self._activator: DelayedActivator | None = None
        self._consumer: Consumer | None = None
        self._is_processing = False
        self._closing: asyncio.Task[None] | None = None
        self._closers: set[asyncio.Task[Any] | None] = set()
        self._ended = asyncio.Event()
        if self.settings.auto_connect:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                pass  # connects at the first use
            else:
                self._host.begin_opening()

    def __repr__(self) -> str:
        host = self._host
        state = "closed" if host.is_closed else "closing" if self.paused else "ready" if host.is_ready else "not ready"
        return f"<Queue {self.name} {state} running={self.running} tracked={len(self.jobs)}>"

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs that still wait for their own events, by id. Assigning a mapping replaces them all."""
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
        """How often a connection of this queue was lost and came back. A shared connection counts for each of its queues."""
        return self._connections.reconnects

    @property
    def late_finishes(self) -> int:
        """How many handlers ended after their job had been settled, removed or handed on."""
        return 0 if self._consumer is None else self._consumer.late_finishes

    @property
    def unknown_outcomes(self) -> int:
        """How many tracked jobs ended as `OutcomeUnknown`."""
        return self._tracker.unknown_outcomes

    def is_running(self) -> bool:
        """Whether `close()` has not been called yet."""
        return not self.paused

    def to_key(self, suffix: str) -> str:
        """The full name of one of the queue's keys or channels: `to_key("waiting")`."""
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
        """Connects, unless the queue is connecting already; returns True when it is ready.

        Waits for a Redis that is not up yet. Raises `ConnectionRefused` when Redis refuses the connection, `QueueClosed`.
        """
        self._host.check()
        self._host.begin_opening()
        await self._host.opened()
        return True

    async def ready(self) -> Self:
        """Returns the queue when it is connected and subscribed and its scripts are loaded; raises like `connect`.

        With `auto_connect=False` it returns at once when `connect()` has not been called.
        """
        self._host.check()
        if self._host.opening is not None or self.settings.auto_connect:
            await self.connect()
        return self

    def _open(self) -> Coroutine[Any, Any, None]:
        """Starts what needs the running loop; returns the rest of the work."""
        self._connections.attach()
        if self.settings.activate_delayed_jobs:
            self._activator = DelayedActivator(self._store, self._host)
        return self._connect()

    async def _connect(self) -> None:
        await self._connections.open()
        self._host.is_ready = True
        if self._activator is not None:
            self._activator.look_now()
        asyncio.get_running_loop().call_soon(self.emit, "ready")

    async def _check_held(self, link: Link) -> None:
        """Runs on each new link on which jobs are settled, before any settlement."""
        if self._consumer is not None:
            await self._consumer.disown_reused_ids(link)

    async def _catch_up(self, link: Link) -> None:
        """Runs on each new event link: asks about everything that was announced while there was none."""
        if self._host.is_ready and self._activator is not None:
            self._activator.look_now()
        if self.settings.ordered:
            await self._tracker.end_unseen(lambda job_ids: self._store.look_up(job_ids, link))

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def create_job(self, data: Any = None) -> Job:
        """Makes a job that carries `data`, which JSON must be able to carry; None becomes `{}`. `Job.save` sends it."""
        return Job(self, data)

    async def save_all(self, jobs: Iterable[Job]) -> dict[Job, Exception]:
        """Saves many jobs of this queue as `Job.save` does, a thousand in a round trip, and fills in their ids.

        Returns the jobs that could not be saved, each with the error that `Job.save` would have raised: `TypeError`,
        `RedisFailure`. A job whose own id is in use is not among them; its `id` becomes None. Before anything is sent it raises
        `TypeError` for an argument that is no job, `ValueError` for a job of another queue, and `QueueClosed`.
        """
        return await self._saver.save_all(jobs)

    async def get_job(self, job_id: str | int) -> Job | None:
        """Reads the job with this id from `jobs` (script `get_job`); returns None when there is none.

        With `store_jobs` it returns the object in `queue.jobs` if there is one, otherwise a new object that receives its own
        events from now on. A job that has ended already receives none; its `result()` tells how it ended. The object in
        `queue.jobs` is not refreshed: `Job.from_id` shows what is stored.

        With `ordered_events`, Redis would cut the connection that carries a job above 30 MB; the call then raises
        `BeeQueueError`, and `get_jobs` reads the job. Raises `UnreadableData`, `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.get(job_id)

    async def get_jobs(self, kind: str, start: int = 0, end: int = 100, size: int = 100) -> list[Job]:
        """Lists jobs in the state `kind`: `waiting`, `active`, `delayed`, `succeeded` or `failed`.

        Reads ids from the key `kind` and entries from `jobs`. For the first three states, `start` and `end` are the first and
        the last index; negative ones count from the end. `waiting` and `active` begin with the job that was pushed last, so the
        last of `waiting` is the next to be taken; `delayed` is sorted by time. For `succeeded` and `failed` it returns any
        `size` jobs. It returns the objects that `queue.jobs` holds; the others are new and receive no events. It leaves out an
        entry that cannot be read, and reports it through `error`.

        Raises `ValueError` or `TypeError` that names a wrong argument, `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.list_jobs(kind, start, end, size)

    async def remove_job(self, job_id: str | int) -> Self:
        """Takes the job out of every key (script `remove_job`), like `Job.remove`, and returns the queue.

        Does nothing when there is no such job. Raises `TypeError` or `ValueError` for an invalid id, `RedisFailure`,
        `QueueClosed`.
        """
        await self._producer.remove(job_id)
        return self

    async def clean(self, kind: str, older_than: Duration = 0, limit: int = 1_000) -> int:
        """Deletes ended jobs from `jobs` and from `kind`, which is `succeeded` or `failed`; returns how many.

        Deletes at most `limit` jobs, in no particular order, among those created at least `older_than` ago (ms or a
        `timedelta`). The age comes from `options.timestamp`, since Redis does not store when a job ended. Ended jobs stay in
        Redis until they are cleaned or removed, unless `remove_on_success` and `remove_on_failure` are set. Raises `ValueError`
        or `TypeError` that names a wrong argument, `RedisFailure`, `QueueClosed`.
        """
        return await self._producer.clean(kind, older_than, limit)

    async def check_health(self) -> Health:
        """Counts the jobs of each state at one moment (script `check_health`) and reads the last automatic id (key `id`).

        Raises `RedisFailure`, `QueueClosed`.
        """
        await self._host.opened()
        with self._host.calls:
            return await self._store.check_health()

    async def destroy(self) -> int:
        """Deletes all keys of the queue, the counter `id` too; returns how many there were.

        Workers are not stopped. A job in `queue.jobs` ends as `OutcomeUnknown` the next time the queue asks about it. Raises
        `RedisFailure`, `QueueClosed`.
        """
        await self._host.opened()
        with self._host.calls:
            return await self._store.destroy()

    # --- events ----------------------------------------------------------------------------------------------------------

    def _receive(self, channel: bytes, payload: bytes) -> None:
        """Takes a published message, in the step that parses it; must not raise, or the connection is cut."""
        if channel != self._store.events_channel:
            self._hear_of_delayed(payload)
            return
        try:
            self._tracker.read(payload)
        except Exception as error:
            unreadable = f"a message on the events channel: {type(error).__name__}: {error}; {payload[:200]!r}"
            self._host.report(UnreadableData(unreadable))

    def _end_read(self) -> None:
        self._tracker.hand_on()

    def _hear_of_delayed(self, payload: bytes) -> None:
        """Takes a message of `earlierDelayed`: a job has become the earliest delayed one."""
        if self._activator is not None:
            try:
                self._activator.look_at(float(payload))
            except ValueError:
                self._activator.look_at(None)

    def _job_is_due(self, when: float) -> None:
        """Tells the clock of delayed jobs that this queue has saved one for `when`, epoch ms."""
        if self._activator is not None:
            self._activator.look_at(when)

    def _listener_failed(self, event: str, error: BaseException) -> None:
        if event == "error":  # reporting it would call the same listener again
            log.error("queue %s: a listener of error raised", self.name, exc_info=error)
            return
        failure = ListenerFailed(f"a listener of {event!r} raised {type(error).__name__}: {message_of(error)}")
        failure.__cause__ = error
        self._host.report(failure)

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        async def listen() -> None:
            try:
                await result
            except Exception as error:
                self._listener_failed(event, error)

        self._host.spawn(listen(), f"listener of {event}")

    # --- processing ------------------------------------------------------------------------------------------------------

    def process(self, handler: Handler, concurrency: int = 1) -> Self:
        """Starts to take jobs and to run `handler` on each, at most `concurrency` at once; returns the queue.

        The handler is an `async def` that gets the job, or a plain function, which runs in a thread. Its return value is the
        job's result; an exception fails the job. A handler must not await its own queue's `close()`, nor another job's
        `result()` while it occupies the last free slot: both would wait for the handler itself.

        Processing begins with a stall check, repeated every `stalled_check_interval`. A take moves the job's id from `waiting`
        to `active`; when the handler ends, the id moves on and the event is published on `events`. Raises `BeeQueueError` on a
        queue with `is_worker=False` and at a second call, `QueueClosed`, and `TypeError` or `ValueError` for a wrong argument.
        """
        if not self.settings.is_worker:
            raise BeeQueueError("Cannot call Queue#process on a non-worker")
        if self._is_processing:
            raise BeeQueueError("Cannot call Queue#process twice")
        if self.paused:
            raise QueueClosed
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {handler!r}")
        whole_number("concurrency", concurrency, at_least=1)
        self._host.check()
        opening = self._host.open_at_first_use()
        self._is_processing = True
        self._host.spawn(self._start_processing(opening, handler, concurrency), "start of processing")
        return self

    async def run(self, handler: Handler, concurrency: int = 1) -> None:
        """Calls `process`, and returns when the queue has been closed. Raises like `process`, and like `connect`."""
        self.process(handler, concurrency)
        await self._host.opened()
        await self._ended.wait()

    async def _start_processing(self, opening: asyncio.Task[None], handler: Handler, concurrency: int) -> None:
        await asyncio.shield(opening)
        try:
            await self._stall_checker.check()
        except Exception as error:  # jobs are still taken, and the check is repeated
            if not self.paused:
                self._host.report(error)
        if self.paused:
            return
        interval = self.settings.stalled_check_interval
        interval = self.settings.stall_interval if interval is None else interval
        if interval and not self._stall_checker.repeats:
            self._stall_checker.repeat(interval)
        self._consumer = Consumer(self._store, self._host, handler, concurrency)
        self._consumer.start()

    async def check_stalled_jobs(self, interval: Duration | None = None) -> int:
        """Moves the jobs of silent workers from `active` to `waiting`, and emits `stalled` (id) for each; returns how many.

        With the setting `max_stalls`, a job that has been brought back that often goes to `failed` instead and is not counted;
        this queue emits `failed` and `failed:fatal` (job, `JobStalled`), and every queue with `get_events` emits `job failed`.

        With `interval` (ms or a `timedelta`, above 0) the check is repeated that long after each check, until `close()`. This
        replaces a worker's automatic check. However many processes ask, only one check in each `stall_interval` does anything,
        and a job is found by the second check after its worker went silent. Raises `RedisFailure` when the first check fails,
        and `QueueClosed`; later failures are reported through `error`.
        """
        interval_ms = 0 if interval is None else milliseconds("interval", interval)
        await self._host.opened()
        with self._host.calls:
            if interval_ms:
                return await self._stall_checker.check_and_repeat(interval_ms)
            return await self._stall_checker.check()

    # --- closing ---------------------------------------------------------------------------------------------------------

    async def close(self, timeout: Duration = 5_000) -> None:
        """Closes the queue. A second call waits for the first and ends in the same way.

        1. `is_running()` becomes False, and the two clocks stop.
        2. A worker takes no more jobs. Handlers may run until `timeout` (ms or a `timedelta`), and saving still works. After
           it, `async` handlers are cancelled, and every job that the worker still holds goes back from `active` to `waiting`. A
           thread cannot be cancelled: its job stays in `active`, for the stall check.
        3. Every later call raises `QueueClosed`.
        4. Calls under way may use the rest of `timeout` to be answered, unless a connection is down.
        5. The connections are closed, and the queue's tasks end.

        Past `timeout` it still waits for a job that is just arriving, as long as its data moves: cutting the connection would
        lose it. Raises `OperationTimedOut` when handlers had to be cancelled or Redis did not answer, `ConnectionRefused` when
        Redis never accepted the queue's connections, `WrongLoop`, and `BeeQueueError` at once when a handler closes its own
        queue.
        """
        timeout_ms = milliseconds("timeout", timeout) or 5_000
        if self._consumer is not None and self._consumer.owns_current_task():
            raise BeeQueueError("a handler cannot close its own queue: close() waits for the handler")
        if self._closing is None:
            if not self._host.check_closable():
                self.paused = self._host.is_closed = True
                return
            self.paused = True
            self._closing = asyncio.create_task(self._close(timeout_ms / 1000), name=f"beequeue {self.name}: closing")
        self._closers.add(asyncio.current_task())
        await asyncio.shield(self._closing)

    async def _close(self, timeout_s: float) -> None:
        """The five steps of `close`. The last one follows even when another one raises."""
        deadline = asyncio.get_running_loop().time() + timeout_s

        async def end_work() -> None:
            await self._stop_clocks()
            await self._stop_worker(timeout_s)
            self._host.is_closed = True
            await self._end_calls(deadline)

        await first_error_wins(end_work(), self._end_connections)
        if isinstance(refusal := self._host.refusal(), ConnectionRefused):
            raise refusal

    async def _stop_clocks(self) -> None:
        await self._stall_checker.close()
        if self._activator is not None:
            await self._activator.close()

    async def _stop_worker(self, timeout_s: float) -> None:
        if self._consumer is not None and not await self._consumer.drain(lambda: self._connections.take_client_id, timeout_s):
            raise OperationTimedOut(self._consumer.abandoned)

    async def _end_calls(self, deadline: float) -> None:
        """Waits until all calls under way are answered, or a connection is down; raises `OperationTimedOut`."""
        losses = self._connections.losses()
        if not self._host.calls.count or losses is None:
            return
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        ends: list[asyncio.Future[Any]] = [self._host.calls.over(), *losses]
        ended, _ = await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not ended:
            raise OperationTimedOut

    async def _end_connections(self) -> None:
        self._host.is_closed = True
        await self._tracker.stop_looking()
        failure = await self._connections.close()
        self._tracker.close()
        self._ended.set()
        # a listener that awaits this close continues after it
        await self._host.end_tasks(self._closers, GRACE_S)
        if failure is not None:
            raise failure


async def first_error_wins(work: Awaitable[None], clean_up: Callable[[], Awaitable[None]]) -> None:
    """Awaits `work`, then `clean_up` in any case. When both raise, raises the error of `work` and logs the other."""
    try:
        await work
    except BaseException:
        try:
            await clean_up()
        except Exception as error:
            log.warning("closing: %s: %s", type(error).__name__, error)
        raise
    await clean_up()
