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
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost

TICK_S = 1.0
REPLY_TICKS = 10
"""How many ticks a command may wait for its reply before the link is given up."""
QUIET_TICKS = 5
"""How many ticks a link that asks for it may be silent before it sends PING."""

_INCOMPLETE = object()
_RESP2_PUSHES = (b"message", b"subscribe", b"unsubscribe")


class Command:
    """A command and what becomes of its reply.

    `on_reply` gets the reply, or an exception: `CommandError`, or `ConnectionLost` when there will be no reply. `repeat` is
    what to send if the connection is lost before the reply (`repeated` then tells); None: it is not safe to repeat. `script`
    is the text to send instead when the server does not know the script; `resend` sends it, where this link may be blocked.
    """

    __slots__ = ("args", "on_reply", "repeat", "repeated", "resend", "script")

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
        self.script = script
        self.resend = resend


class Link(asyncio.Protocol):
    """A live socket. `lost` completes, with the reason, when it is one no more."""

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        keep: object,
        on_message: Callable[[bytes, bytes], None],
        on_read_end: Callable[[], None],
        resp2_pushes: bool = False,
        ping_when_quiet: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._keep = keep  # what would close the transport if it were dropped
        self._on_message = on_message
        self._on_read_end = on_read_end
        self._resp2_pushes = resp2_pushes
        self._ping_when_quiet = ping_when_quiet
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._in_flight: deque[Command] = deque()
        self._unsent: list[bytes] = []
        self._reason = "closed by Redis"
        self._answered = 0
        self._issued_at_tick: deque[int] = deque(maxlen=REPLY_TICKS)
        self._quiet_ticks = 0
        self.down = False
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        transport.set_protocol(self)
        transport.resume_reading()

    # --- commands ----------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Issues a command: at once when nothing is in flight; else what one step of the loop issues leaves in one write."""
        self.send_all((command,))

    def send_all(self, commands: Sequence[Command]) -> None:
        """Issues commands one behind the other, in one write."""
        packed = [hiredis.pack_command(command.args) for command in commands]
        if not self._in_flight and not self.down:
            # nothing to join with: a later write would only cost the loop another turn
            self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        else:
            if not self._unsent:
                self._loop.call_soon(self._flush)
            self._unsent += packed
        self._in_flight.extend(commands)

    def _flush(self) -> None:
        unsent = self._unsent
        if unsent and not self.down:
            self._transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))
            unsent.clear()

    def drop(self, reason: str) -> None:
        """Cuts the socket; `lost` completes soon."""
        self._reason = reason
        self._transport.abort()

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
        self._quiet_ticks = 0
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
                self._answered += 1
                if kind is hiredis.ReplyError:
                    self._refused(command, str(reply))
                else:
                    self._answer(command, reply)
        except hiredis.HiredisError as error:
            self.drop(f"what Redis sent could not be read: {error}")
        except Exception as error:
            # raised in this very function, by the reader or by taking a push apart, or further down by what no message has
            if _raised_below(error) and not _is_broken(reply):
                raise  # a fault of ours
            self.drop(f"what Redis sent could not be read: neither a reply nor a message ({type(error).__name__}: {error})")
        if pushed:
            self._on_read_end()

    def _answer(self, command: Command, reply: Any) -> None:
        try:
            command.on_reply(reply)
        except Exception as error:  # a fault of ours; the replies behind it must not suffer
            self._loop.call_exception_handler({"message": f"handling the reply to {command.args[0]!r}", "exception": error})

    def _refused(self, command: Command, message: str) -> None:
        if command.script is not None and message.startswith("NOSCRIPT"):
            # EVAL runs the script and makes the server know it again
            command.args = (b"EVAL", command.script, *command.args[2:])
            (command.resend or self.send)(command)
        else:
            self._answer(command, CommandError(named(message, command.script)))

    # --- life --------------------------------------------------------------------------------------------------------

    def connection_lost(self, error: Exception | None) -> None:
        self.down = True
        self._ticker.cancel()
        if not self.lost.done():
            self.lost.set_result(str(error) if error else self._reason)
        self._keep = None

    def _tick(self) -> None:
        """Finds a half-open socket: keep-alive alone cannot see a relay that goes silent."""
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        issued = self._answered + len(self._in_flight)
        history = self._issued_at_tick
        if len(history) == REPLY_TICKS and self._answered < history[0]:
            self.drop(f"no reply within {REPLY_TICKS * TICK_S:g} s")
            return
        history.append(issued)
        self._quiet_ticks += 1
        if self._ping_when_quiet and self._quiet_ticks >= QUIET_TICKS and not self._in_flight:
            self.send(Command((b"PING",), _ignore))

    async def call(self, *args: Any) -> Any:
        """Issues one command and waits for its reply; raises `CommandError` or `ConnectionLost`."""
        future = self._loop.create_future()
        self.send(Command(args, lambda reply: settle(future, reply)))
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


def settle(future: asyncio.Future[Any], reply: Any) -> None:
    """Completes `future` with a reply, or with the exception that came instead."""
    if future.done():  # cancelled by whoever waited
        return
    if isinstance(reply, BeeQueueError):
        future.set_exception(reply)
        future.exception()  # asyncio must not complain when whoever waited is cancelled in this very step
    else:
        future.set_result(reply)


def _ignore(reply: Any) -> None:
    pass
