"""Everything that a queue says to Redis: its keys, its scripts, and one method for each transition.

Replies come back decoded. A method sends what it builds, unless its name begins with `build_`. The data model, with all keys
and channels below `<prefix>:<name>:`

    key             type        holds                                     written by
    id              string      the last automatic id                     add
    jobs            hash        id -> job JSON: data, options, status,    add, finish; remove, clean
                                progress, in that order
    waiting         list        ids; pushed left, taken right             add, retry, raise, stall check, hand back
    active          list        ids being processed                       take; finish, hand back, stall check
    succeeded       set         ids; or nowhere, with remove_on_success   finish; retry, clean
    failed          set         ids; or nowhere, with remove_on_failure   finish; retry, clean
    delayed         sorted set  ids by activation time, epoch ms          add, finish; raise
    stalling        set         a copy of active, less the ids whose      stall check; heartbeat, finish
                                worker has reported since
    stallBlock      string      "1", expires: one stall check an interval; stall check
                                during one: whose it is, and where it continues
    stalls          hash        id -> "count sha1": how often a job has   stall check, with max_stalls; expires
                                stalled while its JSON had that SHA-1
    events          channel     {"id":…,"event":…,"data":…}               finish, progress
    earlierDelayed  channel     epoch ms: look again at this time         add, finish

The life of a job; each arrow is one atomic step

                   add ──────────► waiting ──── take ────► active ──── finish ────► succeeded | failed | gone
                    │                ▲▲ ▲ ▲                 │  │ │                         │
                    └──► delayed ────┘│ │ └─ try again now ─┘  │ └─ try again later ─► delayed
                               raise  │ └── stall check, hand back                         │
                                      └───────────────────── retry ────────────────────────┘

Remove takes a job out of every place.

Redis may refuse a command in the middle of a script, for lack of a right or of memory. Each job is then still in one place,
with its entry.

Some costs grow with the queue: `active` and `waiting` are lists, so removing an id from one costs a walk. Finish walks from the
end where takes push to the first copy of the id. Remove and hand back walk through all of `active`, and remove through
`waiting` too. The stall check and raise work in slices of bounded size.

On an ordered queue, commands that name one job use the event connection: they keep the order of the calls, and each precedes
the events that it causes. Commands that may be large, or belong to a worker, use the command connection. Takes have their own.
A worker's commands wait for a Redis that is down however many saves wait: a refused settlement would run its job again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from hiredis import ReplyError

from beequeue.errors import BeeQueueError, CommandError
from beequeue.job import id_as_bytes as _bytes
from beequeue.job import id_as_text as _text
from beequeue.store.scripts import SCRIPTS
from beequeue.wire.connection import Answer, Connection
from beequeue.wire.driver import BlockingConnection
from beequeue.wire.link import Command, Link, Packed, complete

TAKE_WAIT_S = 5
"""How long Redis holds a take open. It is finite, so that a half-open socket is noticed."""

STALLS_KEPT_MS = 7 * 24 * 3_600_000
"""How long the counts of stalls outlast the last stall: a job may wait long between two stalls."""

OnId = Callable[[str | BeeQueueError | None], None]


class Settlement(NamedTuple):
    """The data that `finish` writes at the end of an attempt."""

    status: str
    """`succeeded`, `failed` or `retrying`."""
    entry: bytes | None
    """The job JSON to store; None: delete it."""
    message: bytes
    """The message for the events channel; empty: none."""
    retry_at: int | None = None
    """With `retrying`: the activation time, epoch ms; None: at once."""


LARGE = b"(large)"
"""Stands for the entry of a job that was taken, and whose entry was too large to come along: it is this very object."""


class Taken(NamedTuple):
    """A job that was moved to `active` for this worker."""

    id: str
    entry: bytes
    """`LARGE`: it is still to be read, by the id."""


class Stored(NamedTuple):
    """A job as it is stored."""

    entry: bytes
    state: str
    """`open`, `succeeded` or `failed`."""


class Retried(NamedTuple):
    """The result of `retry`."""

    was_failed: int
    """1 if the job was in `failed`, else 0."""
    waiting: int
    """The length of `waiting`."""


class Found(NamedTuple):
    """The answer of `look_up` about one id."""

    state: str
    """`open`, `succeeded`, `failed` or `gone`."""
    timestamp: str
    """When the job was created, as a stamp; see `is_same_job`. Empty when the entry does not tell."""
    trace: str
    """The newest stack trace; empty when there is none."""


class Health(NamedTuple):
    """How many jobs are in each state, and the last automatic id (0: none was given yet)."""

    waiting: int
    """Jobs that wait for a worker."""
    active: int
    """Jobs that a worker holds."""
    succeeded: int
    """Jobs that succeeded and were kept."""
    failed: int
    """Jobs that finally failed and were kept."""
    delayed: int
    """Jobs that are not due yet."""
    newest_job: int
    """The last automatic id; 0: none was given yet."""


KEYS = ("id", "jobs", "stallBlock", "stalling", "waiting", "active", "succeeded", "failed", "delayed", "stalls")
"""All keys of a queue, below its prefix."""


CHECKED_AT_ONCE = 500
"""How many ids a slice of the stall check looks at."""
PAGES_RAISED_AT_ONCE = 2
"""How many pages of 1000 delayed jobs one call raises."""

MOST_ON_EVENTS = 30_000_000
"""The most bytes of an entry that the event connection carries: Redis cuts a subscriber when more than 32 MB wait for it."""
LOOKED_AT_BYTES = 1_000_000
"""How many bytes of entries one look reads, and those of one entry more: Redis serves others between two looks."""

ARGS_AN_ATTEMPT = 6
"""How many arguments `finish` has for each attempt."""


class Finished(NamedTuple):
    """The result of a `finish`."""

    answers: list[bool | CommandError]
    """For each attempt, in order: True: it settled its job; False: it came too late; or the error of Redis."""
    taken: list[Taken]
    refusal: CommandError | None
    """Redis's error, when it refused to take as many jobs as were asked for."""


