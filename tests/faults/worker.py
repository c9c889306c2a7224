"""A worker that writes down what it does: `python -m tests.faults.worker URL NAME FILE STALL_INTERVAL_MS`.

Each line goes to FILE in one write with O_APPEND, so a kill loses none. A job starts behind its line, and ends behind it too.
SIGTERM closes the queue. Half-open sockets are found in a fifth of the usual time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import beequeue.link
import beequeue.store
from beequeue import CommandError, Job, Queue

CONCURRENCY = 4
TICK_S = 0.2
TAKE_WAIT_S = 1


def hurry() -> None:
    """Finds a silent connection within 2 s instead of 10 s (a take: that it is idle, after 1 s instead of 5 s)."""
    beequeue.link.TICK_S = TICK_S
    beequeue.store.TAKE_WAIT_S = TAKE_WAIT_S


def soon(attempt: int) -> int:
    """ms until a reconnection attempt."""
    return 20


async def main(url: str, name: str, path: str, stall_interval: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(*words: object) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    async def handler(job: Job) -> Any:
        number = job.data["number"]
        note("start", job.id, number)
        await asyncio.sleep(job.data["ms"] / 1000)
        fails = job.data["end"] == "failed" or job.options.get("retries", 0) > 0
        note("finish" if job.options.get("retries", 0) == 0 else "retry", job.id, number)
        if fails:
            raise ValueError(f"bad {number}")
        return {"number": number}

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    queue = Queue(
        name,
        url,
        get_events=False,
        activate_delayed_jobs=True,
        delayed_debounce=20,
        stall_interval=stall_interval,
        initial_redis_failure_retry_delay=50,
        reconnect=soon,
    )
    queue.on("stalled", lambda job_id: note("stalled", job_id))
    queue.on(
        "error", lambda error: note("error", type(error).__name__, *([error.code] if isinstance(error, CommandError) else []))
    )
    async with queue:
        queue.process(handler, CONCURRENCY)
        note("ready")
        await stop.wait()
    note("closed")


if __name__ == "__main__":
    hurry()
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
