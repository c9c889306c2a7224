"""redis-py at work: every failure at run time can be retried, Sentinel is asked, and an opened connection is alive."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis, Sentinel
from redis.credentials import CredentialProvider
from redis.exceptions import RedisError

from beequeue import ConnectionLost, Queue
from beequeue.wire.address import Address
from beequeue.wire.driver import BlockingConnection
from harness.server import Server, find_server, running_server
from tests.conftest import until
from tests.observe import free_port, freeze, thaw

PASSWORD = "Zq7/k@v9%#x"


# --- what fails at run time -------------------------------------------------------------------------------------------


class Unreliable(CredentialProvider):
    """Raises at the first call."""

    def __init__(self, failure: BaseException) -> None:
        self._failures = [failure]

    def get_credentials(self) -> tuple[str]:
        if self._failures:
            raise self._failures.pop()
        return (PASSWORD,)

    async def get_credentials_async(self) -> tuple[str]:
        return self.get_credentials()


class Stubborn(CredentialProvider):
    """Never has credentials, and swallows each cancellation until `released`."""

    def __init__(self) -> None:
        self.asked = 0
        self.released = asyncio.Event()

    async def get_credentials_async(self) -> tuple[str]:
        self.asked += 1
        while not self.released.is_set():
            with suppress(asyncio.CancelledError):
                await self.released.wait()
        return (PASSWORD,)


@pytest.mark.parametrize("is_worker", [True, False])
async def test_a_provider_that_swallows_its_cancellation_does_not_keep_a_queue_from_closing(
    is_worker: bool, own_server: Server
) -> None:
    provider = Stubborn()
    queue = Queue("q", {"path": str(own_server.socket), "credential_provider": provider}, is_worker=is_worker)
    await until(lambda: provider.asked == 2 + is_worker)
    async with asyncio.timeout(5):
        await queue.close(1_000)
    provider.released.set()
    await until(lambda: not any("beequeue" in task.get_name() for task in asyncio.all_tasks()))


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_server_that_does_not_speak_tls(protocol: int) -> None:
    """It waits for the rest of what it takes for a command."""
    port = free_port()
    with running_server(find_server({}), "--port", str(port)) as server:
        address = Address({"host": "127.0.0.1", "port": port, "ssl": True, "socket_connect_timeout": 0.3})
        with pytest.raises(ConnectionLost) as silent:
            await address.open(protocol)
        said = f"127.0.0.1:{port}/0: no answer within 0.3 s: it cannot be reached, or does not speak TLS on this port"
        assert str(silent.value) == said
        freeze(server)
        with pytest.raises(ConnectionLost) as silent:
            await Address({"path": str(server.socket), "db": 1, "socket_connect_timeout": 0.05}).open(protocol)
        assert str(silent.value) == f"{server.socket}/1: no answer within 0.05 s"
        thaw(server)


FAILURES: list[BaseException] = [
    RuntimeError("token service\n down"),
    KeyError("x"),
    TimeoutError(),
    OSError("away"),
    asyncio.CancelledError(),
    GeneratorExit("mine"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_provider_that_fails_once(failure: BaseException, protocol: int) -> None:
    with running_server(find_server({}), "--requirepass", PASSWORD) as server:
        address = Address({"path": str(server.socket), "credential_provider": Unreliable(failure)})
        with pytest.raises(ConnectionLost) as caught:
            await address.open(protocol)
        assert caught.value.maybe_applied is False
        assert type(failure).__name__ in str(caught.value) or str(failure) in str(caught.value)
        assert str(caught.value).isprintable()
        transport, _keep = await address.open(protocol)
        transport.abort()


async def test_a_provider_that_fails_once_in_a_queue(make_queue: Any) -> None:
    with running_server(find_server({}), "--requirepass", PASSWORD) as server:
        provider = Unreliable(RuntimeError("token service down"))
        setting = {"path": str(server.socket), "credential_provider": provider}
        queue = Queue("q", setting, reconnect=lambda attempt: 1)
        await queue.ready()
        await queue.close()


async def test_a_cancelled_open_is_cancelled(own_server: Server) -> None:
    opening = asyncio.create_task(Address(own_server.url).open(2))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("down"), OSError("away"), asyncio.CancelledError("cut"), GeneratorExit("ended")],
    ids=repr,
)
async def test_a_blocking_connection_raises_its_own_errors(failure: BaseException) -> None:
    with running_server(find_server({}), "--requirepass", PASSWORD) as server:
        connection = BlockingConnection(
            Address({"path": str(server.socket), "credential_provider": Unreliable(failure)}), timeout_s=5
        )
        with pytest.raises(ConnectionLost, match=str(failure)):
            await asyncio.to_thread(connection.call, "PING")
        assert await asyncio.to_thread(connection.call, "PING") == b"PONG"
        connection.close()


# --- Sentinel ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[int, int]]:
    """The ports of a server and of a Sentinel that calls it `shop`."""
    port, sentinel_port = free_port(), free_port()
    with running_server(find_server({}), "--port", str(port), "--bind", "127.0.0.1") as server:
        (server.directory / "sentinel.conf").write_text(f"sentinel monitor shop 127.0.0.1 {port} 1\n")
        process = await asyncio.create_subprocess_exec(
            server.binary, "sentinel.conf", "--sentinel", "--port", str(sentinel_port), cwd=server.directory,
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with Redis(port=sentinel_port) as client:
                await until(lambda: answers(client))
            yield port, sentinel_port
        finally:
            process.kill()
            await process.wait()


async def answers(client: Redis) -> bool:
    try:
        return bool(await client.ping())
    except (OSError, RedisError):
        return False


async def test_a_client_of_sentinel_without_another_reference() -> None:
    """its pool's arguments refer to the pool only weakly"""
    async with watched() as (port, sentinel_port):
        address = Address(Sentinel([("127.0.0.1", sentinel_port)]).master_for("shop"))  # type: ignore[no-untyped-call]
        pool: Any = address._setting.connection_pool  # type: ignore[union-attr]
        gc.collect()
        assert str(address) == "the server that Sentinel names/0"
        blocking = BlockingConnection(address, 5)
        with pytest.raises(ConnectionLost, match="has not been asked yet"):
            blocking.call("PING")
        for protocol in (2, 3):
            transport, _keep = await address.open(protocol)
            transport.abort()
        assert str(address) == f"127.0.0.1:{port}/0"
        assert await asyncio.to_thread(blocking.call, "PING") == b"PONG"
        blocking.close()
        for client in pool.sentinel_manager.sentinels:
            await client.aclose()


