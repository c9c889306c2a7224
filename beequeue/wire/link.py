"""One socket from its opening to its end: many commands in flight, answered in order. It never reconnects.

redis-py opens and authenticates the connection; then `Link` replaces the transport's protocol, feeds a hiredis reader and
answers commands first in, first out. redis-py's own client would open a connection for each concurrent command.

Three rules must not be broken:
- A reply is handled in the step that parses it, so nothing can come between a reply and the push that follows it.
- The reader yields bytes, because one undecodable byte must not raise out of the parser.
- SUBSCRIBE is sent alone: a push confirms it, but a refusal is an ordinary reply. No other push answers a command.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hiredis

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost

try:
    from fcntl import ioctl
    from termios import TIOCOUTQ
except ImportError:  # not a Unix
    ioctl = None  # type: ignore[assignment]

TICK_S = 1.0
REPLY_TICKS = 10
"""How many ticks may pass without any data in either direction, while Redis owes a reply, before the owner looks into it."""
SLOWEST_BYTES_S = 500_000
"""The slowest rate at which a relay may empty its buffers. It holds what was written last, and its progress is invisible."""
QUIET_TICKS = 5
"""After how many silent ticks an idle link sends a question, so that no relay forgets the connection."""

LONE_REPLY_BYTES = 8
"""The size of a reply to a settlement that brings no job: `*1\r\n:1\r\n`."""
LONE_REPLY_S = 0.025
"""How long the kernel may keep such a reply when no other follows."""

UNFIT = re.compile(r"(?:(?:ERR|@user_script).*: -)?(READONLY|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY) ", re.DOTALL)
"""Refusals because of the server's state, not because of the command, which had no effect. Redis 6 wraps those of a script."""

_INCOMPLETE = object()
_RESP2_PUSHES = (b"message", b"subscribe", b"unsubscribe")


class Packed(tuple[Any, ...]):
    """Arguments of a command that is sent often: their form on the wire is computed once."""

    @functools.cached_property
    def packed(self) -> bytes:
        packed: bytes = hiredis.pack_command(self)
        return packed


