"""Everything said to Redis: the keys, the scripts, and one method for each transition.

The data model, all keys and channels below `<prefix>:<name>:`

    key             type        holds                                     written by
    id              string      the last automatic id                     add
    jobs            hash        id -> job JSON: data, options, status,    add, finish, remove
                                progress, in that order
    waiting         list        ids; pushed left, taken right             add, retry, raise, stall check, hand back
    active          list        ids being processed                       take; finish, hand back, stall check
    succeeded       set         ids; or nowhere, with remove_on_success   finish
    failed          set         ids; or nowhere, with remove_on_failure   finish
    delayed         sorted set  ids by activation time, epoch ms          add, finish; raise
    stalling        set         a copy of active, less the ids whose      stall check; heartbeat, finish
                                worker has reported since
    stallBlock      string      "1", expires: one stall check an interval stall check
    events          channel     {"id":…,"event":…,"data":…}               finish, progress
    earlierDelayed  channel     epoch ms: look again at this time         add, finish

The life of a job; each arrow is one atomic step

                   add ──────────► waiting ──── take ────► active ──── finish ────► succeeded | failed | gone
                    │                 ▲ ▲ ▲                 │  │ │
                    └──► delayed ─────┘ │ └─ retry now ─────┘  │ └─ retry later ──► delayed
                               raise    └── stall check, hand back

Commands that name one job go on the connection that also carries events, when the queue is ordered: in call order, and
each before what it causes. What may be large or belongs to a worker goes on the command connection; takes on their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beequeue.connection import Connection
from beequeue.link import Command, Link

TAKE_WAIT_S = 5
"""How long Redis holds a take open: finite, so that a half-open socket is noticed."""

Reply = Callable[[Any], None]


class Script(NamedTuple):
    """A Lua script; `sha` is how Redis knows it."""

    name: str
    text: str
    sha: str


def _read(path: Path) -> Script:
    text = path.read_text(encoding="utf-8")
    return Script(path.stem, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


SCRIPTS = {path.stem: _read(path) for path in sorted((Path(__file__).parent / "lua").glob("*.lua"))}


class Settlement(NamedTuple):
    """How a finished run leaves its job: what `finish` writes."""

    status: str
    """`succeeded`, `failed` or `retrying`."""
    entry: bytes
    """The job JSON to store; empty: delete it."""
    message: bytes
    """The message for the events channel; empty: none."""
    retry_at: int | None = None
    """With `retrying`: the activation time in epoch ms, or None for at once."""


class Taken(NamedTuple):
    """A job that has been moved to `active` for this worker."""

    id: str
    entry: bytes


class Found(NamedTuple):
    """What `look_up` tells of one id."""

    state: str
    """`open`, `succeeded`, `failed` or `gone`."""
    timestamp: str
    """The entry's own, to tell a job from another one with its id."""
    trace: str
    """The newest stack trace."""


