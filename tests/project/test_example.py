"""Every public call, type-checked and run once. A public name that is missing here fails the test."""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

import pytest

import beequeue
import beequeue.sync
from beequeue import (
    BeeQueueError,
    Client,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Health,
    Job,
    JobFailed,
    JobStalled,
    JobTimeout,
    LateFinish,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    OutcomeNotRecorded,
    OutcomeUnknown,
    Queue,
    QueueClosed,
    QueueSettings,
    RedisFailure,
    TaskFailed,
    UnreadableData,
    WrongLoop,
    check_redis_url,
    connect,
    linear_backoff,
)
from tests import ROOT
from tests.conftest import Seen
from tests.public import public


async def test_a_queues_life(url: str, name: str) -> None:
    check_redis_url(url)
    settings = QueueSettings(is_worker=False, reconnect=linear_backoff)
    assert_type(settings.stall_interval, int)
    client = await connect(url, reconnect=linear_backoff, ensure_scripts=True)
    assert_type(client, Client)
    await client.ping()
    queue = Queue(name, client, stall_interval=timedelta(seconds=5), ordered_events=True, activate_delayed_jobs=True)
    assert_type(await queue.connect(), bool)
    assert (await queue.ready()).is_running()
    assert queue.client is client
    assert not queue.paused
    assert_type(queue.settings, QueueSettings)
    assert queue.to_key("jobs") == f"{queue.key_prefix}jobs"
    queue.backoff_strategies["twice"] = lambda job: 2 * job.options["backoff"]["delay"]
    assert_type(await queue.check_stalled_jobs(), int)
    assert_type(await queue.check_health(), Health)
    counters = (queue.running, queue.tracked, queue.reconnects, queue.late_finishes, queue.unknown_outcomes)
    assert_type(counters, tuple[int, int, int, int, int])
    assert_type(await queue.destroy(), int)
    await queue.close(timeout=timedelta(seconds=1))
    await client.close()


async def test_a_jobs_life(url: str, name: str) -> None:
    async with await connect(url) as client, Queue(name, client) as queue:
        job = queue.create_job({"x": 2}).set_id("mine").retries(1).backoff("fixed", 10).timeout(timedelta(seconds=5))
        assert_type(job.delay_until(datetime.now(UTC)), Job)
        assert job.queue is queue
        progress, succeeded = Seen(), Seen()

        @job.on("progress")
        def on_progress(value: Any) -> None:
            progress(value)

        @queue.once("job succeeded")
        async def on_succeeded(job_id: str, result: Any) -> None:
            succeeded(job_id, result)

        assert_type(await job.save(), Job)
        assert_type(await queue.save_all([queue.create_job(None), queue.create_job([1])]), dict[Job, Exception])
        assert await job.is_in_set("waiting")
        assert_type(await queue.get_job("mine"), Job | None)
        assert_type(await Job.from_id(queue, 1), Job | None)
        assert_type(await queue.get_jobs("waiting", start=0, end=-1, size=10), list[Job])
        assert await queue.remove_job(1) is queue

        async def handler(job: Job) -> int:
            assert_type(await job.report_progress(50), int)
            doubled: int = job.data["x"] * 2
            return doubled

        running = asyncio.create_task(queue.run(handler, concurrency=2))
        assert await job.result(timeout=5_000) == 4
        assert (await progress.reaches(1), await succeeded.reaches(1)) == ([(50,)], [("mine", 4)])
        job.off("progress", on_progress)
        queue.off("job succeeded", on_succeeded)
        assert (job.id, job.data, job.status, job.progress) == ("mine", {"x": 2}, "created", 50)
        assert (job.options["retries"], job.uncertain, job.to_data()[:6]) == (1, False, '{"data')
        assert_type(await job.retry(), tuple[int, int])
        assert await job.result(timedelta(seconds=5)) == 4
        assert_type(await job.remove(), Job)
        assert_type(await queue.clean("failed", older_than=timedelta(days=1), limit=100), int)
        assert queue.jobs == {}
        queue.jobs = {}
        await queue.destroy()
        await queue.close(1_000)
        await running


async def test_a_worker_in_threads(url: str, name: str) -> None:
    async with Queue(name, url) as queue:
        queue.process(lambda job: job.data + 1, 3)
        assert await (await queue.create_job(1).save()).result() == 2
        await queue.destroy()


async def test_without_a_loop(url: str, name: str) -> None:
    async with Queue(name, url) as worker:
        worker.process(lambda job: job.data)
        script = f"from tests.project.test_example import in_a_script; in_a_script({url!r}, {name!r})"
        process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", "-c", script, cwd=ROOT)
        assert await process.wait() == 0
        await worker.destroy()


def in_a_script(url: str, name: str) -> None:
    with beequeue.sync.Queue(name, url) as queue:
        job = queue.save(queue.create_job("x"))
        assert_type(job, Job)
        assert queue.result(job, timeout=5_000) == "x"
        assert_type(queue.save_all([queue.create_job("y")]), dict[Job, Exception])
        assert_type(queue.get_job("none"), Job | None)
        assert_type(queue.get_jobs("succeeded", size=5), list[Job])
        assert_type(queue.check_health(), Health)
        queue.remove_job("none")
        queue.close(timeout=1_000)


def test_errors() -> None:
    assert ConnectionLost("down", maybe_applied=True).maybe_applied
    assert CommandError("OOM command not allowed").code == "OOM"
    assert all(issubclass(error, RedisFailure) for error in (CommandError, ConnectionLost, ConnectionRefused))
    others = (RedisFailure, JobFailed, JobStalled, JobTimeout, LateFinish, ListenerFailed, NotConnected)
    more = (OperationTimedOut, OutcomeNotRecorded, OutcomeUnknown, QueueClosed, TaskFailed, UnreadableData, WrongLoop)
    assert all(issubclass(error, BeeQueueError) for error in (*others, *more))


@pytest.mark.parametrize(
    "owner", [Queue, Job, Client, beequeue.sync.Queue], ids=lambda owner: f"{owner.__module__}.{owner.__name__}"
)
def test_nothing_is_left_out(owner: type) -> None:
    tree = ast.parse(Path(__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert public(owner) - used == set()


def test_every_public_name_is_imported() -> None:
    assert {name for name in beequeue.__all__ if name not in globals()} == set()
    assert all(inspect.getdoc(getattr(beequeue, name)) for name in beequeue.__all__)
