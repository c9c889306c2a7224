"""A queue opened before a fork: the child's copy raises, and the parent's connections do not notice."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from beequeue import Client, Job, Queue, connect
from harness.server import Server
from tests.conftest import MakeQueue, echo, until
from tests.observe import present
from tests.relay import Relay

OPENED = "was opened before a fork and cannot be used in the child: make a new one there"


def in_a_child(work: Callable[[], Any]) -> Any:
    """Runs `work` in a forked child, which then exits at once; returns the result."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork while threads run
        child = os.fork()
    if child == 0:
        try:
            answer = json.dumps(work())
        except BaseException as error:
            answer = json.dumps(f"raised {error!r}")
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        answer = answers.read()
    assert os.waitpid(child, 0) == (child, 0)
    return json.loads(answer)


async def attempts(queue: Queue, job: Job) -> list[str]:
    """Makes each call and returns the error that it raises."""
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "save": lambda: queue.create_job("x").save(),
        "save_all": lambda: queue.save_all([queue.create_job("x")]),
        "progress": lambda: job.report_progress(1),
        "remove": job.remove,
        "get_job": lambda: queue.get_job("1"),
        "check_health": queue.check_health,
        "ready": queue.ready,
        "connect": queue.connect,
        "check_stalled_jobs": queue.check_stalled_jobs,
    }
    raised = []
    for name, call in calls.items():
        try:
            await asyncio.wait_for(call(), 5)
        except Exception as error:
            raised.append(f"{name} {type(error).__name__}: {error}")
        else:
            raised.append(f"{name} raised nothing")
    await asyncio.wait_for(queue.close(), 5)
    return raised


def expected(queue: Queue) -> list[str]:
    names = ("save", "save_all", "progress", "remove", "get_job", "check_health", "ready", "connect", "check_stalled_jobs")
    return [f"{name} WrongLoop: queue {queue.name} {OPENED}" for name in names]


async def test_a_child_that_is_forked_inside_the_loop(make_queue: MakeQueue, url: str) -> None:
    """its copy of the loop seems to run"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, stall_interval=60_000)
        gate = asyncio.Event()

        async def handler(job: Job) -> str:
            await gate.wait()
            return "done"

        job = await queue.create_job("x").save()
        queue.process(handler, 2)
        await until(lambda: queue.running == 1)
        await queue.check_health()
        before = {line: len(line.said) for line in relay.lines}
        assert in_a_child(lambda: asyncio.run(attempts(queue, job))) == expected(queue)
        await asyncio.sleep(0.05)  # the relay reads anything that a child may have sent
        gate.set()
        assert {line: len(line.said) for line in relay.lines} == before
        assert await job.result() == "done"
        assert queue.reconnects == 0
        await queue.close()


def test_a_child_that_is_forked_beside_the_loop(name: str, url: str) -> None:
    """forked between two turns of a loop that goes on in the parent"""
    with asyncio.Runner() as runner:

        async def begin() -> tuple[Queue, Job]:
            queue = await Queue(name, url, is_worker=False).ready()
            return queue, await queue.create_job("x").save()

        queue, job = runner.run(begin())
        assert in_a_child(lambda: asyncio.run(attempts(queue, job))) == expected(queue)

        async def end() -> int:
            async with queue:
                count = (await queue.check_health()).waiting
                await queue.destroy()
                return count

        assert runner.run(end()) == 1


def test_a_queue_that_is_opened_in_the_child(name: str, url: str) -> None:
    """made before the fork, as an application that forks its servers does"""
    queue = Queue(name, url, is_worker=False)

    async def use() -> int:
        async with queue:
            await queue.create_job("x").save()
            count = (await queue.check_health()).waiting
            await queue.destroy()
            return count

    assert in_a_child(lambda: asyncio.run(use())) == 1
    assert asyncio.run(use()) == 1


async def test_a_shared_connection_of_the_parent(url: str, name: str) -> None:
    async def use(client: Client) -> list[str]:
        raised = []
        for call in (lambda: Queue(name, client).ready(), client.ping):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                await call()
            raised.append(f"{type(caught.value).__name__}: {caught.value}")
        await client.close()
        return raised

    async with await connect(url) as client:
        assert in_a_child(lambda: asyncio.run(use(client))) == [f"WrongLoop: {client!r} {OPENED}"] * 2
        await client.ping()


async def test_a_child_that_lives_on_keeps_no_connection_open(own_server: Server, make_queue: MakeQueue) -> None:
    """else Redis would give a job to the child's copy of a take"""
    queue = await make_queue(redis=own_server.url).ready()
    queue.process(echo)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # returns once the parent has closed its end
        os._exit(0)
    try:
        await queue.close()
        await until(partial(present, own_server, 0))
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)  # noqa: ASYNC222 - it ends now
