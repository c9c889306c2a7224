"""dramatiq: one process with a thread for each job at once, and the default middleware.

It has no bulk call, so one thread sends. A job has ended when its message has been acknowledged (after_ack).
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from result import Clock, order, report

ORDER = order()
clock = Clock(ORDER["jobs"])
all_done = threading.Event()


class Ended(dramatiq.Middleware):
    def after_ack(self, broker: Any, message: Any) -> None:
        if clock.job_ended():
            all_done.set()


broker = RedisBroker(url=ORDER["url"])
broker.add_middleware(Ended())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=ORDER["queue"])
def noop(n: int) -> None:
    clock.job_started()


def enqueue() -> None:
    broker.client.ping()
    started = time.perf_counter()
    for n in range(ORDER["jobs"]):
        noop.send(n)
    report("dramatiq", ORDER["jobs"], time.perf_counter() - started)


def drain() -> None:
    worker = dramatiq.Worker(broker, worker_threads=ORDER["concurrency"])
    worker.start()
    all_done.wait()
    report("dramatiq", ORDER["jobs"], clock.seconds)
    worker.stop()


if __name__ == "__main__":
    logging.disable()
    {"enqueue": enqueue, "drain": drain}[ORDER["step"]]()
