"""A connection that stays: opens a `Link`, opens the next one when it is lost, and keeps commands meanwhile.

It knows nothing of queues: what a connection is for (scripts, subscriptions) is its owner's `set_up`.

The end of a link decides what becomes of its commands: what was never written waits for the next link; so does what is safe to
repeat; the rest fails with `ConnectionLost(maybe_applied=True)`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from beequeue.address import Address
from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused, QueueClosed
from beequeue.link import Command, Link, settle
from beequeue.settings import Backoff

log = logging.getLogger("beequeue")

Answer = TypeVar("Answer")

MOST_WAITING = 10_000
"""How many commands wait for a connection that is down."""


class Connection:
    """One socket to Redis, for ever: see the module.

    `role` names it in messages. `set_up` is awaited on each new link before any waiting command is sent. `on_message` gets
    channel and payload of each published message, in the step that parses it; `on_read_end` is called after each read that
    had one. `report` gets what no caller is told: a lost link, a refusal after the first.
    """

    def __init__(
        self,
        address: Address,
        role: str,
        *,
        reconnect: Backoff,
        report: Callable[[BeeQueueError], None],
        set_up: Callable[[Link], Awaitable[None]] | None = None,
        protocol: int = 2,
        on_message: Callable[[bytes, bytes], None] | None = None,
        on_read_end: Callable[[], None] | None = None,
    ) -> None:
        self.role = role
        self.link: Link | None = None
        self.reconnects = 0
        self.address = address
        self._reconnect = reconnect
        self._report = report
        self._set_up = set_up
        self._protocol = protocol
        self._on_message = on_message
        self._on_read_end = on_read_end
        self._waiting: deque[Command] = deque()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._first: asyncio.Future[None] | None = None

    # --- commands ----------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Issues a command now, or keeps it until the connection is up."""
        if self.link is not None:
            self.link.send(command)
        elif self._closed:
            command.on_reply(QueueClosed())
        elif len(self._waiting) >= MOST_WAITING:
            command.on_reply(
                ConnectionLost(f"{self.address} is down and {MOST_WAITING} commands wait already", maybe_applied=False)
            )
        else:
            self._waiting.append(command)

    def send_all(self, commands: Sequence[Command]) -> None:
        """Issues commands one behind the other, in one write."""
        if self.link is not None:
            self.link.send_all(commands)
        else:
            for command in commands:
                self.send(command)

    async def call(self, *args: Any, repeatable: bool = False, script: str | None = None) -> Any:
        """Issues a command and waits for its reply; raises `CommandError`, `ConnectionLost`, `QueueClosed`."""
        future = asyncio.get_running_loop().create_future()
        repeat = args if repeatable else None
        command = Command(args, lambda reply: settle(future, reply), repeat=repeat, script=script)
        self.send(command)
        return await self.wait(command, future)

    async def wait(self, command: Command, answered: asyncio.Future[Answer]) -> Answer:
        """Waits for what the reply to `command` completes; one that is cancelled while Redis is down is not issued later."""
        try:
            return await answered
        except asyncio.CancelledError:
            self.withdraw(command)
            raise

    def withdraw(self, command: Command) -> bool:
        """Takes back a command that waits for the connection; False when it has been sent, or answered."""
        try:
            self._waiting.remove(command)
        except ValueError:
            return False
        return True

    # --- life --------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Returns when the connection is up, however long that takes; raises `ConnectionRefused` when Redis says no."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._first = first
        self._keeper = asyncio.create_task(self._keep_up(first), name=f"beequeue {self.role} connection")
        await first

    async def close(self) -> None:
        """Closes the socket, or ends the attempts to open one; commands without a reply fail."""
        self._closed = True
        if self._first is not None and not self._first.done():
            self._first.set_exception(QueueClosed())
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))  # it also ends by itself: the driver may swallow a cancellation
        link, self.link = self.link, None
        if link is not None:
            link.drop("closed")
            await link.lost
            self._fail_or_keep(link)
        while self._waiting:
            self._waiting.popleft().on_reply(QueueClosed())

    async def _keep_up(self, first: asyncio.Future[None]) -> None:
        waits = 0
        while True:
            try:
                link = await self._open_link()
            except ConnectionRefused as refusal:
                if not first.done():
                    first.set_exception(refusal)
                    return
                self._report(refusal)
            except (ConnectionLost, CommandError) as error:
                log.warning("%s connection: %s; next attempt in %d ms", self.role, error, self._reconnect(waits + 1))
            else:
                if self._closed:
                    link.drop("closed")
                    await link.lost
                    return
                waits = 0
                self._go_up(link)
                if first.done():
                    self.reconnects += 1
                    log.info("%s connection to %s is back", self.role, self.address)
                else:
                    first.set_result(None)
                reason = await asyncio.shield(link.lost)
                self.link = None
                self._fail_or_keep(link)
                self._report(ConnectionLost(f"{self.role} connection to {self.address} lost: {reason}", maybe_applied=False))
            waits += 1
            await asyncio.sleep(self._reconnect(waits) / 1000)

    async def _open_link(self) -> Link:
        transport, keep = await self.address.open(self._protocol)
        link = Link(
            transport,
            keep=keep,
            on_message=self._on_message or _ignore_message,
            on_read_end=self._on_read_end or _ignore_read_end,
            resp2_pushes=self._on_message is not None and self._protocol == 2,
            ping_when_quiet=self._on_message is not None,
        )
        try:
            if self._set_up is not None:
                await self._set_up(link)
        except CommandError as error:
            link.drop("set-up refused")
            if error.code in ("NOAUTH", "NOPERM", "WRONGPASS"):
                raise ConnectionRefused(f"{self.address}: {error}") from None
            raise
        except BaseException:
            link.drop("set-up ended")
            raise
        return link

    def _go_up(self, link: Link) -> None:
        self.link = link
        waiting, self._waiting = self._waiting, deque()
        for command in waiting:
            link.send(command)

    def _fail_or_keep(self, link: Link) -> None:
        """Sorts the commands of a lost link; those that stay go before what was issued since."""
        unanswered, unwritten = link.orphans()
        kept = []
        failed = []
        for command in unanswered:
            if command.repeat is not None and not self._closed:
                command.args = command.repeat
                command.repeated = True
                kept.append(command)
            else:
                failed.append(command)
        self._waiting.extendleft(reversed(kept + unwritten))
        for command in failed:
            command.on_reply(ConnectionLost(f"the {self.role} connection was lost before Redis answered", maybe_applied=True))


def _ignore_message(channel: bytes, payload: bytes) -> None:
    pass


def _ignore_read_end() -> None:
    pass
