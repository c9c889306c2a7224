"""The worker: takes jobs from the queue and returns each one's data as its result."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import uvloop

import config
from beequeue import BeeQueueError, Job, OperationTimedOut, Queue

log = logging.getLogger("harness")


async def handler(job: Job) -> dict[str, Any]:
    return {"data": job.data}


async def main(settings: config.Config) -> None:
    queue = Queue(
        settings.queue_name,
        redis=settings.redis_url,
        is_worker=True,
        activate_delayed_jobs=True,
        get_events=False,
        send_events=True,
        store_jobs=False,
        remove_on_success=True,
        remove_on_failure=True,
    )
    queue.on("ready", lambda: log.info("worker: connected; %d jobs at once", settings.concurrency))
    queue.on("stalled", lambda job_id: log.info("worker: job %s had lost its worker", job_id))
    queue.on("error", lambda error: log.warning("worker: %s", error))

    running = asyncio.create_task(queue.run(handler, concurrency=settings.concurrency))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    await asyncio.wait((running,))
    failure = None if running.cancelled() else running.exception()
    try:
        await queue.close()
    except OperationTimedOut:
        log.warning("worker: handlers that did not end were cancelled")
    log.info("worker: stopped")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    configuration = config.load()
    config.log_to_stderr()
    try:
        uvloop.run(main(configuration))
    except BeeQueueError as error:
        config.fail(f"worker: {error}")
