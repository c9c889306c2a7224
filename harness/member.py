"""One process of the topology: started, listened to, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from harness.children import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
END_S = 10
"""How long a process may take to end after SIGTERM, as in Compose."""

Listener = Callable[[str], None]


class Member:
    """Runs `command` in the project's directory and passes each line of its stdout and stderr to a listener."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self, environment: Mapping[str, str], out: Listener, err: Listener) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must not reach Redis before it reaches the client
            preexec_fn=end_with_parent(),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pumps = [
            asyncio.create_task(_pump(self._process.stdout, out), name=f"{self.name} stdout"),
            asyncio.create_task(_pump(self._process.stderr, err), name=f"{self.name} stderr"),
        ]

    @property
    def pid(self) -> int:
        """The process id; the process must have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.returncode if self._process else None

    async def ended(self) -> int:
        """Waits for the end and the last lines; returns the exit code."""
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.wait(self._pumps)
        return code

    async def end(self) -> int | None:
        """Sends SIGTERM, and SIGKILL after `END_S`; returns the exit code, or None if the process never started."""
        if self._process is None:
            return None
        self._signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.ended(), END_S)
        except TimeoutError:
            print(f"{self.name} did not end within {END_S} s of SIGTERM and was killed", file=sys.stderr)
            self._signal(signal.SIGKILL)
            return await self.ended()

    def _signal(self, number: signal.Signals) -> None:
        """Signals a process that runs. asyncio's own `send_signal` would reap it, and its exit code would be lost."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


async def _pump(lines: asyncio.StreamReader, listener: Listener) -> None:
    async for line in lines:
        listener(line.decode(errors="replace").rstrip("\n"))
