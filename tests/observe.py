"""What tests look at, and where they interfere: connections and tasks, commands on a relay, what is stored."""

from __future__ import annotations

import asyncio
import signal
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
    """From now on the server says nothing; its sockets stay open."""
    assert server._process is not None
    server._process.send_signal(signal.SIGSTOP)


def thaw(server: Server) -> None:
    """Ends what `freeze` began."""
    assert server._process is not None
    server._process.send_signal(signal.SIGCONT)


async def answers(redis: Any) -> None:
    """Returns when a server that has just been started again answers an onlooker: it loads its data first."""
    await redis.connection_pool.disconnect()  # the onlooker's own connections, which it would find to be cut
    while True:
        try:
            await redis.ping()
        except BusyLoadingError:
            await asyncio.sleep(0.01)
        else:
            return


def beequeue_tasks() -> list[str]:
    """What runs in the background."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("beequeue")]


async def clients(server: Server) -> list[dict[str, str]]:
    """Who is connected to a server of the test's own, but for the test itself."""
    async with Redis.from_url(server.url, decode_responses=True, client_name=ONLOOKER) as redis:
        return [client for client in await redis.client_list() if client["name"] != ONLOOKER]


async def present(server: Server, count: int) -> bool:
    return len(await clients(server)) == count


def takes_no_more(queue: Queue) -> bool:
    """Whether a worker that is being closed has come to the end of its intake; `paused` is a few steps ahead of that."""
    return queue._consumer is not None and queue._consumer._exchange.closing


async def calls_of(redis: Any, command: str) -> int:
    """How often a server of the test's own has run a command."""
    statistics = await redis.info("commandstats")
    calls: int = statistics.get(f"cmdstat_{command}", {"calls": 0})["calls"]
    return calls


def soon(attempt: int) -> int:
    return 10


def said(relay: Relay, what: bytes) -> int:
    """How often the queues behind a relay have said it."""
    return sum(line.said.count(what) for line in relay.lines)


class Spoken:
    """What queues say through a relay from now on: each command, with the role of its connection."""

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
        """Of each command: the role, and what it is called; a script by its name."""
        return [
            (role, self._scripts[command[1]] if command[0] == b"EVALSHA" else command[0].decode())
            for role, command in self.commands
        ]


class Heard:
    """What is published on a queue's two channels meanwhile."""

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
        """Publishes `marker` on the second channel, and returns what came before it."""
        await self._redis.publish(self._channels[1], marker)
        heard: list[str] = []
        while (message := (await self._messages.get_message(timeout=10))["data"]) != marker:
            heard.append(message)
        return heard


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def assert_says(error: BaseException, message: str) -> None:
    """One line: `message`, in which a `*` at the end stands for any text."""
    start, star, _ = message.partition("*")
    assert str(error).startswith(start) if star else str(error) == message
    assert "\n" not in str(error)


async def keys(queue: Queue, redis: Any) -> set[str]:
    """The keys that the queue has, below its prefix."""
    return {key.removeprefix(queue.key_prefix) async for key in redis.scan_iter(f"{queue.key_prefix}*")}