# --- alive when handed over -------------------------------------------------------------------------------------------

HELLO = b"%1\r\n$5\r\nproto\r\n:3\r\n"


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


ENDS: dict[str, Callable[[socket.socket], object]] = {
    "closes": lambda peer: peer.close(),
    "half-closes": lambda peer: peer.shutdown(socket.SHUT_WR),
    "resets": reset,
    "says more": lambda peer: peer.sendall(b"+more\r\n"),
}

RUNS: dict[str, Callable[[Awaitable[Any]], Any]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}  # type: ignore[dict-item]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_peer_that_leaves_between_handshake_and_hand_over(
    end: Callable[[socket.socket], object], protocol: int, run: Callable[[Awaitable[Any]], Any]
) -> None:
    """`open` never hands over a dead connection; with HELLO the driver has read the end by then"""

    async def use() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        address = Address({"host": "127.0.0.1", "port": listener.getsockname()[1]})
        opening = asyncio.ensure_future(address.open(protocol))
        peer, _ = await loop.sock_accept(listener)
        if protocol == 3:
            await loop.sock_recv(peer, 1000)
            peer.sendall(HELLO)
        end(peer)
        (outcome,) = await asyncio.gather(opening, return_exceptions=True)
        if protocol == 2 and isinstance(outcome, tuple):  # the end comes after the hand-over, and the link will see it
            transport, keep = outcome
            assert not transport.is_closing()
            assert not keep._protocol._stream_reader.at_eof()  # type: ignore[attr-defined]
            transport.abort()
        else:
            assert type(outcome) is ConnectionLost, outcome
            assert outcome.maybe_applied is False
        peer.close()
        listener.close()

    run(use())
