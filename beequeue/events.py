"""Events: the message on the wire, and listeners. No I/O.

`Event` is one message of the channel `<prefix>:<name>:events`. `Emitter` keeps listeners and calls them, each isolated from the
others.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar, overload

from beequeue.errors import JobFailed, UnreadableData
from beequeue.wire.node_json import dump_json, load_json

Listener = TypeVar("Listener", bound=Callable[..., Any])

ENDS = frozenset({"succeeded", "failed"})
"""A job's last event is one of these."""


class Event(NamedTuple):
    """One message: the job's `id`, the event's `name`, and its `data`, which is an exception for `failed` and `retrying`."""

    id: str
    name: str
    data: Any

    @classmethod
    def decode(cls, payload: bytes) -> Event:
        """Reads a message; raises `UnreadableData` when the payload is not one."""
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
    """The message of a failure; a stranger may have published anything in its place."""
    try:
        return "" if message is None else str(message)
    except RecursionError:  # nested so deep that it can be read, but not printed
        return type(message).__name__


_HEAD = re.compile(rb'\{"id":"([^"\\]{1,1000})","event":"([^"\\]{1,100})"')


def peek(payload: bytes) -> tuple[str, str] | None:
    """The job's id and the event's name, without decoding the message; None when its members are not in bee-queue's order."""
    head = _HEAD.match(payload)
    try:
        return None if head is None else (head[1].decode(), head[2].decode())
    except UnicodeDecodeError:
        return None


def encode_event(job_id: str, name: str, data: Any = None) -> bytes:
    """Encodes a message of the channel `events`, members in bee-queue's order; None gives no member `data`.

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
        """Calls `listener` at each `event` from now on, and returns it. Without `listener`, returns a decorator."""
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
        """Calls `listener` at the next `event` only, and returns it. Without `listener`, returns a decorator."""
        if listener is None:
            return lambda decorated: self.once(event, decorated)
        if not callable(listener):
            raise TypeError(f"the listener of {event!r} must be callable, not {listener!r}")
        self.on(event, _Once(self, event, listener))
        return listener

    def _listens_to(self, event: str) -> bool:
        """Whether `event` has a listener."""
        return bool((self._listeners or {}).get(event))

    def off(self, event: str, listener: Callable[..., Any]) -> None:
        """Stops calling `listener` at `event`; does nothing when it does not listen."""
        present = (self._listeners or {}).get(event, [])
        for index, candidate in enumerate(present):
            # a new list: `emit` may be walking the old one
            if candidate == listener or (isinstance(candidate, _Once) and candidate.listener == listener):
                assert self._listeners is not None
                self._listeners[event] = present[:index] + present[index + 1 :]
                return

    def emit(self, event: str, *args: Any) -> bool:
        """Calls the listeners of `event`, in the order in which they were added; returns whether there are any.

        A queue reports the error that a listener raises through `error`, and calls the next one. A listener may be an `async
        def`.
        """
        if self._listeners is None or not (present := self._listeners.get(event)):
            return False
        for listener in present.copy():
            try:
                result = listener(*args)
            except (Exception, asyncio.CancelledError) as error:  # a listener may look at a cancelled future
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
    """A listener that removes itself at its first call."""

    __slots__ = ("emitter", "event", "listener")

    def __init__(self, emitter: Emitter, event: str, listener: Callable[..., Any]) -> None:
        self.emitter = emitter
        self.event = event
        self.listener = listener

    def __call__(self, *args: Any) -> Any:
        self.emitter.off(self.event, self.listener)
        return self.listener(*args)
