"""A relay between queues and their Redis that a test can make slow, silent or dead. It changes no byte."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

Distort = Callable[["Line", bytes], Awaitable[bytes]]


class Line:
    """One relayed connection. `role` is told by what the queue has said on it: event, take or command."""

    def __init__(self, inner: asyncio.StreamWriter, outer: asyncio.StreamWriter) -> None:
        self.said = b""
        self.dead = False
        """From now on nothing comes through, in either direction, and neither side is told."""
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
        self._inner.transport.abort()
        self._outer.transport.abort()

    async def pass_back(self, data: bytes) -> None:
        """Gives the queue what Redis has said."""
        self._outer.write(data)
        await self._outer.drain()


class Relay:
    """Listens on a unix socket and passes everything on to `target`; of what is said it keeps `remember` bytes a connection."""

    def __init__(self, target: str, *, remember: int | None = None) -> None:
        self._target = urlsplit(target)
        self._remember = remember
        self._directory = tempfile.TemporaryDirectory(prefix="bq", dir="/tmp")
        self._path = Path(self._directory.name) / "relay.sock"
        self._gates: dict[str, asyncio.Event] = {}
        self._split: set[str] = set()
        self._last_words: dict[str, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.lines: list[Line] = []
        self.refused = 0
        """How many connections were accepted and reset, since Redis was down."""
        self.said_on: Callable[[Line, bytes], None] = lambda line, data: None
        """called with what a queue says, before it is passed on"""
        self.distort: Distort | None = None
        """Awaited with what Redis says, which it may delay, pass on in part, or cut; what it returns is passed on."""
        self.url = f"unix://{self._path}"

    async def __aenter__(self) -> Relay:
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
        """Keeps back what Redis says on the connections of a role, until `release`."""
        self._gates[role] = asyncio.Event()

    def release(self, role: str) -> None:
        """Lets all that was kept back through, in one piece."""
        self._gates.pop(role).set()

    def split(self, role: str) -> None:
        """From now on passes each byte that Redis says on the connections of a role by itself."""
        self._split.add(role)

    def cut_before(self, role: str, words: bytes) -> None:
        """Cuts the next connection of a role on which Redis says `words`, when all before them has been passed on."""
        self._last_words[role] = words

    def lead_to(self, target: str) -> None:
        """Passes new connections on to another Redis; those that are open stay with theirs."""
        self._target = urlsplit(target)

    def forget_closed(self) -> None:
        """Keeps in `lines` what is open."""
        self.lines = [line for line in self.lines if line.is_open]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._target.scheme == "unix":
                inner_reader, inner_writer = await asyncio.open_unix_connection(self._target.path)
            else:
                inner_reader, inner_writer = await asyncio.open_connection(self._target.hostname, self._target.port or 6379)
        except OSError:  # Redis is down
            self.refused += 1
            writer.transport.abort()
            return
        line = Line(inner_writer, writer)
        self.lines.append(line)
        for source, sink, to_redis in ((reader, inner_writer, True), (inner_reader, writer, False)):
            task = asyncio.create_task(self._pass_on(line, source, sink, to_redis))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, line: Line, source: asyncio.StreamReader, sink: asyncio.StreamWriter, to_redis: bool) -> None:
        try:
            while data := await source.read(2**20):
                if line.dead:
                    continue
                if to_redis:
                    if self._remember is None or len(line.said) < self._remember:
                        line.said += data
                    self.said_on(line, data)
                else:
                    while (gate := self._gates.get(line.role)) is not None:
                        more = asyncio.ensure_future(source.read(2**20))
                        opened = asyncio.ensure_future(gate.wait())
                        await asyncio.wait((more, opened), return_when=asyncio.FIRST_COMPLETED)
                        opened.cancel()
                        if more.done():
                            data += more.result()
                        else:
                            # what is being read when the gate opens follows behind
                            sink.write(data)
                            data = await more
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
                sink.write(data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if not line.dead:
                sink.close()
