"""The protocol on one socket, with a peer that sends chosen bytes in chosen pieces."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import beequeue.wire.link
from beequeue.errors import CommandError, ConnectionLost
from beequeue.wire.link import QUIET_TICKS, REPLY_TICKS, Command, Link, complete
from tests.wire.test_fuzz import BROKEN


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


MASTER = b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"
REPLICA = b"*5\r\n$5\r\nslave\r\n$1\r\nh\r\n:1\r\n$7\r\nconnect\r\n:-1\r\n"
PUSH = b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\np\r\n"


async def test_commands_of_one_step_leave_in_one_write(peer: Peer) -> None:
    """a single command leaves at once"""
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
async def test_unreadable_data_end_the_link(peer: Peer, garbage: bytes) -> None:
    """including a reply without a command"""
    link = await peer.connect()
    await peer.say(garbage)
    async with asyncio.timeout(5):
        assert "Redis sent unreadable data: " in await link.lost


async def test_a_reply_that_does_not_fit_its_command_ends_the_link(peer: Peer) -> None:
    """the caller gets an error; later replies might belong to other commands too, and reach none"""
    link = await peer.connect()
    problems: list[Any] = []
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["exception"]))

    def fails(reply: Any) -> None:
        heard.append(reply)
        raise RuntimeError("mine")

    link.send(Command((b"X",), fails))
    peer.send(b"Y")
    await peer.say(b":1\r\n:2\r\n")
    async with asyncio.timeout(5):
        assert "answer does not fit b'X'" in await link.lost
    assert heard[0] == 1
    assert isinstance(heard[1], ConnectionLost)
    assert heard[1].maybe_applied
    assert [str(problem) for problem in problems] == ["mine"]
    assert peer.log == []
    assert [command.args for command in link.orphans()[0]] == [(b"Y",)]


async def test_written_and_unwritten_commands_are_told_apart(peer: Peer) -> None:
    link = await peer.connect()
    peer.send(b"WRITTEN")
    await peer.reader.read(1000)
    peer.writer.close()
    await link.lost
    peer.send(b"UNWRITTEN")
    written, unwritten = link.orphans()
    assert [command.args for command in written] == [(b"WRITTEN",)]
    assert [command.args for command in unwritten] == [(b"UNWRITTEN",)]


@pytest.mark.parametrize("busy", [True, False])
async def test_a_command_issued_on_a_lost_link_is_never_written(peer: Peer, busy: bool) -> None:
    """not even in the loop's next turn, in which it would be"""
    link = await peer.connect()
    if busy:
        peer.send(b"WRITTEN")
        await peer.reader.read(1000)
    peer.writer.close()
    await link.lost
    peer.send(b"UNWRITTEN")
    await asyncio.sleep(0)
    written, unwritten = link.orphans()
    assert [command.args for command in written] == [(b"WRITTEN",)] * busy
    assert [command.args for command in unwritten] == [(b"UNWRITTEN",)]


async def test_an_unknown_script_is_sent_whole_where_its_owner_wants_it(peer: Peer) -> None:
    await peer.connect()
    resent: list[Any] = []
    peer.send(b"EVALSHA", b"sha", b"0", script="return 1", resend=lambda command: resent.append(command.args))
    await peer.say(b"-NOSCRIPT No matching script.\r\n")
    peer.send(b"X")
    await peer.say(b":7\r\n")
    assert await peer.logs(1) == [7]
    assert resent == [(b"EVAL", "return 1", b"0")]


@pytest.mark.parametrize(
    "replies",
    [
        b"-NOAUTH Authentication required.\r\n" * 2,
        b"+PONG\r\n-LOADING Redis is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n-NOPERM no\r\n",
    ],
    ids=repr,
)
async def test_a_server_that_is_not_ready_is_neither_primary_nor_replica(peer: Peer, replies: bytes) -> None:
    link = await peer.connect()
    asking = asyncio.create_task(link.is_primary())
    await peer.reader.readexactly(28)
    await peer.say(replies)
    with pytest.raises(CommandError):
        await asking


async def test_a_call_ends_with_the_link(peer: Peer) -> None:
    link = await peer.connect()
    calling = asyncio.create_task(link.call(b"X"))
    await peer.reader.read(1000)
    peer.writer.close()
    with pytest.raises(ConnectionLost) as caught:
        await calling
    assert caught.value.maybe_applied


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.wire.link, "TICK_S", 0.01)


@pytest.mark.usefixtures("hurried")
async def test_a_silent_peer_is_noticed(peer: Peer) -> None:
    """a half-open socket: no data move while a reply is owed; the owner is called again and again"""
    stuck: asyncio.Queue[int] = asyncio.Queue()
    await peer.connect(on_stuck=lambda link: stuck.put_nowait(link.still_ticks))
    peer.send(b"X")
    async with asyncio.timeout(5):
        assert [await stuck.get() for _ in range(5)] == [REPLY_TICKS * times for times in (1, 2, 4, 8, 14)]
        await peer.say(b":1\r\n")
        await peer.logs(1)
        assert peer.link.still_ticks <= 1
        peer.send(b"Y")
        assert await stuck.get() == REPLY_TICKS  # the next silence is noticed as soon as the first


