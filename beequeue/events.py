"""Events: the message on the wire, listeners, and which job an event belongs to. No I/O.

`Event` is one message of the channel `<prefix>:<name>:events`. `Emitter` keeps and calls listeners, each isolated
from the others. `Registry` is the rule of job events: bind an id to its job, deliver its events, and forget it when it ends.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar, overload

import orjson

from beequeue.errors import JobFailed, UnreadableData
from beequeue.wire.node_json import dump_json, load_json

Listener = TypeVar("Listener", bound=Callable[..., Any])

ENDS = frozenset({"succeeded", "failed"})
"""The events after which a job has no more."""


class Event(NamedTuple):
    """One message: `id` of the job, event `name`, and its `data` (an exception for failed and retrying)."""

    id: str
    name: str
    data: Any

    @classmethod
    def decode(cls, payload: bytes) -> Event:
        """Reads a message; raises `UnreadableData` when it is not one."""
        try:
            message = orjson.loads(payload)
        except orjson.JSONDecodeError:
            message = None
        if message is None:
            message = load_json(payload, "message")
        if (
            type(message) is not dict
            or type(job_id := message.get("id")) is not str
            or type(name := message.get("event")) is not str
        ):
            raise UnreadableData(f"a message on the events channel names no job or no event: {payload[:200]!r}")
        data = message.get("data")
        if name == "failed" or name == "retrying":
            data = JobFailed(_as_text(data))
        return cls(job_id, name, data)


def _as_text(message: Any) -> str:
    """The message of a failure; a stranger may have put anything in its place."""
    try:
        return "" if message is None else str(message)
    except RecursionError:  # it could be read, nested as it is
        return type(message).__name__


_HEAD = re.compile(rb'\{"id":"([^"\\]{1,1000})","event":"([^"\\]{1,100})"')


def peek(payload: bytes) -> tuple[str, str] | None:
    """Job and name of an event whose members stand in bee-queue's order, without decoding it; None: it cannot be told."""
    head = _HEAD.match(payload)
    try:
        return None if head is None else (head[1].decode(), head[2].decode())
    except UnicodeDecodeError:
        return None


def encode_event(job_id: str, name: str, data: Any = None) -> bytes:
    """The message for the events channel, members in bee-queue's order; no `data` member for None.

    Raises `TypeError` when JSON cannot carry `data`.
    """
    message = {"id": job_id, "event": name}
    if data is not None:
        message["data"] = data
    return dump_json(message)


class Emitter:
    """Listeners by event name. A listener that raises is reported and stops nothing else."""

    __slots__ = ("_listeners",)

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[..., Any]]] | None = None

    @overload
    def on(self, event: str, listener: Listener) -> Listener: ...
    @overload
    def on(self, event: str) -> Callable[[Listener], Listener]: ...
    def on(self, event: str, listener: Listener | None = None) -> Listener | Callable[[Listener], Listener]:
        """Calls `listener` at each `event`; without a listener, a decorator. Returns the listener."""
        if listener is None:
            return lambda decorated: self.on(event, decorated)
        if not callable(listener):
            raise TypeError(f"the listener of {event!r} must be callable, not {listener!r}")
        if self._listeners is None:
            self._listeners = {}
        self._listeners.setdefault(event, []).append(listener)
        return listener

    @overload
    def once(self, event: str, listener: Listener) -> Listener: ...
    @overload
    def once(self, event: str) -> Callable[[Listener], Listener]: ...
    def once(self, event: str, listener: Listener | None = None) -> Listener | Callable[[Listener], Listener]:
        """Calls `listener` at the next `event` only; without a listener, a decorator. Returns the listener."""
        if listener is None:
            return lambda decorated: self.once(event, decorated)
        if not callable(listener):
            raise TypeError(f"the listener of {event!r} must be callable, not {listener!r}")
        self.on(event, _Once(self, event, listener))
        return listener

    def _listens_to(self, event: str) -> bool:
        """Whether anybody would be told of `event`."""
        return bool((self._listeners or {}).get(event))

    def off(self, event: str, listener: Callable[..., Any]) -> None:
        """Stops calling `listener` at `event`; nothing happens when it was not listening."""
        present = (self._listeners or {}).get(event, [])
        for index, candidate in enumerate(present):
            # a new list: `emit` may be walking the old one
            if candidate == listener or (isinstance(candidate, _Once) and candidate.listener == listener):
                assert self._listeners is not None
                self._listeners[event] = present[:index] + present[index + 1 :]
                return

    def emit(self, event: str, *args: Any) -> bool:
        """Calls the listeners of `event` in the order in which they were added; False when there is none."""
        if self._listeners is None or not (present := self._listeners.get(event)):
            return False
        for listener in present.copy():
            try:
                result = listener(*args)
            except (Exception, asyncio.CancelledError) as error:  # the latter as from a future that it looked at
                self._listener_failed(event, error)
            else:
                if result is not None and inspect.isawaitable(result):
                    self._listener_awaits(event, result)
        return True

    def _listener_failed(self, event: str, error: BaseException) -> None:
        raise NotImplementedError

    def _listener_awaits(self, event: str, result: Awaitable[Any]) -> None:
        raise NotImplementedError


class _Once:
    """A listener that takes itself off at its first call."""

    __slots__ = ("emitter", "event", "listener")

    def __init__(self, emitter: Emitter, event: str, listener: Callable[..., Any]) -> None:
        self.emitter = emitter
        self.event = event
        self.listener = listener

    def __call__(self, *args: Any) -> Any:
        self.emitter.off(self.event, self.listener)
        return self.listener(*args)