class BlockingTake:
    """A blocking take, and the read that follows it in the same write. `on_end` gets it when both are answered."""

    __slots__ = ("_moved", "_on_end", "commands", "read_error", "take_error", "taken", "unread")

    def __init__(self, take: Packed, read: Packed, on_end: Callable[[BlockingTake], None]) -> None:
        self._on_end = on_end
        self._moved: bytes | None = None
        self.commands: tuple[Command, ...] = (
            Command(take, self._moved_one, repeat=take),
            Command(read, self._was_read, repeat=read, script=SCRIPTS["take"].text),
        )
        self.taken: list[Taken] = []
        """At the end: the job that was moved, and the jobs that the read has taken besides."""
        self.unread: str | None = None
        """At the end: the job that was moved, if the read did not find it."""
        self.take_error: BeeQueueError | None = None
        self.read_error: BeeQueueError | None = None

    @property
    def arriving(self) -> str | None:
        """The job that Redis has moved to `active`, while its data is on its way."""
        return None if self._moved is None else _text(self._moved)

    def _moved_one(self, reply: Any) -> None:
        """Handles the reply to the take: an id, None after `TAKE_WAIT_S`, or an error."""
        if isinstance(reply, BeeQueueError):
            self.take_error = reply
        elif isinstance(reply, bytes):
            self._moved = reply

    def _was_read(self, reply: Any) -> None:
        """Handles the reply to the read: the newest jobs in `active`, of which one may be ours, and the jobs that it took."""
        if isinstance(reply, BeeQueueError):
            self.taken, self.read_error = [], reply
        else:
            newest = 1 + 2 * reply[0]
            for index in range(1, newest, 2):
                if reply[index] == self._moved:
                    self.taken.append(Taken(_text(reply[index]), reply[index + 1]))
                    self._moved = None
                    break
            if len(reply) > newest:
                self.taken += _taken_in(reply, newest, len(reply))
        self.unread = None if self._moved is None else _text(self._moved)
        self._moved = None  # and no second time, if `on_end` raises: see `Command.answer`
        self.commands = ()  # they refer to this: a cycle would be left to the garbage collector
        self._on_end(self)


