"""One life of one socket: many commands in flight, answered in order; no reconnecting.

redis-py opens and authenticates a connection; then the transport's protocol is replaced by `Link`, which feeds a hiredis
reader and answers a FIFO of commands. redis-py's own client would give each concurrent command a connection of its own.

Rules that hold here and must not be broken:
- replies are handled in the step that parses them, so that nothing can come between a reply and the push behind it;
- the reader yields bytes: one undecodable byte must not raise out of the parser;
- SUBSCRIBE goes alone: a push confirms it, but a refusal is an ordinary reply; no other push answers a command.
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
"""For how many ticks nothing may move, in either direction, while a reply is owed, before the owner looks into it."""
SLOWEST_BYTES_S = 500_000
"""How fast something on the way may empty its buffers: it has what was written last, and nothing tells of its progress."""
QUIET_TICKS = 5
"""After how many silent ticks an idle link asks something, so that nothing on the way forgets it."""

LONE_REPLY_BYTES = 8
"""The size of a settlement's reply that brings no job: `*1\r\n:1\r\n`."""
LONE_REPLY_S = 0.025
"""How long the kernel may keep such a reply when no other one follows."""

UNFIT = re.compile(r"(?:(?:ERR|@user_script).*: -)?(READONLY|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY) ", re.DOTALL)
"""Refusals that tell about the server and not about the command, which did nothing. Redis 6 wraps those of a script."""

_INCOMPLETE = object()
_RESP2_PUSHES = (b"message", b"subscribe", b"unsubscribe")


class Packed(tuple[Any, ...]):
    """A command's arguments that are sent often: how the wire has them is made out once."""

    @functools.cached_property
    def packed(self) -> bytes:
        packed: bytes = hiredis.pack_command(self)
        return packed


