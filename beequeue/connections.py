"""A queue's connections: what goes on which."""

from __future__ import annotations

from beequeue.settings import Backoff, QueueSettings, linear_backoff
from beequeue.store.scripts import load_scripts
from beequeue.wire.address import Address, RedisSetting
from beequeue.wire.client import Client


def command_client(redis: RedisSetting, *, reconnect: Backoff, ensure_scripts: bool) -> Client:
    """A command connection that is not open yet; each new link has the scripts loaded first, with `ensure_scripts`."""
    return Client(Address(redis), reconnect=reconnect, set_up=load_scripts if ensure_scripts else None)


async def connect(redis: RedisSetting = None, *, reconnect: Backoff = linear_backoff, ensure_scripts: bool = True) -> Client:
    """A command connection for many queues: `Queue("a", redis=client)`.

    `redis`, `reconnect` and `ensure_scripts` are as in `Queue`. Waits for a Redis that is not up yet. Raises `ValueError` or
    `TypeError` naming a wrong argument, `ConnectionRefused` when Redis says no.
    """
    QueueSettings(reconnect=reconnect, ensure_scripts=ensure_scripts)  # checks them
    client = command_client(redis, reconnect=reconnect, ensure_scripts=ensure_scripts)
    try:
        await client.open()
    except BaseException:
        await client.close()
        raise
    return client
