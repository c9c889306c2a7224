"""A relay between queues and their Redis that a test can make slow, silent, forgetful or dead. It changes no byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Distort = Callable[["Line", bytes], Awaitable[bytes]]
CHUNK = 2**14
"""How many bytes a slow relay passes on at a time."""
HELD = 2**17
"""About how many bytes the kernel accepts for a relay that does not read them yet; on a loopback it would be megabytes."""
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST instead of FIN."""


class Line:
    """One relayed connection. Its `role` (event, take or command) follows from the commands that the queue sent on it."""

    def __init__(self, inner: asyncio.StreamWriter, outer: asyncio.StreamWriter) -> None:
        self.said = b""
        self.dead = False
        """When True, nothing comes through in either direction, and neither side notices."""
        self.moved_at = asyncio.get_running_loop().time()
        self._inner = inner
        self._outer = outer

    @property
    def role(self) -> str:
        if b"SUBSCRIBE" in self.said:
            return "event"
        return "take" if b"BRPOPLPUSH" in self.said or b"CLIENT" in self.said else "command"

    @property
    def is_open(self) -> bool:
        return not (self.dead or self._outer.transport.is_closing() or self._inner.transport.is_closing())

    def cut(self) -> None:
        for writer in (self._inner, self._outer):
            with contextlib.suppress(AttributeError):  # asyncio's own, when the transport was closed with data left to send
                writer.transport.abort()

    def reset(self) -> None:
        """Cuts the connection; the queue receives RST."""
        reset(self._outer)
        self.cut()

    async def pass_back(self, data: bytes) -> None:
        """Sends `data` to the queue as if Redis had sent it."""
        self._outer.write(data)
        await self._outer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes a TCP connection by RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.transport.abort()


class Relay:
    """Passes everything on to `target`; remembers `remember` bytes of each connection's commands, by default all.

    It listens on a unix socket, or with `tcp` on a port of the loopback; `url` says where.
    """

    def __init__(self, target: str, *, remember: int | None = None, tcp: bool = False) -> None:
        self._target = urlsplit(target)
        self._tcp = tcp
        self._remember = remember
        self._directory = tempfile.TemporaryDirectory(prefix="bq", dir="/tmp")
        self._path = Path(self._directory.name) / "relay.sock"
        self._gates: dict[str, asyncio.Event] = {}
        self._split: set[str] = set()
        self._last_words: dict[str, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.lines: list[Line] = []
        self._new: set[Line] = set()
        """The connections on which Redis has sent nothing yet."""
        self.said_on: Callable[[Line, bytes], None] = lambda line, data: None
        """Called with the data that a queue sends, before they are passed on."""
        self.distort: Distort | None = None
        """Awaited with the data that Redis sends; may delay or change them, or cut the line. The relay passes on its result."""
        self.resets: Literal["", "accepted", "greeted"] = ""
        """When to reset new connections: once accepted, or after the first data from Redis."""
        self.resets_done = 0
        self.rate: int | None = None
        """Bytes a second that come through in each direction, on all connections together; the rest waits at the sender."""
        self._free_at = [0.0, 0.0]
        self.forget_after_s: float | None = None
        """A connection that was idle for longer than this is dead, and neither side notices."""
        self.url = f"unix://{self._path}"

    async def __aenter__(self) -> Relay:
        if self._tcp:
            listening = socket.create_server(("127.0.0.1", 0))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HELD)
            self._server: asyncio.Server = await asyncio.start_server(self._serve, sock=listening)
            self.url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        else:
            self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for line in self.lines:
            line.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._directory.cleanup()

    def hold(self, role: str) -> None:
        """Holds back the data from Redis on the connections of a role until `release`."""
        self._gates[role] = asyncio.Event()

    def release(self, role: str) -> None:
        """Lets everything that was held back through, in one piece."""
        self._gates.pop(role).set()

    def split(self, role: str) -> None:
        """From now on passes the data from Redis on the connections of a role byte by byte."""
        self._split.add(role)

    def cut_before(self, role: str, words: bytes) -> None:
        """Cuts the next connection of a role on which Redis says `words`, after passing on everything before them."""
        self._last_words[role] = words

    def lead_to(self, target: str) -> None:
        """Leads new connections to another Redis; open ones stay with theirs."""
        self._target = urlsplit(target)

    def forget_closed(self) -> None:
        """Removes closed connections from `lines`."""
        self.lines = [line for line in self.lines if line.is_open]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.resets == "accepted":
            self.resets_done += 1
            reset(writer)
            return
        try:
            if self._target.scheme == "unix":
                inner_reader, inner_writer = await asyncio.open_unix_connection(self._target.path)
            else:
                inner_reader, inner_writer = await asyncio.open_connection(self._target.hostname, self._target.port or 6379)
        except OSError:  # Redis is down
            writer.transport.abort()
            return
        line = Line(inner_writer, writer)
        self.lines.append(line)
        self._new.add(line)
        for source, sink, to_redis in ((reader, inner_writer, True), (inner_reader, writer, False)):
            task = asyncio.create_task(self._pass_on(line, source, sink, to_redis))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _forget(self, line: Line) -> None:
        """Notes that data have moved; a connection that was idle for too long is dead from then on."""
        now = asyncio.get_running_loop().time()
        if self.forget_after_s is not None and now > line.moved_at + self.forget_after_s:
            line.dead = True
        line.moved_at = now

    async def _take_turn(self, takes_s: float, to_redis: bool) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at[to_redis] = max(now, self._free_at[to_redis]) + takes_s
        await asyncio.sleep(self._free_at[to_redis] - now)

    async def _wait_at_gate(self, line: Line, source: asyncio.StreamReader, sink: asyncio.StreamWriter, data: bytes) -> bytes:
        """Collects the data from Redis while its role is held back; returns those to pass on when it is released."""
        while (gate := self._gates.get(line.role)) is not None:
            more = asyncio.ensure_future(source.read(2**20))
            opened = asyncio.ensure_future(gate.wait())
            await asyncio.wait((more, opened), return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            if more.done() and not more.result():  # the end of the stream: nothing more can come
                await gate.wait()
            elif more.done():
                data += more.result()
            else:  # the gate opened during a read, whose data follow in a piece of their own
                sink.write(data)
                data = await more
        return data

    async def _pass_on(self, line: Line, source: asyncio.StreamReader, sink: asyncio.StreamWriter, to_redis: bool) -> None:
        try:
            while data := await source.read(2**20 if self.rate is None else CHUNK):
                self._forget(line)
                if line.dead:
                    continue
                if self.rate is not None:
                    await self._take_turn(len(data) / self.rate, to_redis)
                if to_redis:
                    if self._remember is None or len(line.said) < self._remember:
                        line.said += data
                    self.said_on(line, data)
                else:
                    data = await self._wait_at_gate(line, source, sink, data)
                    words = self._last_words.get(line.role)
                    if words and words in data:
                        del self._last_words[line.role]
                        sink.write(data[: data.index(words)])
                        await sink.drain()
                        line.cut()
                        return
                    if line.role in self._split:
                        for index in range(len(data)):
                            sink.write(data[index : index + 1])
                            await asyncio.sleep(0)  # lets the other side read it
                        continue
                    if self.distort is not None:
                        data = await self.distort(line, data)
                        if line.dead:
                            continue
                    if self.resets == "greeted" and line in self._new:
                        self.resets_done += 1
                        await line.pass_back(data)
                        line.reset()
                        return
                    self._new.discard(line)
                sink.write(data)
                if self.rate is not None:
                    await sink.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if not line.dead:
                sink.close()