@pytest.mark.usefixtures("hurried")
async def test_an_idle_link_notices_a_second_silence_as_soon_as_the_first(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """even if the network swallows its own question, so that the kernel waits for an acknowledgement"""
    stuck: asyncio.Queue[int] = asyncio.Queue()
    await peer.connect(on_stuck=lambda link: stuck.put_nowait(link.still_ticks))
    peer.send(b"X")
    async with asyncio.timeout(5):
        assert [await stuck.get() for _ in range(3)] == [REPLY_TICKS * times for times in (1, 2, 4)]
        await peer.say(b":1\r\n")
        await peer.logs(1)
        monkeypatch.setattr(beequeue.wire.link, "ioctl", lambda *_: (2**20).to_bytes(4, sys.byteorder))
        assert await stuck.get() == REPLY_TICKS


@pytest.mark.usefixtures("hurried")
async def test_a_peer_that_reads_slowly_is_not_stuck(peer: Peer) -> None:
    """a link is slow, not dead, while more of a command reaches the other side, however long that takes"""
    stuck: list[int] = []
    link = await peer.connect(on_stuck=lambda link: stuck.append(link.still_ticks))
    peer.reader._limit = 1  # type: ignore[attr-defined]  # it stops reading at this amount
    peer.send(b"X", b"x" * 4_000_000)
    longest = total = 0
    while total < 4_000_000:
        total += len(await peer.reader.read(2**16))
        await asyncio.sleep(0.02)  # the peer's pace
        longest = max(longest, link.still_ticks)
    assert stuck == []
    assert longest < REPLY_TICKS


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("ticks", [False, True], ids=["written before the tick", "not yet written at the tick"])
async def test_a_peer_that_reads_slowly_after_an_answer_is_not_stuck(ticks: bool) -> None:
    """each answer starts the count again, even though another reply is due all the time"""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    transport, protocol = await loop.create_connection(asyncio.Protocol, sock=ours)
    link = Link(transport, keep=protocol)
    large = Command((b"X", b"x" * 4_000_000), lambda reply: None)

    def answered(reply: Any) -> None:
        link.send(large)
        if ticks:  # before the loop's next turn, which writes it
            link._has_delivered()

    link.send(Command((b"X",), answered))
    link.send(Command((b"X",), lambda reply: None))
    async with asyncio.timeout(5):
        while not link.still_ticks:
            await asyncio.sleep(0.001)
    await loop.sock_sendall(theirs, b":1\r\n")
    longest = total = 0
    while total < 4_000_000:
        total += len(await loop.sock_recv(theirs, 2**16))
        await asyncio.sleep(0.02)  # the peer's pace
        longest = max(longest, link.still_ticks)
    link.drop("test over")
    await link.lost
    theirs.close()
    assert longest < REPLY_TICKS


@pytest.mark.usefixtures("hurried")
async def test_a_peer_that_swallows_everything_is_stuck(peer: Peer) -> None:
    """data accepted later are no sign of life while nothing comes back"""
    stuck = asyncio.Event()
    await peer.connect(on_stuck=lambda link: stuck.set())
    peer.send(b"FIRST")
    async with asyncio.timeout(5):
        while not stuck.is_set():
            peer.send(b"MORE")
            await peer.reader.read(2**16)
            await asyncio.sleep(0.005)  # the pace of the commands


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("role", "asked"),
    [
        (MASTER, b"*1\r\n$4\r\nROLE\r\n"),
        (b"-NOPERM this user has no permissions to run the 'role' command\r\n", b"*1\r\n$4\r\nPING\r\n"),
        (b"-ERR unknown command 'ROLE'\r\n", b"*1\r\n$4\r\nPING\r\n"),
    ],
    ids=["primary", "no right", "no ROLE"],
)
async def test_a_quiet_link_asks(peer: Peer, role: bytes, asked: bytes) -> None:
    """every link asks, so that no relay forgets it, however many ticks it was idle"""
    stuck = asyncio.Event()
    link = await peer.connect(on_stuck=lambda link: stuck.set())
    asking = asyncio.create_task(link.is_primary())
    async with asyncio.timeout(5):
        assert await peer.reader.readexactly(28) == b"*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nROLE\r\n"
        await peer.say(b"+PONG\r\n" + role)
        assert await asking is (True if b"ROLE" in asked else None)
        for _ in range(3 * REPLY_TICKS // QUIET_TICKS):
            assert await peer.reader.read(1000) == asked
            await peer.say(role if b"ROLE" in asked else b"+PONG\r\n")
        assert not stuck.is_set()
        await stuck.wait()


@pytest.mark.usefixtures("hurried")
async def test_a_quiet_subscriber_in_resp2_sends_ping(peer: Peer) -> None:
    """nothing but PING"""
    link = await peer.connect(resp2_pushes=True)
    asking = asyncio.create_task(link.is_primary())
    async with asyncio.timeout(5):
        await peer.reader.readexactly(28)
        await peer.say(b"+PONG\r\n" + MASTER)
        assert await asking is True
        assert await peer.reader.read(1000) == b"*1\r\n$4\r\nPING\r\n"


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("first", "told"), [(MASTER, [(None, "READONLY the server has become a replica")]), (REPLICA, [])])
async def test_a_link_to_a_replica_is_unfit_if_that_was_a_primary(peer: Peer, first: bytes, told: list[Any]) -> None:
    link = await peer.connect()
    unfit: list[Any] = []
    asking = asyncio.create_task(link.is_primary())
    async with asyncio.timeout(5):
        await peer.reader.readexactly(28)
        await peer.say(b"+PONG\r\n" + first)
        await asking
        link.on_unfit = lambda command, refusal: unfit.append((command, refusal))
        for _ in range(2):
            assert await peer.reader.read(1000) == b"*1\r\n$4\r\nROLE\r\n"
            await peer.say(REPLICA)
        await peer.reader.read(1000)
    assert unfit == told


