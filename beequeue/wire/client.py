"""The command connection, which several queues can share. Its errors go to all of them.

A queue without a shared client makes its own. Takes and events always use separate connections, opened to the same address.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from beequeue.errors import BeeQueueError, WrongLoop
from beequeue.settings import Backoff, linear_backoff
from beequeue.wire.address import Address
from beequeue.wire.connection import Connection, Group
from beequeue.wire.forks import process
from beequeue.wire.link import Link

log = logging.getLogger("beequeue")

Report = Callable[[BeeQueueError], None]
OnLink = Callable[[Link], Awaitable[None]]
"""A queue's set-up of each new link, awaited before any waiting command is sent."""


class Client:
    """A command connection to Redis; made by `beequeue.connect`, or by a queue for itself (`Queue.client`).

    Pass it to queues as their `redis`. Each of them reports its errors through `error`. A queue that closes leaves it open,
    unless the queue's `quit_command_client` is True.
    """

    def __init__(self, address: Address, *, reconnect: Backoff = linear_backoff, set_up: OnLink | None = None) -> None:
        self.address = address
        self.group = Group()
        """The connections of all queues that share this client; they speak to one server."""
        self.connection = Connection(
            address, "command", reconnect=reconnect, report=self._report, group=self.group, set_up=self._set_up
        )
        self._first = set_up
        self._queues: dict[Report, OnLink] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = 0

    def __repr__(self) -> str:
        return f"<Client {self.address}>"

    async def open(self) -> None:
        """Returns when the connection is up; raises `ConnectionRefused` when Redis refuses it, `QueueClosed` when closed."""
        self._loop = asyncio.get_running_loop()
        self._forks = process.forks
        await self.connection.open()

    async def ping(self) -> None:
        """Returns when Redis has answered `PING`; raises `RedisFailure`, `QueueClosed`."""
        self._check_process()
        await self.connection.call(b"PING", repeatable=True)

    async def close(self) -> None:
        """Closes the connection; every later command raises `QueueClosed`. In a forked child it does nothing."""
        if self._loop is None or self._forks == process.forks:
            await self.connection.close()

    def _check_process(self) -> None:
        if self._loop is not None and self._forks != process.forks:
            raise WrongLoop(f"{self!r} was opened before a fork and cannot be used in the child: make a new one there")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def attach(self, report: Report, on_link: OnLink) -> None:
        """Passes the connection's errors to `report` and each new link to `on_link` from now on.

        Raises `WrongLoop` when another loop opened the connection, or when it was opened before a fork.
        """
        self._check_process()
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise WrongLoop(f"{self!r} belongs to the event loop that opened it and cannot be used from another one")
        self._queues[report] = on_link

    def detach(self, report: Report) -> None:
        """Undoes `attach`."""
        del self._queues[report]

    async def _set_up(self, link: Link) -> None:
        if self._first is not None:
            await self._first(link)
        for on_link in list(self._queues.values()):
            await on_link(link)

    def _report(self, error: BeeQueueError) -> None:
        for report in list(self._queues):
            report(error)
        if not self._queues:
            log.error("%s", error)
