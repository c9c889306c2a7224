"""The main job's topology as processes: one client, some workers, a Redis; their lines prefixed like Compose's.

The client's stdout goes to stdout, everything else to stderr. It all ends with the client, with a signal, or with this
process; in this order, so that nothing is lost: client, workers, Redis.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from harness.children import end_with_parent
from harness.server import redis_url

ROOT = Path(__file__).resolve().parent.parent
END_S = 10
"""how long a process has to end after SIGTERM, as in Compose"""


class Member:
    """One process of the topology."""

    def __init__(self, name: str, program: str, width: int) -> None:
        self.name = name
        self._program = program
        self._prefix = f"{name:<{width}}  | "
        self._process: asyncio.subprocess.Process
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self, environment: Mapping[str, str], out: TextIO, unread: asyncio.Event) -> None:
        """Starts it; its stdout goes to `out`, its stderr to ours. `unread` is set when nobody reads those any more."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            self._program,
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
            asyncio.create_task(self._pump(self._process.stdout, out, unread), name=f"{self.name} stdout"),
            asyncio.create_task(self._pump(self._process.stderr, sys.stderr, unread), name=f"{self.name} stderr"),
        ]

    async def _pump(self, lines: asyncio.StreamReader, out: TextIO, unread: asyncio.Event) -> None:
        async for line in lines:
            try:
                print(self._prefix + line.decode(errors="replace").rstrip("\n"), file=out, flush=True)
            except BrokenPipeError:
                # whatever is printed from now on, and at the interpreter's last flush, goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
                unread.set()

    async def ended(self) -> int:
        """Waits for its end and its last lines; returns its exit code."""
        code = await self._process.wait()
        await asyncio.wait(self._pumps)
        return code

    async def end(self) -> int:
        """SIGTERM, and SIGKILL when that does not help; returns its exit code."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            return await asyncio.wait_for(self.ended(), END_S)
        except TimeoutError:
            print(f"{self.name} did not end within {END_S} s of SIGTERM and was killed", file=sys.stderr)
            self._process.kill()
            return await self._process.wait()


async def run(workers: int, environment: Mapping[str, str]) -> int:
    """Runs the topology until the client ends or a signal comes; returns the client's exit code."""
    width = len(f"worker_{workers}")
    client = Member("client_1", "client.py", width)
    crew = [Member(f"worker_{number}", "worker.py", width) for number in range(1, workers + 1)]
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with redis_url(environment) as url:
        environment = {**environment, "REDIS_URL": url}
        for member in crew:
            await member.start(environment, sys.stderr, stop)
        await client.start(environment, sys.stdout, stop)
        waits = [
            asyncio.create_task(stop.wait()),
            asyncio.create_task(client.ended()),
            *(asyncio.create_task(_tell_end(member)) for member in crew),
        ]
        await asyncio.wait(waits[:2], return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        code = await client.end()
        await asyncio.gather(*(member.end() for member in crew))
    return code


async def _tell_end(member: Member) -> None:
    code = await member.ended()
    print(f"{member.name} ended with {code}", file=sys.stderr)
