"""huey: threads, results not stored, no periodic tasks.

It has no bulk call, so one thread sends. A task leaves the list when it starts, and its end writes nothing: a job has ended
when its signal `complete` comes, which promises less than the other queues' ends.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from huey import RedisHuey
from huey.signals import SIGNAL_COMPLETE
from result import Clock, order, report

ORDER = order()
clock = Clock(ORDER["jobs"])
all_done = threading.Event()
huey = RedisHuey(ORDER["queue"], url=ORDER["url"], results=False)


@huey.task()
def noop(n: int) -> None:
    clock.job_started()


@huey.signal(SIGNAL_COMPLETE)
def ended(signal: str, task: Any) -> None:
    if clock.job_ended():
        all_done.set()


def enqueue() -> None:
    huey.pending_count()  # connects
    started = time.perf_counter()
    for n in range(ORDER["jobs"]):
        noop(n)
    report("huey", ORDER["jobs"], time.perf_counter() - started)


def drain() -> None:
    consumer = huey.create_consumer(workers=ORDER["concurrency"], worker_type="thread", periodic=False)
    consumer.start()
    all_done.wait()
    report("huey", ORDER["jobs"], clock.seconds)
    consumer.stop()


if __name__ == "__main__":
    logging.disable()
    {"enqueue": enqueue, "drain": drain}[ORDER["step"]]()
