"""The protocol on one socket, against a peer that says chosen bytes in chosen pieces."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import beequeue.link
from beequeue.errors import CommandError, ConnectionLost
from beequeue.link import Command, Link, settle
from tests.test_fuzz import BROKEN


class Peer:
    """The other end of a link."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    async def connect(self, **options: Any) -> Link:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.reader, self.writer = await asyncio.open_connection(sock=theirs)
        transport, protocol = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        self.link = Link(
            transport,
            keep=protocol,
            on_message=lambda channel, payload: self.log.append((channel, b"".join((payload,)))),
            on_read_end=lambda: self.log.append("end of read"),
            **options,
        )
        return self.link

    def send(self, *args: Any, **options: Any) -> None:
        self.link.send(Command(args, self.log.append, **options))

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def logs(self, count: int) -> list[Any]:
        async with asyncio.timeout(5):
            while len(self.log) < count:
                await asyncio.sleep(0.001)
        return self.log


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    made = Peer()
    yield made
    if not made.link.lost.done():
        made.link.drop("test over")
        await made.link.lost
    made.writer.close()


PUSH = b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\np\r\n"


async def test_commands_of_one_step_leave_in_one_write(peer: Peer) -> None:
    """one that is alone leaves at once"""
    await peer.connect()
    peer.send(b"PING")
    assert await peer.reader.read(1000) == b"*1\r\n$4\r\nPING\r\n"
    peer.send(b"GET", "a")
    peer.send(b"GET", "ü")
    assert await peer.reader.read(1000) == b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*2\r\n$3\r\nGET\r\n$2\r\n\xc3\xbc\r\n"
    await peer.say(b"+PONG\r\n$1\r\n1\r\n$-1\r\n")
    assert await peer.logs(3) == [b"PONG", b"1", None]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
async def test_replies_and_pushes_in_any_pieces(peer: Peer, size: int) -> None:
    await peer.connect()
    for _ in range(3):
        peer.send(b"X")
    stream = PUSH + b":1\r\n" + PUSH + b"-ERR no\r\n#f\r\n" + PUSH
    for start in range(0, len(stream), size):
        await peer.say(stream[start : start + size])
        await asyncio.sleep(0)
    log = [entry for entry in await peer.logs(7 if size == 1000 else 9) if entry != "end of read"]
    message = (b"c", b"p")
    assert [str(entry) if isinstance(entry, CommandError) else entry for entry in log] == [
        message,
        1,
        message,
        "ERR no",
        False,
        message,
    ]


async def test_the_end_of_a_read_comes_after_all_of_it(peer: Peer) -> None:
    await peer.connect()
    peer.send(b"X")
    await peer.say(PUSH + b":1\r\n" + PUSH)
    assert await peer.logs(4) == [(b"c", b"p"), 1, (b"c", b"p"), "end of read"]


async def test_other_pushes_are_ignored(peer: Peer) -> None:
    await peer.connect()
    peer.send(b"X")
    await peer.say(b">2\r\n$10\r\ninvalidate\r\n*0\r\n:5\r\n")
    assert await peer.logs(1) == [5]