class Store:
    """One queue's data in Redis. Each docstring names the keys or the channel that its method touches.

    A callback gets a decoded reply, or the error that came instead: `CommandError`, `ConnectionLost`, `QueueClosed`. The
    `async` methods raise these.
    """

    def __init__(self, key_prefix: str, commands: Connection, takes: Connection | None, jobs: Connection) -> None:
        self._commands = commands
        self._takes = takes
        self._jobs = jobs
        self._prefix = key_prefix
        self.events_channel = self.key("events").encode()
        self.earlier_channel = self.key("earlierDelayed").encode()
        self._jobs_key = self.key("jobs").encode()
        self._stalling = self.key("stalling").encode()
        self._heads = {name: script.head(self.key) for name, script in SCRIPTS.items()}
        waiting, active = self.key("waiting").encode(), self.key("active").encode()
        self._blocking_take = Packed((b"BRPOPLPUSH", waiting, active, str(TAKE_WAIT_S).encode()))
        self._reads: dict[int, Packed] = {}

    def withdraw(self, command: Command) -> bool:
        """Takes back a command that waits because Redis is down; False when it was sent or answered."""
        connections = {self._jobs, self._commands, self._takes}
        return any(each is not None and each.withdraw(command) for each in connections)

    def wait(self, command: Command, answered: asyncio.Future[Answer]) -> Coroutine[Any, Any, Answer]:
        """Waits until the reply to a command that names one job completes `answered`; if cancelled, withdraws the command."""
        return self._jobs.wait(command, answered)

    def _send(self, script: str, *args: Any, on_reply: Callable[[Any], None], is_repeatable: bool = False) -> Command:
        """Sends a script call that names one job; returns it, for `withdraw` and `wait`."""
        call = (*self._heads[script], *args)
        command = Command(call, on_reply, repeat=call if is_repeatable else None, script=SCRIPTS[script].text)
        self._jobs.send(command)
        return command

    async def _call(self, script: str, *args: Any, on: Connection | None = None, unlimited: bool = False) -> Any:
        """Calls a script that is safe to repeat, on the command connection unless `on` is another; returns its reply."""
        call = (*self._heads[script], *args)
        text = SCRIPTS[script].text
        return await (on or self._commands).call(*call, repeatable=True, script=text, unlimited=unlimited)

    def key(self, suffix: str) -> str:
        """Returns the full name of a key or channel."""
        return self._prefix + suffix

    # --- producers ---------------------------------------------------------------------------------------------------

    def add(self, job_id: str, entry: bytes, delay: float | None, on_id: OnId) -> Command:
        """Stores a job and makes it available: now, in `waiting`, or at `delay` (epoch ms), in `delayed`.

        An empty `job_id` asks for the next automatic id. `on_id` gets the id, or None when it is in use.
        """

        def on_reply(reply: Any) -> None:
            on_id(reply if reply is None or isinstance(reply, BeeQueueError) else _text(reply))

        if delay is None:
            return self._send("add_job", _bytes(job_id), entry, on_reply=on_reply)
        return self._send("add_delayed_job", _bytes(job_id), entry, delay, on_reply=on_reply)

    def add_all(
        self, jobs: Iterable[tuple[str, bytes]], on_ids: Callable[[list[str | BeeQueueError | None] | BeeQueueError], None]
    ) -> Command:
        """Like `add`, for jobs that are available now, in one call; `on_ids` gets one answer for each job, or one error."""

        def on_reply(reply: Any) -> None:
            on_ids(reply if isinstance(reply, BeeQueueError) else [_id_or_error(each) for each in reply])

        args: list[bytes] = []
        for job_id, entry in jobs:
            args += (_bytes(job_id), entry)
        return self._send("add_jobs", *args, on_reply=on_reply)

    async def publish(self, message: bytes) -> int:
        """Publishes on `events`; returns how many subscribers it reached."""
        reached: int = await self._jobs.call(b"PUBLISH", self.events_channel, message)
        return reached

    async def look_up(self, job_ids: Sequence[str], link: Link | None = None) -> list[Found]:
        """Reads the states of jobs (`jobs`, `succeeded`, `failed`). `link` is for a connection that is still being set up."""
        found: list[Found] = []
        while len(found) < len(job_ids):
            args = (LOOKED_AT_BYTES, *map(_bytes, job_ids[len(found) :]))
            if link is None:
                reply = await self._call("look_up", *args, on=self._jobs)
            else:
                reply = await link.call(b"EVAL", SCRIPTS["look_up"].text, *self._heads["look_up"][2:], *args)
            texts = [text.decode(errors="replace") for text in reply]
            found += (Found(*texts[index : index + 3]) for index in range(0, len(texts), 3))
        return found

    async def ended(self, jobs: Sequence[tuple[str, str]]) -> set[str]:
        """Returns, of ids and stamps, the ids whose job has ended or is another job (`jobs`, `succeeded`, `failed`)."""
        found: set[str] = set()
        done = 0
        while done < len(jobs):
            args: list[bytes] = []
            for job_id, stamp in jobs[done:]:
                args += (_bytes(job_id), stamp.encode())
            looked_at, *ended = await self._call("ended", LOOKED_AT_BYTES, *args, on=self._jobs)
            done += looked_at
            found.update(map(_text, ended))
        return found

    # --- one job, by its id ------------------------------------------------------------------------------------------

    def get(self, job_id: str, on_stored: Callable[[Stored | BeeQueueError | None], None]) -> Command:
        """Reads a job (`jobs`, `succeeded`, `failed`); `on_stored` gets None when it has no entry.

        On the event connection it reads at most `MOST_ON_EVENTS` bytes.
        """

        def on_reply(reply: Any) -> None:
            if isinstance(reply, int):
                size = f"job {job_id} is stored in {reply:,} bytes, and get_job and Job.from_id read at most {MOST_ON_EVENTS:,}"
                on_stored(BeeQueueError(f"{size}; read it with get_jobs, or by a queue with ordered_events=False"))
            else:
                is_decoded = reply is None or isinstance(reply, BeeQueueError)
                on_stored(reply if is_decoded else Stored(reply[0], reply[1].decode()))

        limit = b"" if self._jobs is self._commands else MOST_ON_EVENTS
        return self._send("get_job", _bytes(job_id), limit, on_reply=on_reply, is_repeatable=True)

    def remove(self, job_id: str, on_removed: Callable[[BeeQueueError | None], None]) -> Command:
        """Takes a job out of every key. It is not repeated: the id may have been given to a new job meanwhile."""
        return self._send("remove_job", _bytes(job_id), on_reply=on_removed)

    def retry(self, job_id: str, on_retried: Callable[[Retried | BeeQueueError | None], None]) -> Command:
        """Moves a job from `failed` or `succeeded` to `waiting`; `on_retried` gets None when `jobs` has no entry."""

        def on_reply(reply: Any) -> None:
            on_retried(reply if reply is None or isinstance(reply, BeeQueueError) else Retried(*reply))

        return self._send("retry_job", _bytes(job_id), on_reply=on_reply)

    async def is_in(self, kind: str, job_id: str) -> bool:
        """Returns whether `kind`, a key that holds ids, holds this id."""
        command = {"waiting": b"LPOS", "active": b"LPOS", "delayed": b"ZSCORE"}.get(kind, b"SISMEMBER")
        reply = await self._jobs.call(command, self.key(kind), _bytes(job_id), repeatable=True)
        return reply is not None if command != b"SISMEMBER" else reply == 1

    # --- all jobs ----------------------------------------------------------------------------------------------------

    async def ids_from(self, kind: str, start: int, end: int) -> list[str]:
        """Returns ids of `waiting`, `active` (list order) or `delayed` (by time), from index `start` to `end`, inclusive."""
        command = b"ZRANGE" if kind == "delayed" else b"LRANGE"
        reply = await self._commands.call(command, self.key(kind), start, end, repeatable=True)
        return [_text(job_id) for job_id in reply]

    async def scan(self, kind: str, cursor: bytes, count: int) -> tuple[bytes, list[str]]:
        """Returns the next cursor (`0`: no more pages) and about `count` ids of `succeeded` or `failed`."""
        args = (b"SSCAN", self.key(kind), cursor, b"COUNT", count)
        cursor, page = await self._commands.call(*args, repeatable=True)
        return cursor, [_text(job_id) for job_id in page]

    async def entries(self, job_ids: Sequence[str]) -> list[bytes | None]:
        """Returns the entries in `jobs`; None for an id that has none."""
        if not job_ids:
            return []
        entries: list[bytes | None]
        entries = await self._commands.call(b"HMGET", self._jobs_key, *map(_bytes, job_ids), repeatable=True)
        return entries

    async def entries_on(self, link: Link, job_ids: Sequence[str]) -> list[bytes | None]:
        """Like `entries`, on a link that is still being set up. HGET is a right that a worker has anyway."""
        asking = [link.call(b"HGET", self._jobs_key, _bytes(job_id)) for job_id in job_ids]
        entries: list[bytes | None] = await asyncio.gather(*asking)
        return entries

    async def clean(self, kind: str, created_until: int, at_most: int, job_ids: Sequence[str]) -> int:
        """Deletes `at_most` of `job_ids`, if they are in `kind` and created by `created_until` (epoch ms); returns how many.

        It is not repeated: a repeat would delete `at_most` more, and nobody would know how many went the first time.
        """
        evalsha, sha, count, _, jobs = self._heads["clean"]
        args = (evalsha, sha, count, self.key(kind), jobs, created_until, at_most, *map(_bytes, job_ids))
        deleted: int = await self._commands.call(*args, script=SCRIPTS["clean"].text)
        return deleted

    async def check_health(self) -> Health:
        """Counts the jobs of each state, and reads the counter `id`."""
        return Health(*map(int, await self._call("check_health")))

    async def destroy(self) -> int:
        """Deletes all keys; returns how many there were."""
        deleted: int = await self._commands.call(b"DEL", *map(self.key, KEYS))
        return deleted

    # --- workers -----------------------------------------------------------------------------------------------------

    def take_blocking(self, finishes: Sequence[Command], more: int, on_end: Callable[[BlockingTake], None]) -> BlockingTake:
        """Waits up to `TAKE_WAIT_S` for a job, moves it from `waiting` to `active`, reads it, and takes at most `more` besides.

        `finishes`, made by `build_finish`, go first, in the same write.
        """
        assert self._takes is not None
        read = self._reads.get(more)
        if read is None:
            read = self._reads[more] = Packed((*self._heads["take"], more))
        take = BlockingTake(self._blocking_take, read, on_end)
        if self._takes.link is None:
            self.send_finishes(finishes)
            finishes = ()
        self._takes.send_all((*finishes, *take.commands), can_wait=bool(finishes))
        return take

    def withdraw_take(self, take: BlockingTake) -> bool:
        """Takes back a blocking take that waits because Redis is down; False when Redis may still answer it.

        If only the read waits, Redis has answered the take already, and its job is left to the stall check.
        """
        blocking, read = take.commands
        is_withdrawn = self.withdraw(read)
        if is_withdrawn:
            self.withdraw(blocking)
        return is_withdrawn

    def unblock(self, client_id: int | None, on_reply: Callable[[object], None]) -> None:
        """Ends a blocking take early (`CLIENT UNBLOCK`); without a client id, only asks whether Redis answers (`PING`).

        `on_reply` gets the reply, which tells nothing else, or an error.
        """
        args = (b"PING",) if client_id is None else (b"CLIENT", b"UNBLOCK", client_id)
        self._commands.send(Command(args, on_reply, unlimited=True))

    def moves(self, *, of_takes: bool) -> object:
        """A value that changes whenever data moves on the connection of takes, or of commands; good only for comparison."""
        connection = self._takes if of_takes else self._commands
        assert connection is not None
        return connection.moves

    def take(
        self, job_id: str, more: int, on_taken: Callable[[list[Taken] | BeeQueueError], None], *, on_takes: bool = False
    ) -> None:
        """Reads a job that was moved to `active` (an empty id: none was), and takes at most `more` jobs besides.

        With `on_takes` it uses the connection of blocking takes, on which none may be open.
        """

        def on_reply(reply: Any) -> None:
            on_taken(reply if isinstance(reply, BeeQueueError) else _taken_in(reply, 1, len(reply)))

        head, moved = self._heads["take"], _bytes(job_id)
        connection = self._takes if on_takes and self._takes is not None else self._commands
        # repeated, it takes nothing: the stall check brings back the jobs that the lost reply named
        repeat = (*head, 0, moved)
        command = Command((*head, more, moved), on_reply, repeat=repeat, script=SCRIPTS["take"].text, unlimited=True)
        command.resend = self._commands.send
        connection.send(command)

    def build_finish(
        self,
        attempts: Iterable[tuple[str, bytes, Settlement]],
        *,
        take: int,
        on_end: Callable[[Finished | BeeQueueError], None],
        is_repeat: bool = False,
    ) -> Command:
        """Builds the command that settles attempts, publishes their events, and takes at most `take` jobs; sends nothing.

        An attempt is the id of its job, the entry that was taken, and its settlement. With `is_repeat`, the same settlements
        may have been sent before: the command takes nothing, and settles a job only while `jobs` has the very entry that was
        taken. A command that is repeated after a lost connection does the same.
        """
        args = [*self._heads["finish"], take]
        entries = []
        for job_id, entry, (status, new_entry, message, retry_at) in attempts:
            if status == "retrying":
                how = "retry now" if retry_at is None else "retry later"
            else:
                how = "delete" if new_entry is None else status
            args += (_bytes(job_id), how, new_entry or b"", message, b"" if retry_at is None else retry_at, len(entry))
            entries.append(entry)
        repeat = functools.partial(self._repeat_of_finish, args, entries)
        on_reply = functools.partial(_finished, len(entries), on_end)
        # an open take may block the link of this command, so `resend` uses the command connection
        command = Command(
            tuple(args), on_reply, repeat=repeat, script=SCRIPTS["finish"].text, resend=self._commands.send, unlimited=True
        )
        if is_repeat:
            command.args, command.repeated = repeat(), True
        return command

    def _repeat_of_finish(self, args: Sequence[Any], entries: Sequence[bytes]) -> tuple[Any, ...]:
        """Returns the arguments of a repeated `finish`: it takes nothing, and knows each attempt by the SHA-1 of its entry."""
        at = len(self._heads["finish"])
        repeat = [*args]
        repeat[at] = 0
        shas = (hashlib.sha1(entry, usedforsecurity=False).hexdigest() for entry in entries)
        repeat[at + ARGS_AN_ATTEMPT :: ARGS_AN_ATTEMPT] = shas
        return tuple(repeat)

    def send_finishes(self, finishes: Sequence[Command]) -> None:
        """Sends commands of `build_finish`, in one write."""
        self._commands.send_all(finishes)

    def flush(self) -> None:
        """Writes all commands that were sent, without waiting for the next step of the loop."""
        self._commands.flush()

    def heartbeat(self, job_ids: Iterable[str]) -> asyncio.Future[Any]:
        """Reports running jobs: removes their ids from `stalling`. The command is written when this returns."""
        answered = asyncio.get_running_loop().create_future()
        args = (b"SREM", self._stalling, *map(_bytes, job_ids))
        self._commands.send(Command(args, functools.partial(complete, answered), repeat=args, unlimited=True))
        self._commands.flush()
        return answered

    def blocking_connection(self, timeout_s: float) -> BlockingConnection:
        """Returns a connection for a thread, beside those of the event loop; not open yet."""
        return BlockingConnection(self._commands.address, timeout_s)

    def heartbeat_blocking(self, connection: BlockingConnection, job_ids: Iterable[str]) -> None:
        """Like `heartbeat`, in a thread."""
        connection.call(b"SREM", self._stalling, *map(_bytes, job_ids))

    async def hand_back(self, job_ids: Sequence[str]) -> int:
        """Moves jobs from `active` back to the end of `waiting` where jobs are taken; returns how many.

        `job_ids` begins with the job that was taken last. It is not repeated when the connection is lost: another worker may
        have the jobs by then.
        """
        args = (*self._heads["hand_back"], *map(_bytes, job_ids))
        handed: int = await self._commands.call(*args, script=SCRIPTS["hand_back"].text, unlimited=True)
        return handed

    # --- the two clocks ----------------------------------------------------------------------------------------------

    async def check_stalled(
        self, stall_interval_ms: int, max_stalls: int | None
    ) -> AsyncIterator[tuple[list[str], list[Taken]]]:
        """Moves the jobs of silent workers from `active` to `waiting`, slice by slice.

        Yields the ids that it moved, and the jobs that have stalled more than `max_stalls` times. Those stay in `active`, for
        `settle_stalled`.
        """
        limit = b"" if max_stalls is None else max_stalls
        args = (stall_interval_ms, limit, STALLS_KEPT_MS, CHECKED_AT_ONCE, uuid.uuid4().hex)
        step, is_over = b"", False
        while not is_over:
            step, stalled, too_often = await self._call("check_stalled_jobs", *args, step, unlimited=True)
            yield [_text(job_id) for job_id in stalled], _taken_in(too_often, 0, len(too_often))
            is_over = not step

    async def settle_stalled(self, taken: Taken, settlement: Settlement) -> bool:
        """Settles the attempt of a worker that is gone; False when the job was settled, removed or handed on meanwhile."""
        ended: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        on_end = functools.partial(complete, ended)
        # the id may be another attempt's by now, or a new job's
        command = self.build_finish([(*taken, settlement)], take=0, on_end=on_end, is_repeat=True)
        command.repeat = None  # if the reply is lost, the next check finds the job again, if it is still there
        self.send_finishes((command,))
        (answer,) = (await ended).answers
        if isinstance(answer, CommandError):
            raise answer
        return answer

    async def raise_delayed(self, now_ms: int, debounce_ms: int) -> tuple[int, float]:
        """Moves due jobs from `delayed` to `waiting`; returns how many, and when to look again (epoch ms; -1: nothing is left).

        Returns `now_ms` as the time when more jobs are due than one call moves.
        """
        raised, look_again = await self._call("raise_delayed_jobs", now_ms, debounce_ms, PAGES_RAISED_AT_ONCE, unlimited=True)
        return raised, float(look_again)


