"""The worker: takes jobs from the queue and returns each one's data as its result."""

from __future__ import annotations

import logging
from typing import Any

from beequeue import Job, Queue
from config import Config
from harness import program

log = logging.getLogger("harness")


async def handler(job: Job) -> dict[str, Any]:
    return {"data": job.data}


async def main(settings: Config) -> None:
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
    queue.on("ready", lambda: log.info("worker: connected; concurrency %d", settings.concurrency))
    queue.on("stalled", lambda job_id: log.info("worker: job %s had lost its worker", job_id))
    queue.on("error", lambda error: log.warning("worker: %s", error))
    await program.run_until_signal(queue, queue.run(handler, concurrency=settings.concurrency))


if __name__ == "__main__":
    program.start("worker", main)