async def test_subscribe_is_confirmed_by_a_push(peer: Peer) -> None:
    link = await peer.connect()
    subscribing = asyncio.create_task(link.call(b"SUBSCRIBE", b"c"))
    await peer.reader.read(1000)
    await peer.say(b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n")
    await subscribing
    peer.send(b"X")
    await peer.say(b":7\r\n")
    assert await peer.logs(1) == [7]


async def test_subscribe_is_refused_by_an_ordinary_reply(peer: Peer) -> None:
    link = await peer.connect()
    subscribing = asyncio.create_task(link.call(b"SUBSCRIBE", b"c"))
    await peer.reader.read(1000)
    await peer.say(b"-NOPERM no\r\n")
    with pytest.raises(CommandError) as caught:
        await subscribing
    assert caught.value.code == "NOPERM"
    peer.send(b"X")
    await peer.say(b":7\r\n")
    assert await peer.logs(1) == [7]


async def test_resp2_messages_are_arrays(peer: Peer) -> None:
    link = await peer.connect(resp2_pushes=True)
    subscribing = asyncio.create_task(link.call(b"SUBSCRIBE", b"c"))
    await peer.reader.read(1000)
    await peer.say(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n")
    await subscribing
    peer.send(b"PING")
    await peer.say(PUSH.replace(b">", b"*") + b"*2\r\n$4\r\npong\r\n$0\r\n\r\n")
    assert await peer.logs(3) == [(b"c", b"p"), [b"pong", b""], "end of read"]


async def test_an_unknown_script_is_sent_whole(peer: Peer) -> None:
    """QK-07"""
    await peer.connect()
    peer.send(b"EVALSHA", b"sha", b"1", b"key", script="return 1")
    await peer.reader.read(1000)
    await peer.say(b"-NOSCRIPT No matching script.\r\n")
    assert b"EVAL\r\n$8\r\nreturn 1\r\n$1\r\n1\r\n$3\r\nkey" in await peer.reader.read(1000)
    await peer.say(b":1\r\n")
    assert await peer.logs(1) == [1]


@pytest.mark.parametrize("garbage", [b"?what\r\n", b":1\r\n", b"\x00\x00", *BROKEN], ids=repr)
async def test_what_cannot_be_read_ends_the_link(peer: Peer, garbage: bytes) -> None:
    """also a reply to no command"""
    link = await peer.connect()
    await peer.say(garbage)
    async with asyncio.timeout(5):
        assert "could not be read" in await link.lost


async def test_a_callback_that_fails_does_not_stop_the_others(peer: Peer) -> None:
    link = await peer.connect()
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["exception"]))

    def fails(reply: Any) -> None:
        raise RuntimeError("mine")

    link.send(Command((b"X",), fails))
    peer.send(b"X")
    await peer.say(b":1\r\n:2\r\n")
    assert await peer.logs(1) == [2]
    assert [str(problem) for problem in problems] == ["mine"]


async def test_orphans_are_told_apart(peer: Peer) -> None:
    link = await peer.connect()
    peer.send(b"WRITTEN")
    await peer.reader.read(1000)
    peer.writer.close()
    await link.lost
    peer.send(b"UNWRITTEN")
    written, unwritten = link.orphans()
    assert [command.args for command in written] == [(b"WRITTEN",)]
    assert [command.args for command in unwritten] == [(b"UNWRITTEN",)]


async def test_a_call_ends_with_the_link(peer: Peer) -> None:
    link = await peer.connect()
    calling = asyncio.create_task(link.call(b"X"))
    await peer.reader.read(1000)
    peer.writer.close()
    with pytest.raises(ConnectionLost) as caught:
        await calling
    assert caught.value.maybe_applied


async def test_a_silent_peer_is_noticed(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """a half-open socket: no reply within the ticks that a command has"""
    monkeypatch.setattr(beequeue.link, "TICK_S", 0.01)
    link = await peer.connect()
    peer.send(b"X")
    async with asyncio.timeout(5):
        assert "no reply within" in await link.lost


async def test_a_quiet_link_is_asked(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.link, "TICK_S", 0.01)
    link = await peer.connect(ping_when_quiet=True)
    async with asyncio.timeout(5):
        assert await peer.reader.read(1000) == b"*1\r\n$4\r\nPING\r\n"
        await peer.say(b"+PONG\r\n")
        assert await peer.reader.read(1000) == b"*1\r\n$4\r\nPING\r\n"
        assert "no reply within" in await link.lost


async def test_an_error_whose_waiter_was_cancelled_meanwhile_is_not_complained_of() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[Any] = []
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    future = loop.create_future()
    settle(future, CommandError("ERR no"))
    del future
    gc.collect()
    assert complaints == []
