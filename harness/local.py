"""`python -m harness local`: one client, some workers and a Redis as processes, with Compose's prefixes on their lines.

The client's stdout goes to stdout, everything else to stderr. All processes end when the client ends, on a signal, or with
this process. The order is client, workers, Redis, so that no job is lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import TextIO

from beequeue.escape import escape
from harness.member import Listener, Member
from harness.server import redis_url


async def run(workers: int, environment: Mapping[str, str]) -> int:
    """Runs the topology until the client ends or a signal comes; returns the client's exit code."""
    width = len(f"worker_{workers}")
    client = Member("client_1", [sys.executable, "client.py"])
    crew = [Member(f"worker_{number}", [sys.executable, "worker.py"]) for number in range(1, workers + 1)]
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def printer(member: Member, stream: TextIO) -> Listener:
        prefix = f"{member.name:<{width}}  | "

        def show(line: str) -> None:
            try:
                print(prefix + escape(line), file=stream, flush=True)
            except BrokenPipeError:
                # the reader has gone: later lines, and the interpreter's last flush, must not raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                stop.set()

        return show

    with redis_url(environment) as url:
        environment = {**environment, "REDIS_URL": url}
        for member in crew:
            await member.start(environment, printer(member, sys.stderr), printer(member, sys.stderr))
        await client.start(environment, printer(client, sys.stdout), printer(client, sys.stderr))
        waits: list[asyncio.Task[object]] = [
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
    return code or 0


async def _tell_end(member: Member) -> None:
    code = await member.ended()
    print(f"{member.name} ended with {code}", file=sys.stderr)
