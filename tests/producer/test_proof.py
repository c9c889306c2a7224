"""The fact that the cure needs, asked of a real Redis: on one RESP3 connection a save's reply comes before its job's event.

`make proof` asks a million times (ROUNDS); the tests ask less often.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest

from beequeue import Queue
from beequeue.events import Event
from beequeue.store.scripts import SCRIPTS
from beequeue.wire.address import Address
from beequeue.wire.link import Command, Link
from harness.children import end_with_parent
from harness.server import find_server, running_server

ROUNDS = int(os.environ.get("ROUNDS", "25000"))
IN_FLIGHT = 20
WORKERS = 3


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("io_threads", [1, 4])
async def test_a_reply_is_never_behind_its_jobs_event(name: str, io_threads: int) -> None:
    with running_server(find_server(os.environ), "--io-threads", str(io_threads)) as server:
        async with Queue(name, server.url, is_worker=False, get_events=False) as queue:
            workers = [await start_worker(server.url, name) for _ in range(WORKERS)]
            try:
                early, replies, events = await save_and_listen(queue, server.url)
            finally:
                for worker in workers:
                    worker.terminate()
                    await worker.wait()
    assert (early, replies, events) == ([], ROUNDS, ROUNDS)


async def start_worker(url: str, name: str) -> asyncio.subprocess.Process:
    command = ("-m", "beequeue", "worker", "tests.conftest:echo", "--queue", name, "--redis", url)
    options = ("--concurrency", "2", "--remove-on-success", "--no-delayed")
    return await asyncio.create_subprocess_exec(
        sys.executable, *command, *options, stderr=asyncio.subprocess.DEVNULL, preexec_fn=end_with_parent()
    )


async def save_and_listen(queue: Queue, url: str) -> tuple[list[str], int, int]:
    """Saves `ROUNDS` jobs, a new one for each that ends. Returns the ids whose event came before the reply, and the counts."""
    waiting_for_reply = 0
    replied: set[str] = set()
    early: list[str] = []
    replies = events = 0
    all_told = asyncio.Event()

    def on_message(channel: bytes, payload: bytes) -> None:
        nonlocal events
        event = Event.decode(payload)
        events += 1
        if event.id not in replied:
            early.append(event.id)
        replied.discard(event.id)
        if replies + waiting_for_reply < ROUNDS:
            save()
        if events == ROUNDS:
            all_told.set()

    def on_reply(reply: Any) -> None:
        nonlocal replies, waiting_for_reply
        waiting_for_reply -= 1
        replies += 1
        replied.add(reply.decode())

    def save() -> None:
        nonlocal waiting_for_reply
        waiting_for_reply += 1
        link.send(Command((*add_job, b"", entry), on_reply, script=SCRIPTS["add_job"].text))

    keys = [queue.to_key(suffix) for suffix in ("id", "jobs", "waiting")]
    add_job = (b"EVALSHA", SCRIPTS["add_job"].sha, 3, *keys)
    entry = queue.create_job("x").encode()
    transport, keep = await Address(url).open(3)
    link = Link(transport, keep=keep, on_message=on_message, on_read_end=lambda: None)
    await link.call(b"SUBSCRIBE", queue.to_key("events"))
    for _ in range(IN_FLIGHT):
        save()
    await all_told.wait()
    link.drop("all told")
    await link.lost
    return early, replies, events