@pytest.mark.usefixtures("hurried")
async def test_a_busy_link_asks_nothing(peer: Peer) -> None:
    """while a reply is owed: queued behind an open take the answer would be late, too"""
    stuck = asyncio.Event()
    await peer.connect(on_stuck=lambda link: stuck.set())
    peer.send(b"X")
    async with asyncio.timeout(5):
        await stuck.wait()
        assert await peer.reader.read(1000) == b"*1\r\n$1\r\nX\r\n"
        await peer.say(b":1\r\n")
        assert await peer.reader.read(1000) == b"*1\r\n$4\r\nPING\r\n"


async def test_a_transport_that_is_closing_already_is_a_lost_link() -> None:
    """it has told the driver's protocol and tells nobody twice"""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    transport.abort()
    theirs.close()
    link = Link(transport, keep=None)
    assert link.down
    async with asyncio.timeout(5):
        await link.lost
        with pytest.raises(ConnectionLost):
            await link.call(b"X")


@pytest.mark.parametrize(
    ("reply", "is_unfit"),
    [
        (b"-READONLY You can't write against a read only replica.\r\n", True),
        (b"-LOADING Redis is loading the dataset in memory\r\n", True),
        (b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n", True),
        (b"-CLUSTERDOWN Hash slot not served\r\n", True),
        (b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n", True),
        (b"-BUSY Redis is busy running a script.\r\n", True),
        (b"-ERR Error running script (call to f_1): @user_script:9: @user_script: 9: -READONLY You can't write\r\n", True),
        (b"*2\r\n-READONLY You can't write against a read only replica.\r\n:0\r\n", True),
        (b"*2\r\n-@user_script: 5: -READONLY You can't write against a read only replica.\r\n:0\r\n", True),
        (b"*2\r\n:1\r\n-READONLY behind what was done\r\n", False),
        (b"-BUSYGROUP Consumer Group name already exists\r\n", False),
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", False),
    ],
    ids=repr,
)
async def test_a_refusal_because_of_the_servers_state_goes_to_the_owner(peer: Peer, reply: bytes, is_unfit: bool) -> None:
    link = await peer.connect()
    unfit: list[Any] = []
    link.on_unfit = lambda command, refusal: unfit.append((command and command.args, refusal.partition(" ")[0]))
    peer.send(b"X")
    await peer.reader.read(1000)
    await peer.say(reply)
    peer.send(b"Y")
    await peer.say(b":7\r\n")
    log = await peer.logs(1 if is_unfit else 2)
    assert log[-1] == 7
    assert [args for args, _ in unfit] == ([(b"X",)] if is_unfit else [])


async def test_a_link_that_is_left_answers_what_is_in_flight(peer: Peer) -> None:
    link = await peer.connect()
    peer.send(b"X")
    peer.send(b"Y")
    link.leave("for another")
    await peer.say(b":1\r\n")
    await peer.logs(1)
    assert not link.lost.done()
    await peer.say(b":2\r\n")
    async with asyncio.timeout(5):
        assert await link.lost == "for another"
    assert peer.log == [1, 2]


async def test_asyncio_does_not_complain_of_an_error_whose_waiter_was_cancelled() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[Any] = []
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    future = loop.create_future()
    complete(future, CommandError("ERR no"))
    del future
    gc.collect()
    assert complaints == []
