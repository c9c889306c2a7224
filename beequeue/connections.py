"""A queue's connections: which ones it has, how each is set up, and which commands use it.

    command   scripts and everything that is large or belongs to a worker; may be shared by many queues (`Client`)
    take      a worker's blocking take, and the commands written with it
    event     subscriptions; with `ordered_events` also every command that names one job

On an ordered queue one socket carries the reply to a save and the events of the saved job, in the order in which Redis wrote
them (RESP3). That order removes the race of bee-queue's issues 78 and 189. This module decides nothing about jobs.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

from beequeue.errors import CommandError
from beequeue.host import Host
from beequeue.settings import Backoff, QueueSettings, linear_backoff
from beequeue.store.scripts import load_scripts
from beequeue.store.store import Store
from beequeue.wire.address import Address, RedisSetting
from beequeue.wire.client import Client
from beequeue.wire.connection import Connection
from beequeue.wire.link import UNFIT, Link

OnLink = Callable[[Link], Awaitable[None]]


class Connections:
    """The connections of one queue, and the store that talks through them. None is open before `open`.

    `host.settings` says which connections there are. Each new link on which jobs are settled runs `check_held` before anything
    else. Each new event link runs `catch_up` after its subscriptions. `on_message` gets channel and payload of each message, in
    the step that parses it; `on_read_end` is called after each read that had a message.
    """

    def __init__(
        self,
        host: Host,
        key_prefix: str,
        redis: RedisSetting | Client,
        *,
        check_held: OnLink,
        catch_up: OnLink,
        on_message: Callable[[bytes, bytes], None],
        on_read_end: Callable[[], None],
    ) -> None:
        settings = self._settings = host.settings
        self._report = host.report
        self._check_held = check_held
        self._catch_up = catch_up
        self._is_shared = isinstance(redis, Client)
        if isinstance(redis, Client):
            self.client = redis
        else:
            self.client = command_client(redis, reconnect=settings.reconnect, ensure_scripts=settings.ensure_scripts)
        connection = functools.partial(
            Connection, self.client.address, reconnect=settings.reconnect, report=host.report, group=self.client.group
        )
        # a worker waits longer and longer before it repeats a refused take: the connection must not repeat it at once
        self.takes = connection("take", set_up=self._set_up_takes, keeps_refused=False) if settings.is_worker else None
        self.take_client_id: int | None = None
        """The take connection's id in Redis; None when Redis does not tell it."""
        self.events = None
        if settings.get_events or settings.activate_delayed_jobs:
            self.events = connection(
                "event",
                protocol=3 if settings.ordered else 2,
                set_up=self._subscribe,
                on_message=on_message,
                on_read_end=on_read_end,
            )
        commands = self.client.connection
        jobs = self.events if settings.ordered and self.events is not None else commands
        self.store = Store(key_prefix, commands, self.takes, jobs)

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and came back."""
        connections = (self.client.connection, self.takes, self.events)
        return sum(connection.reconnects for connection in connections if connection is not None)

    # --- opening ---------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Registers the queue with its command connection; raises `WrongLoop` when another loop opened the connection."""
        self.client.attach(self._report, self._check_held)

    async def open(self) -> None:
        """Returns when all connections are up, however long that takes; raises `ConnectionRefused` when Redis refuses one."""
        opening = [connection.open() for connection in (self.takes, self.events) if connection is not None]
        if not self._is_shared:
            opening.append(self.client.open())
        await asyncio.gather(*opening)

    async def _set_up_takes(self, link: Link) -> None:
        try:
            self.take_client_id = await link.call(b"CLIENT", b"ID")
        except CommandError as error:
            if UNFIT.match(str(error)):
                raise
            self.take_client_id = None  # closing then waits for the open take instead of ending it
        await self._check_held(link)

    async def _subscribe(self, link: Link) -> None:
        if self._settings.get_events:
            await link.call(b"SUBSCRIBE", self.store.events_channel)
        if self._settings.activate_delayed_jobs:
            await link.call(b"SUBSCRIBE", self.store.earlier_channel)
        await self._catch_up(link)

    # --- closing ---------------------------------------------------------------------------------------------------------

    def losses(self) -> list[asyncio.Future[str]] | None:
        """For each connection that public calls use, a future that completes when it is lost; None when one is down."""
        links = [connection.link for connection in (self.client.connection, self.events) if connection is not None]
        return None if None in links else [link.lost for link in links if link is not None]

    async def close(self) -> BaseException | None:
        """Closes the connections, and a shared one only with `quit_command_client=True`; returns the first failure."""
        quits = self._settings.quit_command_client
        closing = [connection.close() for connection in (self.takes, self.events) if connection is not None]
        if not self._is_shared if quits is None else quits:
            closing.append(self.client.close())
        failures = [failure for failure in await asyncio.gather(*closing, return_exceptions=True) if failure is not None]
        self.client.detach(self._report)
        return failures[0] if failures else None


def command_client(redis: RedisSetting, *, reconnect: Backoff, ensure_scripts: bool) -> Client:
    """A command connection that is not open yet; with `ensure_scripts` it loads the scripts on each new link first."""
    return Client(Address(redis), reconnect=reconnect, set_up=load_scripts if ensure_scripts else None)


async def connect(redis: RedisSetting = None, *, reconnect: Backoff = linear_backoff, ensure_scripts: bool = True) -> Client:
    """Opens a command connection for many queues: `Queue("a", redis=client)`.

    `redis`, `reconnect` and `ensure_scripts` are as in `Queue`. Waits for a Redis that is not up yet. Raises `ValueError` or
    `TypeError` naming a wrong argument, and `ConnectionRefused` when Redis refuses the connection.
    """
    QueueSettings(reconnect=reconnect, ensure_scripts=ensure_scripts)  # checks them
    client = command_client(redis, reconnect=reconnect, ensure_scripts=ensure_scripts)
    try:
        await client.open()
    except BaseException:
        await client.close()
        raise
    return client
