"""A loop's own task factory makes a worker's tasks too; it may be eager."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from beequeue import Job, Queue
from tests.conftest import MakeQueue


def kept(names: list[str]) -> Callable[..., asyncio.Task[Any]]:
    def factory(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        task.add_done_callback(lambda task: names.append(task.get_name()))
        return task

    return factory


async def work_through(queue: Queue, concurrency: int) -> None:
    """Jobs that suspend at once, later, or never; each runs, in the order of their ids."""
    count = 5 * concurrency + 3
    begun: list[Any] = []

    async def handler(job: Job) -> Any:
        begun.append(job.data)
        for _ in range(job.data % 3):
            await asyncio.sleep(0)
        return job.data

    jobs = [queue.create_job(number) for number in range(count)]
    assert await queue.save_all(jobs) == {}
    queue.process(handler, concurrency)
    assert await asyncio.gather(*(job.result() for job in jobs)) == list(range(count))
    assert sorted(begun) == list(range(count))
    assert begun[:concurrency] == list(range(concurrency))


async def test_handlers_run_in_tasks_of_the_loops_factory(make_queue: MakeQueue) -> None:
    names: list[str] = []
    asyncio.get_running_loop().set_task_factory(kept(names))
    await work_through(make_queue(), 5)
    assert "beequeue job" in names


if sys.version_info >= (3, 12):

    @pytest.mark.parametrize("concurrency", [1, 50])
    async def test_an_eager_task_factory(make_queue: MakeQueue, concurrency: int) -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        queue = make_queue()
        await work_through(queue, concurrency)
        await queue.close()
