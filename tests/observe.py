"""Helpers with which tests observe and disturb: connections and tasks, commands on a relay, stored data."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError

from beequeue import Queue
from beequeue.store.scripts import SCRIPTS
from harness.server import Server
from tests.relay import Line, Relay

ONLOOKER = "onlooker"


def freeze(server: Server) -> None:
    """Stops the server's process: it is silent from now on, but its sockets stay open."""
    assert server._process is not None
    server._process.send_signal(signal.SIGSTOP)


def thaw(server: Server) -> None:
    """Undoes `freeze`."""
    assert server._process is not None
    server._process.send_signal(signal.SIGCONT)


async def answers(redis: Any) -> None:
    """Returns when a server that has just been restarted answers an onlooker: it first loads its data."""
    await redis.connection_pool.disconnect()  # the onlooker's own connections were cut, too
    while True:
        try:
            await redis.ping()
        except BusyLoadingError:
            await asyncio.sleep(0.01)
        else:
            return


def beequeue_tasks() -> list[str]:
    """The names of beequeue's background tasks."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("beequeue")]


async def clients(server: Server) -> list[dict[str, str]]:
    """The clients of a server that the test owns, without the test itself."""
    async with Redis.from_url(server.url, decode_responses=True, client_name=ONLOOKER) as redis:
        return [client for client in await redis.client_list() if client["name"] != ONLOOKER]


async def present(server: Server, count: int) -> bool:
    return len(await clients(server)) == count


def takes_no_more(queue: Queue) -> bool:
    """Whether a worker that is being closed has stopped its exchange; `paused` becomes true a few steps earlier."""
    return queue._consumer is not None and queue._consumer._exchange.closing


async def calls_of(redis: Any, command: str) -> int:
    """How often a server that the test owns has run a command."""
    statistics = await redis.info("commandstats")
    calls: int = statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"]
    return calls


def free_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def soon(attempt: int) -> int:
    return 10


def said(relay: Relay, what: bytes) -> int:
    """How often the queues behind a relay have sent `what`."""
    return sum(line.said.count(what) for line in relay.lines)


class Spoken:
    """Records the commands that queues send through a relay from now on, each with the role of its connection."""

    def __init__(self, relay: Relay) -> None:
        self.commands: list[tuple[str, list[bytes]]] = []
        self._readers: dict[Line, hiredis.Reader] = {}
        self._scripts = {script.sha.encode(): name for name, script in SCRIPTS.items()}
        relay.said_on = self._hear

    def _hear(self, line: Line, data: bytes) -> None:
        reader = self._readers.setdefault(line, hiredis.Reader())
        reader.feed(data)
        while (command := reader.gets()) is not False:
            self.commands.append((line.role, command))

    @property
    def names(self) -> list[tuple[str, str]]:
        """The role and name of each command; a script has its own name."""
        return [
            (role, self._scripts[command[1]] if command[0] == b"EVALSHA" else command[0].decode())
            for role, command in self.commands
        ]


class Heard:
    """Records the messages published on a queue's two channels."""

    def __init__(self, redis: Any, queue: Queue) -> None:
        self._redis = redis
        self._channels = [queue.to_key("events"), queue.to_key("earlierDelayed")]
        self._messages = redis.pubsub()

    async def __aenter__(self) -> Heard:
        await self._messages.subscribe(*self._channels)
        for _ in self._channels:
            assert (await self._messages.get_message(timeout=10))["type"] == "subscribe"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._messages.aclose()

    async def before(self, marker: str) -> list[str]:
        """Publishes `marker` on the second channel and returns the messages that came before it."""
        await self._redis.publish(self._channels[1], marker)
        heard: list[str] = []
        while (message := (await self._messages.get_message(timeout=10))["data"]) != marker:
            heard.append(message)
        return heard


def nested(depth: int) -> Any:
    """A list in a list and so on, `depth` levels deep."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def assert_says(error: BaseException, message: str) -> None:
    """Checks that an error's text is one line and equals `message`, in which everything after a `*` may differ."""
    start, star, _ = message.partition("*")
    assert str(error).startswith(start) if star else str(error) == message
    assert "\n" not in str(error)


async def keys(queue: Queue, redis: Any) -> set[str]:
    """The queue's keys in Redis, without their prefix."""
    return {key.removeprefix(queue.key_prefix) async for key in redis.scan_iter(f"{queue.key_prefix}*")}
