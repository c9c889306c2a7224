"""A connection that survives its links: opens a `Link`, opens the next one when it is lost, and keeps commands meanwhile.

It knows nothing about queues: its owner's `set_up` loads scripts and subscribes.

When a link ends, commands that were never written wait for the next link, and so do those that Redis refused because of its own
state. Commands that are safe to repeat are repeated. The rest fail with `ConnectionLost(maybe_applied=True)`.

A link without traffic is dead if Redis answers on a new connection, or if none can be opened. If the new one gets no answer
either, Redis itself has stopped, and cutting the link would not help. If Redis refuses the new one, another open link decides.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import beequeue.wire.link as link_module
from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused, QueueClosed, RedisFailure
from beequeue.settings import Backoff, linear_backoff
from beequeue.tasks import supervised
from beequeue.wire.address import Address
from beequeue.wire.driver import NoAnswer, NotLetIn, refusal_in
from beequeue.wire.link import Command, Link, complete

log = logging.getLogger("beequeue")

Answer = TypeVar("Answer")

MOST_WAITING = 10_000
"""How many commands may wait for a connection that is down; an unlimited one waits beyond that."""
CALM_S = 15.0
"""A link that lasted this long before it was left as unfit counts as a good one."""
ACCEPT_S = 2.0
"""The least time to allow for a connection to be accepted; a busy process needs time for that, too."""
MOST_LOSSES = 10
"""How often to repeat a command whose link was lost each time its reply was the next one due: it may never get through."""


class Group:
    """Connections that must speak to the same server: when one finds the server unfit, all of them open new links."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self._asking: asyncio.Task[bool | RedisFailure] | None = None

    def add(self, connection: Connection) -> None:
        """Makes `connection` leave a server together with the others."""
        self._connections.add(connection)

    def remove(self, connection: Connection) -> None:
        """Undoes `add`."""
        self._connections.discard(connection)

    def leave(self, reason: str) -> None:
        """Makes each connection that is up open a new link once its commands in flight are answered."""
        for connection in self._connections:
            connection.leave(reason)

    async def answers(self, address: Address) -> bool | RedisFailure:
        """Does `answers` once for all connections that ask at the same time."""
        if self._asking is None or self._asking.done():
            limit_s = link_module.REPLY_TICKS * link_module.TICK_S
            self._asking = asyncio.get_running_loop().create_task(answers(address, limit_s), name="beequeue asking")
        return await asyncio.shield(self._asking)

    async def answers_elsewhere(self, silent: Link) -> bool:
        """Whether Redis answers on the open link, other than `silent`, on which data moved last."""
        links = [each.link for each in self._connections if each.link not in (None, silent)]
        asked = min((link for link in links if link is not None and link.takes_commands), key=_still_ticks, default=None)
        try:
            async with asyncio.timeout(link_module.REPLY_TICKS * link_module.TICK_S):
                return asked is not None and await answers_on(asked)
        except (TimeoutError, RedisFailure):
            return False

    async def end(self) -> None:
        """Ends a question under way when no connection is left."""
        if self._asking is not None and not self._connections:
            self._asking.cancel()
            await asyncio.wait((self._asking,))