class Command:
    """A command and what becomes of its reply.

    `on_reply` gets the reply, or an exception: `CommandError`, or `ConnectionLost` when there will be no reply. `repeat` is
    what to send if the connection is lost before the reply (`repeated` then tells); None: it is not safe to repeat. `script`
    is the text to send instead when the server does not know the script; `resend` sends it, where this link may be blocked.
    `losses` counts the links that were lost while they owed this reply before all others.
    """

    __slots__ = ("args", "losses", "on_reply", "repeat", "repeated", "resend", "script")

    def __init__(
        self,
        args: tuple[Any, ...],
        on_reply: Callable[[Any], None],
        *,
        repeat: tuple[Any, ...] | None = None,
        script: str | None = None,
        resend: Callable[[Command], None] | None = None,
    ) -> None:
        self.args = args
        self.on_reply = on_reply
        self.repeat = repeat
        self.repeated = False
        self.losses = 0
        self.script = script
        self.resend = resend

    def answer(self, reply: Any) -> bool:
        """Hands the reply on; False when it was none that this command can have.

        The asker then gets `ConnectionLost`: a reply too many, say, would give each command behind it another one's reply.
        """
        try:
            self.on_reply(reply)
        except Exception as error:
            context = {"message": f"handling the reply to {self.args[0]!r}", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            with suppress(Exception):  # what it has done already it may refuse to do again
                self.on_reply(ConnectionLost("what Redis answered is no answer to this command", maybe_applied=True))
            return False
        return True


class Link(asyncio.Protocol):
    """A live socket. `lost` completes, with the reason, when it is one no more; `error` is what the transport gave for it.

    `on_stuck` is called after `REPLY_TICKS` in which a reply is owed and nothing moves (later by what something on the way may
    hold back), and again after longer and longer. Set `on_unfit` once the link is up: it
    gets each command that Redis refused because of its own state, and the refusal, and answers for the command from then on.
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
        self._keep = keep  # what would close the transport if it were dropped
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
        """For how many ticks nothing has moved."""
        self.down = False
        self.error: Exception | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        if transport.is_closing():  # nobody would tell: whom the transport has told is the driver
            self.connection_lost(None)
            return
        transport.set_protocol(self)
        transport.resume_reading()

    # --- commands ----------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Issues a command: at once when nothing is in flight; else what one step of the loop issues leaves in one write."""
        self.send_all((command,))

    def send_all(self, commands: Sequence[Command], *, can_wait: bool = False) -> None:
        """Issues commands one behind the other, in one write. With `can_wait` the reply to the first one may be late."""
        if can_wait:
            self._hold_back()
        packed = [
            command.args.packed if type(command.args) is Packed else hiredis.pack_command(command.args) for command in commands
        ]
        if not self._in_flight and not self.down:
            # nothing to join with: a later write would only cost the loop another turn
            self._write(packed)
        else:
            if not self._unsent:
                self._loop.call_soon(self.flush)
            self._unsent += packed
        self._in_flight.extend(commands)

    def flush(self) -> None:
        """Writes what has been issued; the loop does so a turn after it was."""
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
        """Cuts the socket when every command in flight has its reply; the owner sends no more."""
        self._reason = reason
        self._leaving = True
        self._drop_when_left()

    def _drop_when_left(self) -> None:
        if self._leaving and not self._in_flight:
            self._abort()

    def _abort(self) -> None:
        """Ends the socket, also the copy of a forked child that lives on: Redis would give it jobs."""
        with suppress(OSError):
            self._on_socket(lambda own: own.shutdown(socket.SHUT_RDWR))
        self._transport.abort()

    def _on_socket(self, work: Callable[[socket.socket], None]) -> None:
        """Does what uvloop's own object for the socket refuses; raises `OSError`."""
        told = self._transport.get_extra_info("socket")
        if told is not None and told.fileno() >= 0:
            own = socket.socket(told.family, told.type, fileno=told.fileno())
            try:
                work(own)
            finally:
                own.detach()

    def orphans(self) -> tuple[list[Command], list[Command]]:
        """Of a lost link: the commands that got no reply, and those that were never written."""
        commands = list(self._in_flight)
        self._in_flight.clear()
        written = len(commands) - len(self._unsent)
        self._unsent.clear()
        return commands[:written], commands[written:]

    # --- replies -----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        in_flight = self._in_flight
        self.still_ticks = 0
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
                    # goes on as the reply to SUBSCRIBE, which nothing else is in flight with
                if not in_flight:
                    raise hiredis.ProtocolError(f"a reply to no command: {reply!r}"[:200])
                command = in_flight.popleft()
                if kind is hiredis.ReplyError:
                    self._refused(command, str(reply))
                elif kind is list and reply and type(reply[0]) is hiredis.ReplyError and UNFIT.match(str(reply[0])):
                    self._refused(command, str(reply[0]))  # a script that has caught the refusal of its first write
                elif not command.answer(reply):
                    self.drop(f"what Redis answered is no answer to {command.args[0]!r}")
                    break
        except hiredis.HiredisError as error:
            self.drop(f"what Redis sent could not be read: {error}")
        except Exception as error:
            # raised in this very function, by the reader or by taking a push apart, or further down by what no message has
            if _raised_below(error) and not _is_broken(reply):
                raise  # a fault of ours
            self.drop(f"what Redis sent could not be read: neither a reply nor a message ({type(error).__name__}: {error})")
        if pushed:
            self._on_read_end()
        if self._leaving:
            self._drop_when_left()

    def _refused(self, command: Command, message: str) -> None:
        if command.script is not None and message.startswith("NOSCRIPT"):
            # EVAL runs the script and makes the server know it again
            command.args = (b"EVAL", command.script, *command.args[2:])
            (command.resend or self.send)(command)
        elif self.on_unfit is not None and UNFIT.match(message):
            self.on_unfit(command, message)
        else:
            command.answer(CommandError(named(message, command.script)))

    # --- a reply that need not wake the process -----------------------------------------------------------------------

    def _hold_back(self) -> None:
        """Has the kernel keep a lone settlement's reply until more follows, or until it has been kept for `LONE_REPLY_S`.

        It would wake the process for nothing: the take behind it stays open. One timer serves however many such replies: it
        lowers the limit again when no `_hold_back` has come for so long, and the kernel then tells of what is there.
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
        """Sets from how many bytes on the kernel tells that there are some; False where it cannot be set."""
        own = self._transport.get_extra_info("socket")
        if own is None or own.family not in (socket.AF_INET, socket.AF_INET6) or self._transport.get_extra_info("sslcontext"):
            return False
        try:
            self._on_socket(lambda own: own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size))
        except OSError:
            return False
        return True

    # --- life --------------------------------------------------------------------------------------------------------

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
        """Counts how long nothing has moved. Keep-alive alone cannot see a relay that goes silent."""
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        self.still_ticks += 1
        if not self._in_flight:
            if self.still_ticks >= QUIET_TICKS:
                self._ask()
        elif self._has_delivered():
            self.still_ticks = 0
        else:
            if self.still_ticks == 1:
                self._next_look = REPLY_TICKS
            on_the_way = self._expected - self._arrived
            late_ticks = self.still_ticks - int(on_the_way / SLOWEST_BYTES_S / TICK_S)
            if late_ticks >= self._next_look:
                self._next_look += min(self._next_look, 6 * REPLY_TICKS)
                self._on_stuck(self)

    def _has_delivered(self) -> bool:
        """Whether more of what was written has reached the other side since the last tick: a slow link is not a dead one.

        Only what had been written by the first tick after something came counts: one that swallows everything is dead.
        """
        if self._has_heard:
            self._has_heard, self._arrived, self._expected = False, self._expected, self._written
        left = self._transport.get_write_buffer_size()
        if ioctl is not None:
            try:  # what the kernel still has to send, or the other side to acknowledge
                told = ioctl(self._transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(4))
                left += int.from_bytes(told, sys.byteorder)
            except (OSError, AttributeError):
                pass
        before, self._delivered = self._delivered, max(self._delivered, min(self._expected, self._written - left))
        return self._delivered > before

    # --- the server at the other end -------------------------------------------------------------------------------------

    async def is_primary(self) -> bool | None:
        """Whether this is a primary, as `ROLE` tells; None if the user may not ask. Raises what says that it is not ready."""
        replies = await asyncio.gather(self.call(b"PING"), self.call(b"ROLE"), return_exceptions=True)
        for reply in replies:
            may_not_ask = isinstance(reply, CommandError) and reply.code != "NOAUTH" and not UNFIT.match(str(reply))
            if isinstance(reply, BaseException) and not may_not_ask:
                raise reply
        self._note_role(replies[1])
        return self._is_primary

    def _ask(self) -> None:
        """Keeps an idle link alive, and finds out that the server has become a replica of another."""
        if self._is_primary is None or self._resp2_pushes:  # a subscriber may send PING alone in RESP2
            self.send(Command((b"PING",), _ignore, resend=_ignore))
        else:
            self.send(Command((b"ROLE",), self._note_role, resend=_ignore))

    def _note_role(self, reply: Any) -> None:
        was_primary = self._is_primary
        self._is_primary = reply[0] == b"master" if type(reply) is list and reply else None
        if was_primary and self._is_primary is False and self.on_unfit is not None:
            self.on_unfit(None, "READONLY it has become a replica")

    async def call(self, *args: Any) -> Any:
        """Issues one command and waits for its reply; raises `RedisFailure`."""
        future = self._loop.create_future()
        self.send(Command(args, lambda reply: complete(future, reply)))
        await asyncio.wait((future, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ConnectionLost(f"the connection was lost: {self.lost.result()}", maybe_applied=True)
        return future.result()


def _raised_below(error: Exception) -> bool:
    """Whether an error comes from a function that the one which has caught it called, if that is not C's."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None


def _is_broken(message: Any) -> bool:
    """Whether what stands for a channel or a payload is something else."""
    return isinstance(message, list) and not all(type(part) is bytes for part in message)


def named(message: str, script: str | None) -> str:
    """What Redis refused a script, with the command: Redis tells the line."""
    at = re.search(r"user_script:\s*(\d+)", message)
    if script is None or at is None:
        return message
    line = script.splitlines()[int(at[1]) - 1 : int(at[1])]
    commands = re.findall(r"redis\.p?call\('(\w+)'", "".join(line))
    return f"{message} ({' or '.join(commands)})" if commands else message


def complete(future: asyncio.Future[Any], reply: Any) -> None:
    """Completes `future` with a reply, or with the exception that came instead."""
    if future.done():  # cancelled by whoever waited
        return
    if isinstance(reply, BeeQueueError):
        future.set_exception(reply)
        future.exception()  # asyncio must not complain when whoever waited is cancelled in this very step
    else:
        future.set_result(reply)


def _ignore(*_: Any) -> None:
    pass
