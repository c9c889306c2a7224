"""A fleet behind a proxy that accepts connections while its Redis is away: producers here, and twelve command-line workers.

There is no password, so connections send nothing before the first command, and the proxy may cut them at any step.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from beequeue import BeeQueueError, ConnectionLost, Job, Queue
from harness.children import end_with_parent
from harness.server import find_server, running_server
from tests import ROOT
from tests.conftest import skip, until
from tests.faults.connecting import free_ports
from tests.observe import beequeue_tasks
from tests.relay import Relay

WORKERS, PRODUCERS = 12, 4
PATIENCE_S = 60
APP = """
import asyncio, os, pathlib

async def work(job):
    with open("started", "a") as started:
        started.write(f"{job.id}\\n")
    while not pathlib.Path(job.data).exists():
        await asyncio.sleep(0.05)
    return os.getpid()
"""
HAPROXY = """
global
  stats socket {directory}/stats
defaults
  mode tcp
  retries 0
  timeout connect 1s
  timeout client 1h
  timeout server 1h
frontend front
  bind 127.0.0.1:{front} ssl crt {directory}/cert.pem
  default_backend back
backend back
  server redis 127.0.0.1:{back}
"""


class Away:
    """Makes a Redis go away and come back, and counts the connections that were cut meanwhile."""

    def __init__(self, go: Callable[[], None], come_back: Callable[[], None], cut: Callable[[], Awaitable[int]]) -> None:
        self.go = go
        self.come_back = come_back
        self.cut = cut


Front = tuple[str, Away]
"""The URL of a proxy, and the Redis behind it."""


@asynccontextmanager
async def relay(directory: Path) -> AsyncIterator[Front]:
    """A proxy that accepts and resets connections."""
    with running_server(find_server(os.environ)) as server:
        async with Relay(server.url, tcp=True, remember=2**16) as through:

            def go() -> None:
                through.resets, through.resets_done = "accepted", 0
                for line in through.lines:
                    line.reset()

            def come_back() -> None:
                through.resets = ""

            async def cut() -> int:
                return through.resets_done

            yield through.url, Away(go, come_back, cut)


@asynccontextmanager
async def haproxy(directory: Path) -> AsyncIterator[Front]:
    """HAProxy, which terminates TLS."""
    binary = shutil.which("haproxy")
    if binary is None:
        skip("no haproxy")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(directory / "cert.pem"))
    front, back = free_ports(2)
    (directory / "haproxy.cfg").write_text(HAPROXY.format(directory=directory, front=front, back=back))
    options = ("--bind", "127.0.0.1", "--port", str(back), "--appendonly", "yes", "--appendfsync", "always")
    with running_server(find_server(os.environ), *options) as server:
        arguments = ("-db", "-f", str(directory / "haproxy.cfg"))
        proxy = await asyncio.create_subprocess_exec(str(binary), *arguments, preexec_fn=end_with_parent())
        try:
            await until(lambda: listens(front))

            async def errors() -> int:
                return await connection_errors(directory / "stats")

            yield f"rediss://localhost:{front}?ssl_ca_certs={directory}/ca.pem", Away(server.stop, server.start, errors)
        finally:
            proxy.kill()
            await proxy.wait()


async def connection_errors(stats: Path) -> int:
    """How often HAProxy could not connect to its backend."""
    reader, writer = await asyncio.open_unix_connection(str(stats))
    writer.write(b"show stat\n")
    header, *rows = [line.split(",") for line in (await reader.read(2**20)).decode().splitlines() if line]
    writer.close()
    return next(int(row[header.index("econ")]) for row in rows if row[:2] == ["back", "BACKEND"])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def workers(url: str, name: str, directory: Path) -> AsyncIterator[None]:
    """`python -m beequeue worker` with concurrency 1; each worker must exit with 0."""
    (directory / "app.py").write_text(APP)
    command = (sys.executable, "-m", "beequeue", "worker", "app:work", "--queue", name, "--redis", url)
    with (directory / "said").open("wb") as said:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        options: dict[str, Any] = {"cwd": directory, "env": environment, "stderr": said, "preexec_fn": end_with_parent()}
        started = [await asyncio.create_subprocess_exec(*command, **options) for _ in range(WORKERS)]
    try:
        yield
        for worker in started:
            worker.terminate()
        assert [await worker.wait() for worker in started] == [0] * WORKERS
    finally:
        for worker in started:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()


FRONTS: dict[str, Callable[[Path], AbstractAsyncContextManager[Front]]] = {"resets": relay, "tls": haproxy}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", FRONTS)
async def test_all_work_again(front: str, name: str, tmp_path: Path) -> None:
    """Redis is away when all connect for the first time, and again while all are working."""
    errors: list[BeeQueueError] = []
    async with AsyncExitStack() as stack:
        url, redis = await stack.enter_async_context(FRONTS[front](tmp_path))
        redis.go()
        await stack.enter_async_context(workers(url, name, tmp_path))
        producers = [Queue(name, url, is_worker=False) for _ in range(PRODUCERS)]
        for queue in producers:
            queue.on("error", errors.append)
            stack.push_async_callback(queue.close)
        for time in ("first", "second"):
            await until(partial(enough, redis, await redis.cut()), PATIENCE_S)
            gate = tmp_path / f"gate of the {time} time"
            jobs = [producers[number % PRODUCERS].create_job(str(gate)) for number in range(WORKERS)]
            saving = [asyncio.create_task(job.save()) for job in jobs]
            redis.come_back()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*saving)
            await until(partial(all_have_begun, jobs, tmp_path), PATIENCE_S)
            gate.touch()
            async with asyncio.timeout(PATIENCE_S):
                assert len(set(await asyncio.gather(*(job.result() for job in jobs)))) == WORKERS
            if time == "first":
                redis.go()
        assert set(starts(tmp_path).values()) == {1}
        assert all(isinstance(error, ConnectionLost) for error in errors)
    assert beequeue_tasks() == []
    assert "Traceback" not in (tmp_path / "said").read_text()


async def enough(redis: Away, seen: int) -> bool:
    """Whether twice as many connections were cut since then as there are."""
    return await redis.cut() >= seen + 2 * (3 * WORKERS + 2 * PRODUCERS)


def all_have_begun(jobs: list[Job], directory: Path) -> bool:
    return {job.id for job in jobs} <= starts(directory).keys()


def starts(directory: Path) -> Counter[str]:
    """How often each job was started."""
    file = directory / "started"
    return Counter(file.read_text().split()) if file.exists() else Counter()
