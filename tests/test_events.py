"""Messages and listeners."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from beequeue import Queue
from beequeue.errors import JobFailed, UnreadableData
from beequeue.events import Emitter, Event, encode_event, peek
from tests.observe import nested


def test_messages_as_node_writes_them() -> None:
    assert Event.decode(b'{"id":"1","event":"succeeded","data":"baz"}') == ("1", "succeeded", "baz")
    assert Event.decode(b'{"id":"1","event":"succeeded"}') == ("1", "succeeded", None)
    assert Event.decode(b'{"id":"1","event":"progress","data":{"a":"value"}}').data == {"a": "value"}
    failed = Event.decode(b'{"id":"7","event":"failed","data":"fail!"}')
    assert isinstance(failed.data, JobFailed)
    assert str(failed.data) == "fail!"
    assert str(Event.decode(b'{"id":"7","event":"retrying"}').data) == ""


def test_a_lone_surrogate_is_read() -> None:
    assert Event.decode(b'{"id":"1","event":"succeeded","data":"\\ud800"}').data == "\ud800"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not json",
        b"null",
        b"[]",
        b'"text"',
        b'{"id":1,"event":"x"}',
        b'{"event":"x"}',
        b'{"id":"1"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_garbage_is_named_not_raised_elsewhere(payload: bytes) -> None:
    """QK-38"""
    with pytest.raises(UnreadableData):
        Event.decode(payload)


@pytest.mark.parametrize(
    "payload", [b'"' + b"a" * 100_000, b"\xff" * 100_000, b"[" * 100_000, b"9" * 100_000, b"[1]" + b" " * 100_000]
)
def test_an_error_keeps_no_message(payload: bytes) -> None:
    """Neither itself nor the errors that led to it. The traceback has a test of its own, below."""
    with pytest.raises(UnreadableData) as caught:
        Event.decode(payload)
    error: BaseException = caught.value.with_traceback(None)
    assert error.__context__ is None
    assert error.__cause__ is None
    assert len(str(error)) < 1_000
    assert [len(str(held)) for held in gc.get_referents(error) if len(str(held)) > 2_000] == []


async def test_an_error_that_is_reported_keeps_no_message() -> None:
    queue = Queue("q", auto_connect=False)
    errors: list[Exception] = []
    queue.on("error", errors.append)
    payload = b"[" * 100_000
    before = sys.getrefcount(payload)
    queue._tracker.read(payload)
    (error,) = errors
    assert isinstance(error, UnreadableData)
    assert error.__traceback__ is None
    assert sys.getrefcount(payload) == before


def test_an_error_quotes_only_the_beginning_of_a_message() -> None:
    with pytest.raises(UnreadableData) as caught:
        Event.decode(b'{"event":"x","data":"' + b"x" * 1000 + b'"}')
    quoted = repr(b'{"event":"x","data":"' + b"x" * 179)
    assert str(caught.value) == f"a message on the events channel names no job or no event: {quoted}"


@pytest.mark.parametrize(("data", "message"), [(b"null", ""), (b"5", "5"), (b'{"a":[]}', "{'a': []}")])
def test_any_value_may_stand_in_the_place_of_a_message(data: bytes, message: str) -> None:
    error = Event.decode(b'{"id":"1","event":"failed","data":' + data + b"}").data
    assert isinstance(error, JobFailed)
    assert error.args == (message,)


def test_a_message_that_cannot_be_printed_gives_its_type() -> None:
    """Python before 3.12 can read lists that are nested deeper than it can print."""
    deep = nested(990)
    try:
        printed = str(deep)
    except RecursionError:
        printed = "list"
    message = b'{"id":"1","event":"failed","data":' + b"[" * 990 + b"]" * 990 + b"}"
    assert Event.decode(message).data.args == (printed,)


def test_encoding_keeps_the_order_of_members() -> None:
    assert encode_event("1", "progress", {"b": 1, "a": "ü"}) == '{"id":"1","event":"progress","data":{"b":1,"a":"ü"}}'.encode()
    assert encode_event("1", "succeeded") == b'{"id":"1","event":"succeeded"}'
    assert encode_event("1", "succeeded", float("nan")) == b'{"id":"1","event":"succeeded","data":null}'
    assert encode_event("1", "succeeded", ["\ud800", math.nan]) == b'{"id":"1","event":"succeeded","data":["\\ud800",null]}'


class Collecting(Emitter):
    def __init__(self) -> None:
        super().__init__()
        self.failures: list[tuple[str, BaseException]] = []
        self.awaited: list[Awaitable[Any]] = []

    def _listener_failed(self, event: str, error: BaseException) -> None:
        self.failures.append((event, error))

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        self.awaited.append(result)


@pytest.mark.parametrize("error", [RuntimeError("mine"), asyncio.CancelledError("of a future that it looked at")])
def test_listeners_are_called_in_order_and_isolated(error: BaseException) -> None:
    """QK-37"""
    emitter, calls = Collecting(), []

    def bad(value: int) -> None:
        raise error

    emitter.on("x", bad)
    emitter.on("x", lambda value: calls.append(("first", value)))
    emitter.on("x", lambda value: calls.append(("second", value)))
    assert emitter.emit("x", 1) is True
    assert emitter.emit("y", 1) is False
    assert calls == [("first", 1), ("second", 1)]
    assert emitter.failures == [("x", error)]


def test_once_off_and_decorators() -> None:
    emitter, calls = Collecting(), []

    @emitter.on("x")
    def always() -> None:
        calls.append("always")

    @emitter.once("x")
    def once() -> None:
        calls.append("once")

    never = emitter.once("x", lambda: calls.append("never"))
    emitter.off("x", never)
    emitter.off("x", lambda: None)
    emitter.emit("x")
    emitter.emit("x")
    emitter.off("x", always)
    assert emitter.emit("x") is False
    assert calls == ["always", "once", "always"]


def test_a_once_listener_that_emits_again_is_called_once() -> None:
    """It is removed before its call."""
    emitter, calls = Collecting(), []

    def once(value: int) -> None:
        calls.append(value)
        if len(calls) < 5:
            emitter.emit("x", value + 1)

    emitter.once("x", once)
    assert emitter.emit("x", 1) is True
    assert emitter.emit("x", 1) is False
    assert calls == [1]


def test_off_takes_one_listener_off() -> None:
    emitter, calls = Collecting(), []

    def note(number: int) -> Callable[[], None]:
        return lambda: calls.append(number)

    first, second, third, fourth = (note(number) for number in range(4))
    for listener in (first, second, third, second, fourth):
        emitter.on("x", listener)
    emitter.off("x", second)
    emitter.off("y", first)
    emitter.emit("x")
    assert calls == [0, 2, 1, 3]


def test_whether_anybody_listens() -> None:
    emitter = Collecting()
    assert not emitter._listens_to("x")
    emitter.once("x", print)
    assert emitter._listens_to("x")
    assert not emitter._listens_to("y")
    emitter.off("x", print)
    assert not emitter._listens_to("x")


def test_a_listener_that_takes_itself_off_skips_nobody() -> None:
    emitter, calls = Collecting(), []

    def first() -> None:
        emitter.off("x", first)
        calls.append("first")

    emitter.on("x", first)
    emitter.on("x", lambda: calls.append("second"))
    emitter.emit("x")
    assert calls == ["first", "second"]


def test_a_listener_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="the listener of 'x' must be callable, not 3"):
        Collecting().on("x", 3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="the listener of 'x' must be callable, not 3"):
        Collecting().once("x", 3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("payload", "seen"),
    [
        (b'{"id":"1","event":"succeeded","data":1}', ("1", "succeeded")),
        ('{"id":"ü","event":"progress"}'.encode(), ("ü", "progress")),
        (b'{"event":"succeeded","id":"1"}', None),
        (b'{"id":"a\\"b","event":"succeeded"}', None),
        (b'{"id":"\xff","event":"succeeded"}', None),
        (b'{"id":"","event":"succeeded"}', None),
        (b'{"id":"' + b"x" * 1000 + b'","event":"' + b"y" * 100 + b'"}', ("x" * 1000, "y" * 100)),
        (b'{"id":"' + b"x" * 1001 + b'","event":"succeeded"}', None),
    ],
    ids=range(8),
)
def test_peek(payload: bytes, seen: tuple[str, str] | None) -> None:
    """Job and event of a message in bee-queue's order; it decodes nothing."""
    assert peek(payload) == seen


async def test_an_async_listener_is_handed_on() -> None:
    emitter, calls = Collecting(), []

    async def listen() -> None:
        await asyncio.sleep(0)
        calls.append("done")

    emitter.on("x", listen)
    emitter.emit("x")
    await emitter.awaited[0]
    assert calls == ["done"]