class Command:
    """A command and the function that receives its reply.

    `on_reply` gets the reply or an exception: `CommandError`, or `ConnectionLost` when no reply will come. `repeat` holds the
    arguments to send if the connection is lost before the reply (`repeated` is then True), or a function that makes them; None
    means that repeating is not safe. `script` is the source to send when the server does not know the script; `resend` sends it
    when this link may be blocked. `losses` counts the links that were lost while this reply was the next one due. An
    `unlimited` command waits for a connection that is down, however many others wait.
    """

    __slots__ = ("args", "losses", "on_reply", "repeat", "repeated", "resend", "script", "unlimited")

    def __init__(
        self,
        args: tuple[Any, ...],
        on_reply: Callable[[Any], None],
        *,
        repeat: tuple[Any, ...] | Callable[[], tuple[Any, ...]] | None = None,
        script: str | None = None,
        resend: Callable[[Command], None] | None = None,
        unlimited: bool = False,
    ) -> None:
        self.args = args
        self.on_reply = on_reply
        self.repeat = repeat
        self.repeated = False
        self.losses = 0
        self.script = script
        self.resend = resend
        self.unlimited = unlimited

    def answer(self, reply: Any) -> bool:
        """Passes the reply on; returns False when this command cannot have such a reply.

        The caller then gets `ConnectionLost`. If a reply is extra, for example, every later command would get the reply to
        another.
        """
        try:
            self.on_reply(reply)
        except Exception as error:
            context = {"message": f"failed to handle the reply to {self.args[0]!r}", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            with suppress(Exception):  # it may refuse to repeat what it has done already
                self.on_reply(ConnectionLost("Redis's answer does not fit this command", maybe_applied=True))
            return False
        return True


class Link(asyncio.Protocol):
    """A live socket. `lost` completes with the reason when the socket ends; `error` is the transport's own reason.

    `on_stuck` is called after `REPLY_TICKS` in which Redis owes a reply and no data moves, plus the time that a slow relay may
    need for what it holds; then again at growing intervals. Set `on_unfit` once the link is up: it receives each command that
    Redis refused because of its own state, together with the refusal, and is responsible for the command from then on.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        keep: object,
        on_message: Callable[[bytes, bytes], None] | None = None,
        on_read_end: Callable[[], None] | None = None,
        on_stuck: Callable[[Link], None] | None = None,
        resp2_pushes: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._keep = keep  # dropping it would close the transport
        self._on_message = on_message or _ignore
        self._on_read_end = on_read_end or _ignore
        self._on_stuck = on_stuck or _ignore
        self._resp2_pushes = resp2_pushes
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._in_flight: deque[Command] = deque()
        self._unsent: list[bytes] = []
        self._reason = "closed by Redis"
        self._written = self._delivered = self._expected = self._arrived = 0
        self._has_heard = True
        self._is_primary: bool | None = None
        self._leaving = False
        self.on_unfit: Callable[[Command | None, str], None] | None = None
        self._next_look = REPLY_TICKS
        self._holds_back: asyncio.TimerHandle | None = None
        self._held_back_since = 0.0
        self._can_hold_back = sys.platform == "linux"
        self.still_ticks = 0
        """How many ticks have passed since data last moved."""
        self.moves = 0
        """How often data were seen to move."""
        self.down = False
        self.error: Exception | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        if transport.is_closing():  # the transport has already told the driver, and will not tell us
            self.connection_lost(None)
            return
        transport.set_protocol(self)
        transport.resume_reading()

    @property
    def takes_commands(self) -> bool:
        """Whether it takes any command: in RESP2 a subscriber may send nothing but PING."""
        return not self._resp2_pushes

    # --- commands -----------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Issues a command: at once when nothing is in flight, else in one write with all others of this step of the loop."""
        self.send_all((command,))

    def send_all(self, commands: Sequence[Command], *, can_wait: bool = False) -> None:
        """Issues commands in order, in one write. With `can_wait` the reply to the first one may be late."""
        if can_wait:
            self._hold_back()
        packed = [
            command.args.packed if type(command.args) is Packed else hiredis.pack_command(command.args) for command in commands
        ]
        if not self._in_flight and not self.down:
            # there is nothing to combine with, so a later write would only cost another step of the loop
            self._write(packed)
        else:
            if not self._unsent:
                self._loop.call_soon(self.flush)
            self._unsent += packed
        self._in_flight.extend(commands)

    def flush(self) -> None:
        """Writes all issued commands now; otherwise the loop does so in its next step."""
        unsent = self._unsent
        if unsent and not self.down:
            self._write(unsent)
            unsent.clear()

    def _write(self, packed: list[bytes]) -> None:
        data = packed[0] if len(packed) == 1 else b"".join(packed)
        self._written += len(data)
        self._transport.write(data)

    def drop(self, reason: str) -> None:
        """Cuts the socket; `lost` completes soon."""
        self._reason = reason
        self._abort()

    def leave(self, reason: str) -> None:
        """Cuts the socket once every command in flight has its reply; the owner sends no more."""
        self._reason = reason
        self._leaving = True
        self._drop_when_left()

    def _drop_when_left(self) -> None:
        if self._leaving and not self._in_flight:
            self._abort()

    def _abort(self) -> None:
        """Ends the socket, including a forked child's copy: that copy would keep it open, and Redis would send it jobs."""
        with suppress(OSError):
            self._on_socket(lambda own: own.shutdown(socket.SHUT_RDWR))
        self._transport.abort()

    def _on_socket(self, work: Callable[[socket.socket], None]) -> None:
        """Calls `work` with a socket object of our own, since uvloop's refuses most calls; raises `OSError`."""
        theirs = self._transport.get_extra_info("socket")
        if theirs is not None and theirs.fileno() >= 0:
            own = socket.socket(theirs.family, theirs.type, fileno=theirs.fileno())
            try:
                work(own)
            finally:
                own.detach()

    def orphans(self) -> tuple[list[Command], list[Command]]:
        """Takes a lost link's commands: those that were written and got no reply, and those that were never written."""
        commands = list(self._in_flight)
        self._in_flight.clear()
        written = len(commands) - len(self._unsent)
        self._unsent.clear()
        return commands[:written], commands[written:]

    # --- replies ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        in_flight = self._in_flight
        self.still_ticks = 0
        self.moves += 1
        self._has_heard = True
        pushed = False
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _INCOMPLETE:
                kind = type(reply)
                if kind is hiredis.PushNotification or (
                    self._resp2_pushes and kind is list and reply and reply[0] in _RESP2_PUSHES
                ):
                    if reply[0] == b"message":
                        pushed = True
                        self._on_message(reply[1], reply[2])
                        continue
                    if reply[0] != b"subscribe":
                        continue
                    # falls through as the reply to SUBSCRIBE, which is the only command in flight
                if not in_flight:
                    raise hiredis.ProtocolError(f"a reply without a command: {reply!r}"[:200])
                command = in_flight.popleft()
                if kind is hiredis.ReplyError:
                    self._refused(command, str(reply))
                elif kind is list and reply and type(reply[0]) is hiredis.ReplyError and UNFIT.match(str(reply[0])):
                    self._refused(command, str(reply[0]))  # a script caught the refusal of its first write
                elif not command.answer(reply):
                    self.drop(f"Redis's answer does not fit {command.args[0]!r}")
                    break
        except hiredis.HiredisError as error:
            self.drop(f"Redis sent unreadable data: {error}")
        except Exception as error:
            # unreadable data raises in this function itself (the reader, or a push without its parts), or in a callback that
            # got a channel or payload of the wrong type; everything else is a fault of ours
            if _raised_in_a_callback(error) and not _is_broken(reply):
                raise
            self.drop(f"Redis sent unreadable data: neither a reply nor a message ({type(error).__name__}: {error})")
        if pushed:
            self._on_read_end()
        if self._leaving:
            self._drop_when_left()

    def _refused(self, command: Command, message: str) -> None:
        if command.script is not None and message.startswith("NOSCRIPT"):
            # EVAL runs the script and loads it into the server's cache again
            command.args = (b"EVAL", command.script, *command.args[2:])
            (command.resend or self.send)(command)
        elif self.on_unfit is not None and UNFIT.match(message):
            self.on_unfit(command, message)
        else:
            command.answer(CommandError(with_refused_command(message, command.script)))

    # --- replies that need not wake the process -----------------------------------------------------------------------

    def _hold_back(self) -> None:
        """Lets the kernel keep the reply to a lone settlement until more follows, at most for `LONE_REPLY_S`.

        That reply would wake the process for nothing, as the take after it stays open. One timer serves any number of such
        replies: it lowers the limit once no `_hold_back` has come for that long, and the kernel then reports what it has.
        """
        self._held_back_since = self._loop.time()
        if self._holds_back is None and self._can_hold_back:
            self._can_hold_back = self._set_low_water(LONE_REPLY_BYTES + 1)
            if self._can_hold_back:
                self._holds_back = self._loop.call_later(LONE_REPLY_S, self._let_through)

    def _let_through(self) -> None:
        at = self._held_back_since + LONE_REPLY_S
        if self._loop.time() < at:
            self._holds_back = self._loop.call_at(at, self._let_through)
        else:
            self._holds_back = None
            self._set_low_water(1)

    def _set_low_water(self, size: int) -> bool:
        """Sets how many bytes must arrive before the kernel reports any; returns False where this cannot be set."""
        own = self._transport.get_extra_info("socket")
        if own is None or own.family not in (socket.AF_INET, socket.AF_INET6) or self._transport.get_extra_info("sslcontext"):
            return False
        try:
            self._on_socket(lambda own: own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size))
        except OSError:
            return False
        return True

    # --- life ---------------------------------------------------------------------------------------------------------

    def connection_lost(self, error: Exception | None) -> None:
        self.down = True
        self.error = error
        self._ticker.cancel()
        if self._holds_back is not None:
            self._holds_back.cancel()
        if not self.lost.done():
            self.lost.set_result(str(error) if error else self._reason)
        self._keep = None

    def _tick(self) -> None:
        """Counts how long no data has moved. TCP keep-alive alone cannot see a relay that goes silent."""
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        self.still_ticks += 1
        if self.still_ticks == 1:
            self._next_look = REPLY_TICKS
        if not self._in_flight:
            if self.still_ticks >= QUIET_TICKS:
                self._ask()
        elif self._has_delivered():
            self.still_ticks = 0
            self.moves += 1
        else:
            on_the_way = self._expected - self._arrived
            late_ticks = self.still_ticks - int(on_the_way / SLOWEST_BYTES_S / TICK_S)
            if late_ticks >= self._next_look:
                self._next_look += min(self._next_look, 6 * REPLY_TICKS)
                self._on_stuck(self)

    def _has_delivered(self) -> bool:
        """Whether more of the written bytes reached the other side since the last tick: a slow link is not a dead one.

        Only bytes written before the first tick after the last arrival count. A link that swallows everything is dead.
        """
        if self._has_heard:
            to_come = sum(map(len, self._unsent))  # the tick may come between a reply and the flush of new commands
            self._has_heard, self._arrived, self._expected = False, self._expected, self._written + to_come
        left = self._transport.get_write_buffer_size()
        if ioctl is not None:
            try:  # bytes that the kernel has not sent, or the other side has not acknowledged
                queued = ioctl(self._transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(4))
                left += int.from_bytes(queued, sys.byteorder)
            except (OSError, AttributeError):
                pass
        before, self._delivered = self._delivered, max(self._delivered, min(self._expected, self._written - left))
        return self._delivered > before

    # --- the server at the other end ----------------------------------------------------------------------------------

    async def is_primary(self) -> bool | None:
        """Whether the server is a primary, by `ROLE`; None if the user may not ask. Raises the refusal of one not ready."""
        replies = await asyncio.gather(self.call(b"PING"), self.call(b"ROLE"), return_exceptions=True)
        for reply in replies:
            may_not_ask = isinstance(reply, CommandError) and reply.code != "NOAUTH" and not UNFIT.match(str(reply))
            if isinstance(reply, BaseException) and not may_not_ask:
                raise reply
        self._note_role(replies[1])
        return self._is_primary

    def _ask(self) -> None:
        """Keeps an idle link alive, and notices when the server has become a replica."""
        if self._is_primary is None or self._resp2_pushes:  # in RESP2 a subscriber may send nothing but PING
            self.send(Command((b"PING",), _ignore, resend=_ignore))
        else:
            self.send(Command((b"ROLE",), self._note_role, resend=_ignore))

    def _note_role(self, reply: Any) -> None:
        was_primary = self._is_primary
        self._is_primary = reply[0] == b"master" if type(reply) is list and reply else None
        if was_primary and self._is_primary is False and self.on_unfit is not None:
            self.on_unfit(None, "READONLY the server has become a replica")

    async def call(self, *args: Any) -> Any:
        """Issues one command and waits for its reply; raises `RedisFailure`."""
        future = self._loop.create_future()
        self.send(Command(args, lambda reply: complete(future, reply)))
        await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ConnectionLost(f"the connection was lost: {self.lost.result()}", maybe_applied=True)
        return future.result()


def _raised_in_a_callback(error: Exception) -> bool:
    """Whether a Python function called by the catching one raised `error`; a C function, such as the reader's, has no frame."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def _is_broken(message: Any) -> bool:
    """Whether a message has anything but bytes for its channel or payload."""
    return isinstance(message, list) and not all(type(part) is bytes for part in message)


def with_refused_command(message: str, script: str | None) -> str:
    """A refusal with the name of the command in `script` that Redis refused; its own message has only the line's number."""
    at = re.search(r"user_script:\s*(\d+)", message)
    if script is None or at is None:
        return message
    line = script.splitlines()[int(at[1]) - 1 : int(at[1])]
    commands = re.findall(r"redis\.p?call\('(\w+)'", "".join(line))
    return f"{message} ({' or '.join(commands)})" if commands else message


def complete(future: asyncio.Future[Any], reply: Any) -> None:
    """Completes `future` with a reply, or with the exception that came instead."""
    if future.done():  # the caller that waited was cancelled
        return
    if isinstance(reply, BeeQueueError):
        future.set_exception(reply)
        future.exception()  # retrieved: asyncio must not complain when the caller is cancelled in this step
    else:
        future.set_result(reply)


def _ignore(*_: Any) -> None:
    pass
