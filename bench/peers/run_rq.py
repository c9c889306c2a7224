"""rq: a SimpleWorker, which does not fork for each job, runs one job at a time; results are not kept; enqueue_many saves.

It only reports that the queue is empty, so the clock stops when a worker in burst mode returns.
"""

from __future__ import annotations

import logging
import sys
import time

from redis import Redis
from result import Clock, order, report
from rq import Queue, SimpleWorker

ORDER = order()
BATCH = 1_000
clock = Clock(ORDER["jobs"])
connection = Redis.from_url(ORDER["url"])


def noop(n: int) -> None:
    clock.job_started()


def enqueue() -> None:
    queue = Queue(ORDER["queue"], connection=connection)
    connection.ping()
    started = time.perf_counter()
    for first in range(0, ORDER["jobs"], BATCH):
        numbers = range(first, min(first + BATCH, ORDER["jobs"]))
        queue.enqueue_many([Queue.prepare_data("run_rq.noop", args=[n], result_ttl=0) for n in numbers])
    report("rq", ORDER["jobs"], time.perf_counter() - started)


def drain() -> None:
    sys.modules["run_rq"] = sys.modules["__main__"]  # the jobs' function is this program's
    SimpleWorker([ORDER["queue"]], connection=connection).work(burst=True, logging_level="CRITICAL")
    clock.stop()
    report("rq", ORDER["jobs"], clock.seconds)


if __name__ == "__main__":
    logging.disable()
    {"enqueue": enqueue, "drain": drain}[ORDER["step"]]()
