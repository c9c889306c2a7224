"""A worker that records its actions: `python -m tests.faults.worker URL NAME FILE STALL_INTERVAL_MS MOOD CONCURRENCY`.

It runs on the loop that TEST_LOOP names. The file MOOD controls the provider of its password. SIGUSR1 sets the process's clock
(`time.time`, which due times are compared with) an hour ahead, SIGUSR2 an hour back. SIGHUP opens the gate that gated jobs wait
for. SIGTERM closes the queue.

Each line goes to FILE in one write with O_APPEND, so a kill loses none. The line about the start or the end of a job is written
before the job starts or ends. Half-open sockets are found in a fifth of the usual time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

import beequeue.store.store
import beequeue.wire.link
from beequeue import CommandError, Job, Queue
from tests.faults.provider import with_provider

CONCURRENCY = 4
TICK_S = 0.2
TAKE_WAIT_S = 1
MAX_STALLS = 3
LOOK_EVERY_MS = 1_000
"""How long a worker whose clock was wrong may oversleep a due time."""
HOUR_S = 3_600


def hurry() -> None:
    """Finds a silent connection within 2 s instead of 10 s, and renews an idle take after 1 s instead of 5 s."""
    beequeue.wire.link.TICK_S = TICK_S
    beequeue.store.store.TAKE_WAIT_S = TAKE_WAIT_S


def soon(attempt: int) -> int:
    """ms until a reconnection attempt."""
    return 20


class Clock:
    """The process's clock, which can be set."""

    def __init__(self) -> None:
        self._ahead_s = 0
        self._true = time.time
        time.time = lambda: self._true() + self._ahead_s

    def jump(self, seconds: int) -> int:
        """Sets the clock; returns how many seconds it is ahead now."""
        self._ahead_s += seconds
        return self._ahead_s


class Warnings(logging.Handler):
    """Records the library's warnings about handlers that block the event loop."""

    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        blocked = re.search(r"handler \S+ of job (\S+) has blocked the event loop", record.getMessage())
        if blocked:
            self._note("blocked", blocked[1])


async def main(url: str, name: str, path: str, stall_interval: int, mood: Path, concurrency: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    async def handler(job: Job) -> Any:
        number = job.data["number"]
        note("start", job.id, number)
        if job.data.get("blocks"):
            time.sleep(job.data["ms"] / 1000)  # noqa: ASYNC251  # It is meant to block.
        else:
            await asyncio.sleep(job.data["ms"] / 1000)
        if job.data["gated"]:
            await gate.wait()
        if job.data["end"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        fails = job.data["end"] == "failed" or job.options.get("retries", 0) > 0
        note("finish" if job.options.get("retries", 0) == 0 else "retry", job.id, number)
        if fails:
            raise ValueError(f"bad {number}")
        return {"number": number}

    stop, gate = asyncio.Event(), asyncio.Event()
    clock, loop = Clock(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGHUP, gate.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: note("jumped", clock.jump(HOUR_S)))
    loop.add_signal_handler(signal.SIGUSR2, lambda: note("jumped", clock.jump(-HOUR_S)))
    logging.getLogger("beequeue").addHandler(Warnings(note))
    logging.getLogger("beequeue").addHandler(logging.StreamHandler())
    queue = Queue(
        name,
        with_provider(url, mood),
        get_events=False,
        activate_delayed_jobs=True,
        delayed_debounce=20,
        near_term_window=LOOK_EVERY_MS,
        max_stalls=MAX_STALLS,
        stall_interval=stall_interval,
        initial_redis_failure_retry_delay=50,
        reconnect=soon,
    )
    queue.on("stalled", lambda job_id: note("stalled", job_id))
    queue.on(
        "error", lambda error: note("error", type(error).__name__, *([error.code] if isinstance(error, CommandError) else []))
    )
    async with queue:
        queue.process(handler, concurrency)
        note("ready")
        await stop.wait()
    note("closed")


def run() -> None:
    """Reads the arguments."""
    url, name, path, stall_interval, mood, concurrency = sys.argv[1:]
    hurry()
    factory = uvloop.new_event_loop if os.environ.get("TEST_LOOP") == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(url, name, path, int(stall_interval), Path(mood), int(concurrency)))


if __name__ == "__main__":
    run()