def _taken_in(reply: Sequence[Any], start: int, end: int) -> list[Taken]:
    """Decodes the jobs in a flat list: id, JSON or None, id, JSON or None, …"""
    return [
        Taken(_text(reply[index]), LARGE if reply[index + 1] is None else reply[index + 1]) for index in range(start, end, 2)
    ]


def _id_or_error(reply: Any) -> str | CommandError | None:
    """Decodes the reply of `add_jobs` for one job."""
    if isinstance(reply, ReplyError):
        return CommandError(str(reply))
    return None if reply is None else _text(reply)


def _finished(attempts: int, on_end: Callable[[Finished | BeeQueueError], None], reply: Any) -> None:
    """Decodes the reply to a `finish`: an answer for each attempt; id and JSON of each job that was taken; perhaps an error."""
    if isinstance(reply, BeeQueueError):
        on_end(reply)
        return
    answers = [answer == 1 if type(answer) is int else CommandError(str(answer)) for answer in reply[:attempts]]
    if len(answers) < attempts:
        raise ValueError(f"{attempts} attempts have {len(answers)} answers")
    taken, refusal, count = [], None, len(reply)
    if count > attempts:
        taken = _taken_in(reply, attempts, count - 1)
        refusal = CommandError(str(reply[-1])) if (count - attempts) % 2 else None
    on_end(Finished(answers, taken, refusal))
