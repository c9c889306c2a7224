"""Arbitrary bytes for our own parsers: a link's protocol in any pieces, messages, stored jobs.

They raise nothing but the documented error, replies stay in order, and each command is answered or failed exactly once.
"""

from __future__ import annotations

import asyncio
import math
import re
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beequeue import Queue
from beequeue.errors import CommandError, UnreadableData
from beequeue.events import Event
from beequeue.job import Job
from beequeue.settings import linear_backoff
from beequeue.wire.connection import Connection
from beequeue.wire.link import Command, Link
from beequeue.wire.node_json import load_json

# --- the protocol -----------------------------------------------------------------------------------------------------


class Socket(asyncio.Transport):
    """A transport that keeps the written data, and that reports its end as asyncio's do, in a later step."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.link: Link | None = None
        self.cut = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, Link)
        self.link = protocol

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.cut

    def abort(self) -> None:
        assert self.link is not None
        if not self.cut:
            self.cut = True
            asyncio.get_running_loop().call_soon(self.link.connection_lost, None)


class Session:
    """A link fed by hand; records the outcome of each command and the published messages, in order."""

    def __init__(self, commands: int, *, resp2: bool = False) -> None:
        self.log: list[Any] = []
        self.faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.faults.append(context))
        self.socket = Socket()
        self.link = Link(
            self.socket,
            keep=None,
            on_message=self.hear,
            on_read_end=lambda: None,
            resp2_pushes=resp2,
        )
        for number in range(commands):
            self.link.send(Command((b"X", number), lambda reply, number=number: self.log.append((number, reply))))  # type: ignore[misc]

    def hear(self, channel: bytes, payload: bytes) -> None:
        self.log.append(("message", channel, b"".join((payload,))))  # raises for anything but bytes, as our own listeners do

    def feed(self, stream: bytes, cuts: list[int]) -> None:
        """Passes data to the link like a transport: not once the socket is cut."""
        places = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
        for start, end in pairwise(places):
            if start < end and not self.socket.cut:
                self.link.data_received(stream[start:end])

    async def end(self) -> list[int]:
        """Cuts the socket and returns the numbers of the unanswered commands."""
        if not self.socket.cut:
            self.link.drop("test over")
        async with asyncio.timeout(5):
            await self.link.lost
        unanswered, unwritten = self.link.orphans()
        assert self.faults == []
        return [command.args[1] for command in unanswered + unwritten]


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


simple = st.text(alphabet=st.characters(codec="ascii", exclude_characters="\r\n"), max_size=8).map(str.encode)
replies = st.recursive(
    st.one_of(
        st.binary(max_size=20).map(lambda text: (bulk(text), text)),
        st.integers(-(2**63), 2**63 - 1).map(lambda number: (b":%d\r\n" % number, number)),
        st.just((b"$-1\r\n", None)),
        st.just((b"_\r\n", None)),
        st.booleans().map(lambda truth: (b"#t\r\n" if truth else b"#f\r\n", truth)),
        simple.map(lambda text: (b"+%s\r\n" % text, text)),
    ),
    lambda inner: st.lists(inner, max_size=4).map(
        lambda items: (b"*%d\r\n" % len(items) + b"".join(wire for wire, _ in items), [value for _, value in items])
    ),
    max_leaves=6,
)
errors = simple.map(lambda text: (b"-ERR %s\r\n" % text, str(CommandError(f"ERR {text.decode()}"))))
messages = st.tuples(st.binary(max_size=10), st.binary(max_size=40))
steps = st.lists(
    st.one_of(
        replies.map(lambda reply: ("reply", reply)),
        errors.map(lambda error: ("error", error)),
        messages.map(lambda message: ("message", message)),
        st.just(("other push", b"$10\r\ninvalidate\r\n*0\r\n")),
    ),
    max_size=12,
)
pieces = st.lists(st.integers(0, 2_000), max_size=20)


@given(steps=steps, cuts=pieces, unanswered=st.integers(0, 3), resp2=st.booleans())
@settings(deadline=None)
def test_any_replies_and_messages_in_any_pieces(steps: list[Any], cuts: list[int], unanswered: int, resp2: bool) -> None:
    """each reply reaches its command, in the order of the stream"""
    stream, expected, number = b"", [], 0
    sigil = b"*" if resp2 else b">"
    for kind, content in steps:
        if kind == "message":
            stream += sigil + b"3\r\n" + bulk(b"message") + bulk(content[0]) + bulk(content[1])
            expected.append(("message", *content))
        elif kind == "other push":
            stream += b">2\r\n" + content
        elif resp2 and isinstance(content[1], list) and content[1][:1] in ([b"message"], [b"subscribe"], [b"unsubscribe"]):
            continue  # on two sockets it looks like a message; no command there gets such a reply
        else:
            stream += content[0]
            expected.append((number, content[1]))
            number += 1

    async def run() -> None:
        session = Session(number + unanswered, resp2=resp2)
        session.feed(stream, cuts)
        log = [(key, str(rest[0])) if isinstance(rest[0], CommandError) else (key, *rest) for key, *rest in session.log]
        assert log == expected
        assert await session.end() == [*range(number, number + unanswered)]

    asyncio.run(run())


@given(stream=st.binary(max_size=300), cuts=pieces, commands=st.integers(0, 4), resp2=st.booleans())
@settings(deadline=None)
def test_any_bytes(stream: bytes, cuts: list[int], commands: int, resp2: bool) -> None:
    check_bytes(stream, cuts, commands, resp2)


TOKENS = [
    b"*0\r\n",
    b"*1\r\n",
    b"*2\r\n",
    b"*-1\r\n",
    b"~1\r\n",
    b">2\r\n",
    b"|1\r\n",
    b"*",
    b"$",
    b":",
    b"-",
    b"\r\n",
    b"\xff",
    b"t",
]
TOKENS += [b"$-1\r\n", b"$0\r\n\r\n", b"$9\r\nsubscribe\r\n", b"$4\r\npong\r\n", b":1\r\n", b"_\r\n", b"#t\r\n", b",inf\r\n"]
TOKENS += [
    b"+OK\r\n",
    b"-ERR no\r\n",
    b"-NOSCRIPT x\r\n",
    b"*-5\r\n",
    b":99999999999999999999\r\n",
    b"$99999999999\r\n",
    b"(1\r\n",
]
TOKENS += [b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\np\r\n"]
TOKENS += [b">0\r\n", b">1\r\n", b">3\r\n", b">4\r\n", b"$7\r\nmessage\r\n", b"%1\r\n", b"%2\r\n", b"*4294967290\r\n"]
TOKENS += [b"(" + b"9" * 5_000 + b"\r\n", b"=5\r\ntxt:a\r\n"]
BROKEN = [
    b">0\r\n",
    b">1\r\n$7\r\nmessage\r\n",
    b">2\r\n$7\r\nmessage\r\n$1\r\nc\r\n",
    b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n:1\r\n",
    b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n*0\r\n",
    b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n_\r\n",
    b"%1\r\n*0\r\n:1\r\n",
]
"""Data that no Redis sends, and that neither the reader nor the code for messages expects."""


@given(
    stream=st.lists(st.sampled_from(TOKENS + BROKEN), max_size=60), cuts=pieces, commands=st.integers(0, 4), resp2=st.booleans()
)
@settings(deadline=None)
def test_data_close_to_the_protocol(stream: list[bytes], cuts: list[int], commands: int, resp2: bool) -> None:
    check_bytes(b"".join(stream), cuts, commands, resp2)


@pytest.mark.parametrize("stream", BROKEN, ids=lambda stream: repr(stream[:40]))
async def test_data_of_a_broken_server_cut_the_link(stream: bytes) -> None:
    """with a reason; data before the fault are handled, data after it are not"""
    session = Session(2)
    session.feed(b":1\r\n" + stream + b":2\r\n", [])
    assert session.log == [(0, 1)]
    assert session.socket.cut
    assert await session.end() == [1]
    assert re.fullmatch(r"Redis sent unreadable data: neither a reply nor a message \(\w+: .*\)", session.link.lost.result())


async def test_a_reply_that_announces_more_than_there_is_memory_for() -> None:
    """it cuts the link if the memory (32 GB) is not there, else the link waits for the rest"""
    session = Session(2)
    session.feed(b":1\r\n*4294967290\r\n:2\r\n", [])
    assert session.log == [(0, 1)]
    await session.end()


async def test_a_fault_of_ours_is_not_blamed_on_redis() -> None:
    session = Session(0)
    session.link._on_message = lambda channel, payload: int("x")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="invalid literal"):
        session.feed(b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\np\r\n", [])
    assert not session.socket.cut


def check_bytes(stream: bytes, cuts: list[int], commands: int, resp2: bool) -> None:
    """Each command is answered or left over, once and in order; unreadable data cut the socket and raise nothing."""

    async def run() -> None:
        session = Session(commands, resp2=resp2)
        session.feed(stream, cuts)
        answered = [key for key, *_ in session.log if key != "message"]
        assert answered + await session.end() == [*range(commands)]

    asyncio.run(run())


@given(steps=st.lists(st.booleans(), max_size=20), cut=st.integers(0, 60), cuts=pieces)
@settings(deadline=None)
def test_a_link_that_is_lost_anywhere_fails_each_command_once(steps: list[bool], cut: int, cuts: list[int]) -> None:
    """`steps` says whether each command may be repeated; then it waits for the next link, and fails when there is none"""

    async def run() -> None:
        session = Session(0)
        connection = Connection(None, "test", reconnect=linear_backoff, report=session.log.append)  # type: ignore[arg-type]
        ends: list[int] = []
        connection._go_up(session.link)
        for number, repeatable in enumerate(steps):
            args = (b"X", number)
            connection.send(
                Command(args, lambda reply, number=number: ends.append(number), repeat=args if repeatable else None)  # type: ignore[misc]
            )
        session.feed((b":1\r\n" * len(steps))[:cut], cuts)
        session.link.drop("test over")
        await session.link.lost
        connection.link = None
        connection._fail_or_keep(session.link)
        kept = [command.args[1] for command in connection._waiting]
        assert sorted(ends + kept) == [*range(len(steps))]
        await connection.close()
        assert sorted(ends) == [*range(len(steps))]

    asyncio.run(run())


# --- messages and stored jobs -----------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
half_json = st.lists(
    st.sampled_from(
        [
            b'{"id":',
            b'"1"',
            b',"event":',
            b'"failed"',
            b',"data":',
            b"[",
            b"]",
            b"{",
            b"}",
            b"1e999",
            b"-",
            b'"\\ud800"',
            b"NaN",
        ]
    )
    | st.binary(max_size=4),
    max_size=12,
).map(b"".join)
near_events = st.fixed_dictionaries({}, optional={"id": values, "event": values | st.just("failed"), "data": values}).map(
    orjson.dumps
)
near_jobs = st.fixed_dictionaries(
    {},
    optional={
        "data": values,
        "options": values | st.dictionaries(st.sampled_from(["timestamp", "stacktraces", "retries", "delay"]), values),
        "status": values,
        "progress": values,
    },
).map(orjson.dumps)


@given(st.binary(max_size=200) | half_json | near_events | values.map(orjson.dumps))
@example(b"1" * 5_000)
@example(b'{"id":"1","event":"failed","data":' + b"[" * 5_000)
@settings(deadline=None)
def test_any_message_is_an_event_or_unreadable(payload: bytes) -> None:
    try:
        event = Event.decode(payload)
    except UnreadableData as error:
        told = str(error)
        assert len(told) < 1_200
    else:
        assert type(event.id) is str
        assert type(event.name) is str


@given(st.binary(max_size=200) | half_json | near_jobs | values.map(orjson.dumps))
@example(b"1" * 5_000)
@settings(deadline=None)
def test_any_entry_is_a_job_or_unreadable(entry: bytes) -> None:
    """and a job can be written again unchanged"""
    queue = Queue("q", auto_connect=False)
    try:
        job = Job.decode(queue, "7", entry)
    except UnreadableData as error:
        told = str(error)
        assert len(told) < 1_200
    else:
        assert job.id == "7"
        assert "7" in repr(job)
        again = Job.decode(queue, "7", job.encode())
        assert (again.data, again.options, again.status, again.progress) == (job.data, job.options, job.status, job.progress)


@given(values)
def test_written_json_is_read_unchanged(value: Any) -> None:
    read = load_json(orjson.dumps(value), "value")
    assert read == value or math.isclose(read, value)


@given(st.binary(max_size=60) | half_json)
@settings(deadline=None)
def test_any_text_on_the_second_channel_is_a_time_or_none(payload: bytes) -> None:
    """`Queue._receive` raises nothing and passes on a number or None"""
    queue = Queue("q", auto_connect=False)
    looked: list[float | None] = []

    class Activator:
        look_at = staticmethod(looked.append)

    queue._activator = Activator()  # type: ignore[assignment]
    queue._receive(queue._store.earlier_channel, payload)
    assert len(looked) == 1
    assert looked[0] is None or isinstance(looked[0], float)