class Connection:
    """One connection to Redis through any number of links: see the module.

    `role` names it in messages. `set_up` is awaited on each new link before any waiting command is sent. `on_message` receives
    the channel and payload of each published message in the step that parses it; `on_read_end` is called after each read that
    contained one. `report` receives the errors that reach no caller: a lost link, a refusal after the first. The connection
    leaves an unfit server together with its `group`; with `keeps_refused` it then repeats the commands refused for that reason.
    """

    def __init__(
        self,
        address: Address,
        role: str,
        *,
        reconnect: Backoff,
        report: Callable[[BeeQueueError], None],
        group: Group | None = None,
        set_up: Callable[[Link], Awaitable[None]] | None = None,
        protocol: int = 2,
        on_message: Callable[[bytes, bytes], None] | None = None,
        on_read_end: Callable[[], None] | None = None,
        keeps_refused: bool = True,
    ) -> None:
        self.role = role
        self.link: Link | None = None
        self.reconnects = 0
        self.address = address
        self._reconnect = reconnect
        self._report = report
        self._group = group or Group()
        self._set_up = set_up
        self._protocol = protocol
        self._on_message = on_message
        self._on_read_end = on_read_end
        self._keeps_refused = keeps_refused
        self._live: Link | None = None
        """The link that is up. While it is being left, `link` is None already."""
        self._waiting: deque[Command] = deque()
        self._refused: deque[Command] = deque()
        self._failures = 0
        self._needs_primary = False
        self._backoff_is_wrong = False
        self._asking: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._first: asyncio.Future[None] | None = None

    @property
    def moves(self) -> tuple[Link | None, int]:
        """A value that changes whenever data moves; good only for comparison."""
        return self._live, 0 if self._live is None else self._live.moves

    # --- commands -----------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Issues a command now, or keeps it until the connection is up."""
        if self.link is not None:
            self.link.send(command)
        elif self._closed:
            command.answer(QueueClosed())
        elif len(self._waiting) >= MOST_WAITING and not command.unlimited:
            command.answer(
                ConnectionLost(f"{self.address} is down, and {MOST_WAITING} commands are waiting already", maybe_applied=False)
            )
        else:
            self._waiting.append(command)

    def send_all(self, commands: Sequence[Command], *, can_wait: bool = False) -> None:
        """Issues commands in order, in one write. With `can_wait` the reply to the first one may be late."""
        if self.link is not None:
            self.link.send_all(commands, can_wait=can_wait)
        else:
            for command in commands:
                self.send(command)

    def flush(self) -> None:
        """Writes all issued commands, without waiting for the next step of the loop."""
        if self.link is not None:
            self.link.flush()

    async def call(self, *args: Any, repeatable: bool = False, script: str | None = None, unlimited: bool = False) -> Any:
        """Issues a command and waits for its reply; raises `RedisFailure`, `QueueClosed`."""
        future = asyncio.get_running_loop().create_future()
        repeat = args if repeatable else None
        on_reply = functools.partial(complete, future)
        command = Command(args, on_reply, repeat=repeat, script=script, unlimited=unlimited)
        self.send(command)
        return await self.wait(command, future)

    async def wait(self, command: Command, answered: asyncio.Future[Answer]) -> Answer:
        """Waits for `answered`, which the reply to `command` completes; a wait cancelled while Redis is down withdraws it."""
        try:
            return await answered
        except asyncio.CancelledError:
            self.withdraw(command)
            raise

    def withdraw(self, command: Command) -> bool:
        """Takes back a command that waits for the connection; returns False when it was sent or answered already."""
        for waiting in (self._waiting, self._refused):
            if command in waiting:
                waiting.remove(command)
                return True
        return False

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Returns when the connection is up, however long that takes; raises `ConnectionRefused` when Redis refuses it."""
        self._first = asyncio.get_running_loop().create_future()
        self._group.add(self)
        self._keeper = supervised(self._keep_up, f"{self.role} connection", self._report)
        await self._first

    async def close(self) -> None:
        """Closes the socket or ends the attempts to open one; commands without a reply fail."""
        self._closed = True
        self._group.remove(self)
        if self._first is not None and not self._first.done():
            self._first.set_exception(QueueClosed())
        for task in (self._keeper, self._asking):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))  # if the driver swallows the cancellation, the keeper still sees `_closed`
        await self._group.end()
        link, self._live, self.link = self._live, None, None
        if link is not None:
            link.drop("closed")
            await link.lost
            self._fail_or_keep(link)
        while self._waiting:
            self._waiting.popleft().answer(QueueClosed())

    async def _keep_up(self) -> None:
        """Opens one link after another until `close`; returns earlier only when Redis refuses the first one."""
        assert self._first is not None
        while not self._closed:
            try:
                link = await self._open_link()
            except ConnectionRefused as refusal:
                if not self._first.done():
                    self._first.set_exception(refusal)
                    return
                self._report(refusal)
            except RedisFailure as error:
                pause_ms = self._pause_ms(self._failures + 1)
                log.warning("%s connection: %s; next attempt in %d ms", self.role, error, pause_ms)
            else:
                await self._stay_up(link)
            self._failures += 1
            await asyncio.sleep(self._pause_ms(self._failures) / 1000)

    async def _open_link(self) -> Link:
        """Opens a link to a server that is ready, and sets it up."""
        transport, keep = await self.address.open(self._protocol)
        link = Link(
            transport,
            keep=keep,
            on_message=self._on_message,
            on_read_end=self._on_read_end,
            on_stuck=self._look_into,
            resp2_pushes=self._on_message is not None and self._protocol == 2,
        )
        try:
            if await link.is_primary() is False and self._needs_primary:
                raise ConnectionLost(f"{self.address} is a replica", maybe_applied=False)
            if self._set_up is not None:
                await self._set_up(link)
        except CommandError as error:
            link.drop("set-up refused")
            if error.code in ("NOAUTH", "NOPERM", "WRONGPASS"):
                raise ConnectionRefused(f"{self.address}: {error}") from None
            raise
        except ConnectionLost as error:
            link.drop("set-up ended")
            # with TLS 1.3 the server checks our certificate only after the handshake
            if (refusal := refusal_in(link.error, self.address)) is not None:
                raise refusal from None
            if str(self.address) in str(error):
                raise
            raise ConnectionLost(f"{self.address}: {error}", maybe_applied=False) from None
        except BaseException:
            link.drop("set-up ended")
            raise
        return link

    async def _stay_up(self, link: Link) -> None:
        """Uses a link until it is lost."""
        assert self._first is not None
        now = asyncio.get_running_loop().time
        up_at = now()
        try:
            self._go_up(link)
            if self._first.done():
                self.reconnects += 1
                log.info("%s connection to %s is back", self.role, self.address)
            else:
                self._first.set_result(None)
            reason = await asyncio.shield(link.lost)
        except Exception:
            link.drop("its keeper has failed")
            self._end(link)
            raise
        if self.link is link or now() - up_at >= CALM_S:  # the server was fit: the link was not left at once
            self._failures = 0
        self._end(link)
        self._report(ConnectionLost(f"{self.role} connection to {self.address} lost: {reason}", maybe_applied=False))

    def _end(self, link: Link) -> None:
        self._live = self.link = None
        self._fail_or_keep(link)

    def _pause_ms(self, attempt: int) -> float:
        """The pause that `reconnect` returns; the default one if it raises or does not return a number of milliseconds."""
        try:
            pause_ms: Any = self._reconnect(attempt)
            if isinstance(pause_ms, bool) or not isinstance(pause_ms, (int, float)) or not 0 <= pause_ms < math.inf:
                raise TypeError(f"it must return milliseconds, at least 0, not {pause_ms!r}")
            return float(pause_ms)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if not self._backoff_is_wrong:
                self._backoff_is_wrong = True
                what = f"reconnect({attempt}) raised {type(error).__name__}: {error}"
                failure = BeeQueueError(f"{what}; {linear_backoff.__name__} is used instead")
                failure.__cause__ = error
                self._report(failure)
            return linear_backoff(attempt)

    def _go_up(self, link: Link) -> None:
        self._live = self.link = link
        link.on_unfit = self._leave_unfit
        while self._waiting:
            link.send(self._waiting.popleft())

    def _fail_or_keep(self, link: Link) -> None:
        """Sorts the commands of a lost link; those that stay go before the commands issued since."""
        unanswered, unwritten = link.orphans()
        kept = [*self._refused]
        self._refused.clear()
        failed = []
        if unanswered:
            unanswered[0].losses += 1
        for command in unanswered:
            if command.repeat is not None and command.losses <= MOST_LOSSES and not self._closed:
                command.args = command.repeat() if callable(command.repeat) else command.repeat
                command.repeated = True
                kept.append(command)
            else:
                failed.append(command)
        self._waiting.extendleft(reversed(kept + unwritten))
        for command in failed:
            if self._closed and command.repeat is not None:
                command.answer(QueueClosed())
            else:
                command.answer(ConnectionLost(f"the {self.role} connection was lost before Redis answered", maybe_applied=True))

    # --- an unfit server, a silent link -------------------------------------------------------------------------------

    def leave(self, reason: str) -> None:
        """Opens a new link once the commands in flight on this one are answered."""
        link, self.link = self.link, None
        if "READONLY" in reason:
            self._needs_primary = True
        if link is not None:
            link.leave(reason)

    def _leave_unfit(self, command: Command | None, refusal: str) -> None:
        """Leaves an unfit server. Redis refused `command`, which had no effect; None means that ROLE showed a replica."""
        if self.link is not None:  # otherwise it is a late answer on a link that is being left already
            self._group.leave(refusal)
        if command is None:
            return
        if command.resend is not None:
            command.resend(command)
        elif self._keeps_refused:
            self._refused.append(command)
        else:
            command.answer(CommandError(refusal))

    def _look_into(self, link: Link) -> None:
        """Finds out why no data moves on `link` although Redis owes a reply on it."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_beside(link), name="beequeue asking beside")

    async def _ask_beside(self, link: Link) -> None:
        """Drops `link` if it is still silent after Redis has answered on a new connection or, refusing that, on another link.

        A refusal alone is no reason: during `CLIENT PAUSE` Redis refuses some newcomers at once, and answers its clients later.
        """
        answer = await self._group.answers(self.address)
        if isinstance(answer, RedisFailure) and await self._group.answers_elsewhere(link):
            answer = True
        if answer is not True:
            silent_s = link.still_ticks * link_module.TICK_S
            beside = f"and refuses a new connection: {answer}" if answer else "nor does it answer on a new connection"
            log.warning("%s connection: %s has not answered for %d s, %s", self.role, self.address, silent_s, beside)
            return
        still = link.still_ticks
        await asyncio.sleep(link_module.TICK_S)  # Redis may have begun to answer on both
        if link.still_ticks >= max(still, link_module.REPLY_TICKS) and not link.down:
            link.drop(f"nothing has moved for {link.still_ticks * link_module.TICK_S:g} s")


async def answers(address: Address, limit_s: float) -> bool | RedisFailure:
    """Whether Redis answers on a new connection or none can be opened; False when Redis accepts one and lets it wait.

    Returns the refusal when Redis refuses the connection or the question: it may do that while it keeps other clients waiting.
    """
    try:
        async with asyncio.timeout(limit_s):
            transport, keep = await address.open(2)
            link = Link(transport, keep=keep)
            try:
                return await answers_on(link)
            finally:
                link.drop("asked")
    except (TimeoutError, NoAnswer):
        return not await address.accepts(max(limit_s, ACCEPT_S))
    except (CommandError, ConnectionRefused, NotLetIn) as refusal:
        return refusal
    except ConnectionLost:
        return True


async def answers_on(link: Link) -> bool:
    """Asks Redis for a script that it does not know; raises `CommandError` when it refuses to look.

    Like a write this question waits during `CLIENT PAUSE`, and it needs no further permission.
    """
    try:
        await link.call(b"EVALSHA", b"0" * 40, 0)
    except CommandError as error:
        if error.code != "NOSCRIPT":
            raise
    return True


def _still_ticks(link: Link) -> int:
    return link.still_ticks