class Store:
    """One queue's data in Redis. Every method names its key or message."""

    def __init__(self, key_prefix: str, commands: Connection, takes: Connection | None, jobs: Connection) -> None:
        self._commands = commands
        self._takes = takes
        self._jobs = jobs
        self._prefix = key_prefix
        key = self.key
        self.events_channel = key("events").encode()
        self.earlier_channel = key("earlierDelayed").encode()
        self._stalling = key("stalling")
        waiting, active, jobs_key = key("waiting"), key("active"), key("jobs")
        self._add_job = _head("add_job", key("id"), jobs_key, waiting)
        self._add_delayed_job = _head("add_delayed_job", key("id"), jobs_key, key("delayed"), self.earlier_channel)
        self._finish = {
            status: _head(
                "finish", active, self._stalling, jobs_key, waiting, key(where), self.events_channel, self.earlier_channel
            )
            for status, where in (("succeeded", "succeeded"), ("failed", "failed"), ("retrying", "delayed"))
        }
        self._look_up = _head("look_up", jobs_key, key("succeeded"), key("failed"))
        self._take = _head("take", jobs_key, waiting, active)
        self._hand_back = _head("hand_back", active, self._stalling, jobs_key, waiting)
        self._check_stalled = _head("check_stalled_jobs", key("stallBlock"), self._stalling, waiting, active)
        self._raise_delayed = _head("raise_delayed_jobs", key("delayed"), waiting)
        self._blocking_take = (b"BRPOPLPUSH", waiting.encode(), active.encode(), str(TAKE_WAIT_S).encode())

    def key(self, suffix: str) -> str:
        """The full name of a key or channel."""
        return self._prefix + suffix

    # --- producers ---------------------------------------------------------------------------------------------------

    def add(self, job_id: str, entry: bytes, delay: int | None, on_reply: Reply) -> None:
        """Stores a job and makes it available, now or (in `delayed`) at `delay`; the reply is its id, or None."""
        if delay is None:
            command = Command((*self._add_job, job_id, entry), on_reply, script=SCRIPTS["add_job"].text)
        else:
            args = (*self._add_delayed_job, job_id, entry, delay)
            command = Command(args, on_reply, script=SCRIPTS["add_delayed_job"].text)
        self._jobs.send(command)

    async def publish(self, message: bytes) -> int:
        """Publishes on `events`; returns how many subscribers it reached."""
        reached: int = await self._jobs.call(b"PUBLISH", self.events_channel, message)
        return reached

    async def look_up(self, link: Link, job_ids: Sequence[str]) -> list[Found]:
        """Reads what has become of jobs (`jobs`, `succeeded`, `failed`), on a link that is being set up."""
        reply = await link.call(b"EVAL", SCRIPTS["look_up"].text, *self._look_up[2:], *map(_bytes, job_ids))
        texts = [text.decode(errors="replace") for text in reply]
        return [Found(*texts[index : index + 3]) for index in range(0, len(texts), 3)]

    # --- workers -----------------------------------------------------------------------------------------------------

    def take_blocking(self, on_reply: Reply) -> Command:
        """Waits for a job and moves its id from `waiting` to `active`; the reply is the id, or None after 5 s."""
        assert self._takes is not None
        command = Command(self._blocking_take, on_reply, repeat=self._blocking_take)
        self._takes.send(command)
        return command

    def withdraw_take(self, command: Command) -> bool:
        """Takes back a take that waits for its connection; False when Redis has it, or has answered."""
        assert self._takes is not None
        return self._takes.withdraw(command)

    def unblock(self, client_id: int) -> None:
        """Ends a blocking take early (`CLIENT UNBLOCK`); a refusal is ignored, since the take is finite anyway."""
        self._commands.send(Command((b"CLIENT", b"UNBLOCK", client_id), _ignore))

    def take(self, job_id: str | bytes, more: int, on_reply: Reply) -> None:
        """Reads a job that is in `active`, and takes at most `more` besides; the reply is for `taken_from`."""
        args = (*self._take, job_id, more)
        # a job that only the lost reply named comes back by the stall check
        repeat = (*self._take, job_id, 0)
        self._commands.send(Command(args, on_reply, repeat=repeat, script=SCRIPTS["take"].text))

    @staticmethod
    def job_id(reply: bytes) -> str:
        """The id in a reply to `take_blocking`."""
        return _text(reply)

    @staticmethod
    def taken_from(reply: Sequence[bytes]) -> Iterator[Taken]:
        """The jobs in a reply to `take`."""
        for index in range(0, len(reply), 2):
            yield Taken(_text(reply[index]), reply[index + 1])

    def finish(self, job_id: str, settlement: Settlement, *, take_next: bool, on_reply: Reply) -> Command:
        """Settles a job, publishes its event and takes the next one; the reply is for `finished_from`."""
        status, entry, message, retry_at = settlement
        if status != "retrying":
            how, when = "set", ""
        elif retry_at is None:
            how, when = "retry now", ""
        else:
            how, when = "retry later", str(retry_at)
        settle = (*self._finish[status], _bytes(job_id), how, entry, message, when)
        repeat = (*settle, b"0")
        args = (*settle, b"1") if take_next else repeat
        command = Command(args, on_reply, repeat=repeat, script=SCRIPTS["finish"].text)
        self._commands.send(command)
        return command

    @staticmethod
    def finished_from(reply: Sequence[Any]) -> tuple[bool, Taken | None]:
        """Whether `finish` settled the job, and the job that it took."""
        if len(reply) == 1:
            return reply[0] == 1, None
        return reply[0] == 1, Taken(_text(reply[1]), reply[2])

    async def heartbeat(self, job_ids: Iterable[str]) -> None:
        """Reports running jobs: takes their ids out of `stalling`."""
        await self._commands.call(b"SREM", self._stalling, *map(_bytes, job_ids), repeatable=True)

    async def hand_back(self, job_ids: Sequence[str]) -> int:
        """Returns jobs from `active` to where `waiting` is taken, the one taken last first; how many it were."""
        args = (*self._hand_back, *map(_bytes, job_ids))
        handed: int = await self._commands.call(*args, repeatable=True, script=SCRIPTS["hand_back"].text)
        return handed

    # --- the two clocks ----------------------------------------------------------------------------------------------

    async def check_stalled(self, stall_interval_ms: int) -> list[str]:
        """Moves the jobs of silent workers from `active` to `waiting`; returns their ids."""
        args = (*self._check_stalled, stall_interval_ms)
        reply = await self._commands.call(*args, repeatable=True, script=SCRIPTS["check_stalled_jobs"].text)
        return [_text(job_id) for job_id in reply]

    async def raise_delayed(self, now_ms: int, debounce_ms: int) -> tuple[int, float]:
        """Moves due jobs from `delayed` to `waiting`; returns how many, and when to look again (-1: nothing left)."""
        args = (*self._raise_delayed, now_ms, debounce_ms)
        raised, look_again = await self._commands.call(*args, repeatable=True, script=SCRIPTS["raise_delayed_jobs"].text)
        return raised, float(look_again)


def _head(script: str, *keys: str | bytes) -> tuple[bytes, ...]:
    """A script call up to its arguments, encoded once."""
    encoded = (key if isinstance(key, bytes) else key.encode() for key in keys)
    return (b"EVALSHA", SCRIPTS[script].sha.encode(), str(len(keys)).encode(), *encoded)


def _text(job_id: bytes) -> str:
    """An id as a string; what is not UTF-8 survives the way back."""
    return job_id.decode("utf-8", "surrogateescape")


def _bytes(job_id: str) -> bytes:
    return job_id.encode("utf-8", "surrogateescape")


async def load_scripts(link: Link) -> None:
    """Makes the server know every script (`SCRIPT LOAD`)."""
    for script in SCRIPTS.values():
        await link.call(b"SCRIPT", b"LOAD", script.text)


def _ignore(reply: Any) -> None:
    pass
