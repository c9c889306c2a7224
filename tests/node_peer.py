"""One side of a queue that a test drives, in any language; and the side that is bee-queue 2.0.0 on Node.

Calls, settings, setters and events have bee-queue's names on every side. This module knows nothing of the port.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from harness.original import DIRECTORY, install

DEADLINE_S = 10

Setter = tuple[Any, ...]
"""The name of a job's setter, and its arguments."""


class CallFailed(Exception):
    """A call to a peer failed; the message is the error's."""


class Peer:
    """A queue whose methods are called by name. It remembers the events that it and its jobs emitted."""

    def __init__(self) -> None:
        self.heard: dict[str, list[list[Any]]] = {}
        """Arguments by event. A job's own: `own succeeded` (id, result). A handler's start: `started` (job, epoch ms)."""
        self._changed = asyncio.Event()

    async def call(self, name: str, *args: Any) -> Any:
        """Calls the queue; raises `CallFailed`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Releases hanging handlers and closes the queue."""
        raise NotImplementedError

    async def save(self, data: Any, *setters: Setter) -> Any:
        """Saves a job and returns its fields."""
        return await self.call("save", data, setters)

    async def event(self, name: str, count: int = 1, deadline_s: float = DEADLINE_S) -> list[list[Any]]:
        """Waits for `count` events of a name and returns the arguments of all of them."""
        try:
            async with asyncio.timeout(deadline_s):
                while len(self.heard.get(name, [])) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            heard = {event: len(calls) for event, calls in self.heard.items()}
            raise TimeoutError(f"not {count} times {name!r} within {deadline_s} s; heard: {heard}") from None
        return self.heard[name]

    def _hear(self, name: str, args: list[Any]) -> None:
        self.heard.setdefault(name, []).append(args)
        self._changed.set()


class NodePeer(Peer):
    """A Node process with one bee-queue. It ends when its stdin is closed, even if this process is killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__()
        self._process = process
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read(), name="node peer")

    @classmethod
    async def start(cls) -> NodePeer:
        """Starts Node; its queue is made by the call `queue`. Raises `NotInstalled`."""
        pipe = asyncio.subprocess.PIPE
        command = (install(), str(DIRECTORY / "peer.js"))
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**26))

    async def call(self, name: str, *args: Any) -> Any:
        """Calls `name` in peer.js, or else a method of the queue; raises `CallFailed`."""
        assert self._process.stdin is not None
        if self._reading.done():
            raise CallFailed("node has ended")
        number = next(self._numbers)
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps({"id": number, "call": name, "args": args}).encode() + b"\n")
        async with asyncio.timeout(DEADLINE_S):
            return await answer

    async def close(self) -> None:
        """Closes the queue and ends the process."""
        if self._process.returncode is None:
            try:
                await self.call("release")
                await self.call("close")
            finally:
                await self._end()

    async def kill(self) -> None:
        """Kills the process."""
        self._process.kill()
        await self._end()

    async def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
            await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if "event" in told:
                self._hear(told["event"], told["args"])
                continue
            answer = self._pending.pop(told["id"])
            if answer.done():  # The caller has given up.
                continue
            if "error" in told:
                answer.set_exception(CallFailed(told["error"]))
            else:
                answer.set_result(told.get("result"))
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(CallFailed("node has ended"))
