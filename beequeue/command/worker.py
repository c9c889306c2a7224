"""`python -m beequeue worker`: a worker that runs until it is signalled."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import time
from typing import Any

import uvloop

from beequeue.command.wording import counted
from beequeue.errors import BeeQueueError, OperationTimedOut, with_cause
from beequeue.escape import OneLine, one_line
from beequeue.job import Job
from beequeue.queue import Queue
from beequeue.settings import QueueOptions
from beequeue.signals import end_at_once, until_signalled
from beequeue.wire.address import Address
from beequeue.worker.attempt import Handler, is_async

log = logging.getLogger("beequeue")

SPANS_KEPT = 10_000
"""How many jobs' times are kept until the job ends. An attempt that could not be settled never reports its end."""


def run(options: argparse.Namespace) -> int:
    """Runs the worker and returns the exit code."""
    # The handler's module has been imported by now; basicConfig leaves alone any logging that it has set up.
    out = logging.StreamHandler()
    out.addFilter(OneLine())  # A handler may log the contents of its jobs.
    logging.basicConfig(handlers=[out], format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        uvloop.run(_work(options))
    except BeeQueueError as error:
        log.error("%s", one_line(error))
        return 1
    end_at_once()  # The loop has restored Python's own handlers.
    return 0


async def _work(options: argparse.Namespace) -> None:
    """Returns when a signal has ended the worker; raises the error when Redis has refused it."""
    settings: Any = {name: value for name, value in vars(options).items() if name in QueueOptions.__annotations__}
    queue = Queue(options.queue, options.redis, get_events=False, store_jobs=False, **settings)
    queue.on("ready", lambda: log.info("connected"))
    queue.on("error", lambda error: log.warning("%s: %s", type(error).__name__, one_line(with_cause(error))))
    handler = with_log(queue, options.handler) if options.verbose else options.handler

    async def process() -> None:
        log.info("starting: queue %s at %s, concurrency %d", options.queue, Address(options.redis), options.concurrency)
        await queue.run(handler, options.concurrency)

    try:
        if await until_signalled(process(), second_kills=True):
            log.info("closing: waiting up to %d ms for %s", options.timeout, counted(queue.running, "running job"))
    finally:
        await _close(queue, options)
    log.info("closed")


async def _close(queue: Queue, options: argparse.Namespace) -> None:
    """Closes the queue; past the time-out it ends the process, which could otherwise wait for the threads of handlers."""
    try:
        await queue.close(options.timeout)
    except OperationTimedOut as late:
        if late.abandoned:
            abandoned = counted(late.abandoned, "handler")
            fate = "cancelled" if is_async(options.handler) else "left in threads; the stall check brings such jobs back"
            log.warning("time-out: %s had not ended and had to be %s", abandoned, fate)
        else:
            log.warning("time-out: Redis does not answer")
        sys.stdout.flush()
        os._exit(0)


def with_log(queue: Queue, handler: Handler) -> Handler:
    """`handler`, async or plain as before; each of its attempts is logged with its outcome and the time that it took."""
    spans: dict[Job, list[float]] = {}

    @functools.wraps(handler)
    async def run_async(job: Job) -> Any:
        span = spans[job] = [time.perf_counter()]
        try:
            return await handler(job)
        finally:
            span.append(time.perf_counter())

    @functools.wraps(handler)
    def run_plain(job: Job) -> Any:
        span = spans[job] = [time.perf_counter()]
        try:
            return handler(job)
        finally:
            span.append(time.perf_counter())

    def say(outcome: str, job: Job, why: str = "") -> None:
        now = time.perf_counter()
        start, *end = spans.pop(job, [now])  # There is none if the job timed out before it got a thread.
        log.info("%s", one_line(f"job {job.id} {outcome} after {((end or [now])[0] - start) * 1000:.1f} ms{why}"))
        for stale in list(spans)[:-SPANS_KEPT]:
            spans.pop(stale, None)

    queue.on("succeeded", lambda job, result: say("succeeded", job))
    queue.on("retrying", lambda job, error: say("retrying", job, f": {one_line(error)}"))
    queue.on("failed:fatal", lambda job, error: say("failed", job, f": {one_line(error)}"))
    return run_async if is_async(handler) else run_plain
