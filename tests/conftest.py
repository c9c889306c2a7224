"""Fixtures: a real Redis, queues with unique names, and a check that every error was expected."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis as sync_redis
from redis.asyncio import Redis
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from beequeue import BeeQueueError, Job, Queue, sync
from harness.server import Server, find_server, redis_url, running_server
from tests.loops import use_loop
from tests.observe import ONLOOKER

ALONE = {
    "containers": ("tests/harness/test_compose.py",),
    "harness": ("tests/harness/test_harness", "tests/harness/test_compare.py", "tests/bench/"),
    "faults": ("tests/faults/", "tests/producer/test_proof.py", "tests/wire/test_sizes.py"),
}
"""Tests that load the machine: those of one group never run beside each other. pytest-xdist starts with the groups."""
KEYS = {"id", "jobs", "waiting", "active", "succeeded", "failed", "delayed", "stalling", "stallBlock", "stalls"}


def pytest_configure() -> None:
    """TEST_LOOP=uvloop runs every test, and the workers of the faults, on uvloop."""
    use_loop(os.environ)


class InGroups(LoadScopeScheduling):  # type: ignore[misc]
    """Gives all tests of a group to one process, one after another, and each other test to any process."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for group, files in ALONE.items() if nodeid.startswith(files)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> InGroups:
    return InGroups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # what needs minutes comes last, where tests run one after another
    items.sort(key=lambda item: ("test_compose" in item.nodeid, "test_harness" in item.nodeid))


def pytest_xdist_auto_num_workers() -> int:
    """Two for each core: most tests wait more than they compute."""
    return 2 * (os.cpu_count() or 1)


def skip(reason: str) -> None:
    """Skips a test that cannot run here; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"CI skips nothing: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The Redis of this run: REDIS_URL, otherwise a server that the tests start."""
    with redis_url(os.environ) as found:
        yield found


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that a test may stop and start."""
    with running_server(find_server(os.environ)) as server:
        yield server


@pytest.fixture
async def own_redis(own_server: Server) -> AsyncIterator[Any]:
    """A plain client of `own_server`."""
    async with Redis.from_url(own_server.url, decode_responses=True, client_name=ONLOOKER) as client:
        yield client


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    """A plain client, to look at the keys that the queue wrote."""
    async with Redis.from_url(url, decode_responses=True) as client:
        yield client


class MakeQueue:
    """Makes queues of one name; collects the errors that they report."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.errors: list[Exception] = []
        self.queues: list[Queue] = []

    def __call__(self, name: str | None = None, redis: Any = None, **settings: Any) -> Queue:
        queue = Queue(name or self.name, redis or self.url, **settings)
        queue.on("error", self.errors.append)
        self.queues.append(queue)
        return queue

    def claim(self, kind: type[Exception]) -> list[Exception]:
        """Returns the reported errors of a kind; the test expects them."""
        claimed = [error for error in self.errors if isinstance(error, kind)]
        self.errors[:] = [error for error in self.errors if not isinstance(error, kind)]  # the list that the queues append to
        return claimed


@pytest.fixture
async def make_queue(name: str, url: str) -> AsyncIterator[MakeQueue]:
    make = MakeQueue(name, url)
    yield make
    for queue in make.queues:
        try:
            await queue.close()
        except BeeQueueError as error:
            make.errors.append(error)
    names = {queue.key_prefix for queue in make.queues}
    with sync_redis.Redis.from_url(url, decode_responses=True) as client:
        keys = {(prefix, key) for prefix in names for key in client.scan_iter(f"{prefix}*")}
        if keys:
            client.delete(*(key for _, key in keys))
    assert {key.removeprefix(prefix) for prefix, key in keys} <= KEYS
    assert make.errors == []
    await asyncio.sleep(0)
    left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("beequeue")]
    assert left == []
    await until(lambda: "beequeue heartbeat" not in [thread.name for thread in threading.enumerate()])  # it has ended its work


async def echo(job: Job) -> Any:
    """A handler."""
    return job.data


class Seen:
    """A listener that records its calls and can be waited for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._changed = asyncio.Event()

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)
        self._changed.set()

    async def reaches(self, count: int, deadline_s: float = 10) -> list[tuple[Any, ...]]:
        """Returns the calls when there are `count` of them."""
        async with asyncio.timeout(deadline_s):
            while len(self.calls) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.calls


@pytest.fixture
def seen() -> Callable[[], Seen]:
    return Seen


async def until(condition: Callable[[], Any], deadline_s: float = 10) -> None:
    """Polls a condition that no event signals."""
    async with asyncio.timeout(deadline_s):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.005)


def sync_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "beequeue sync"]


@pytest.fixture
def own_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the test its own background thread, which ends as at the interpreter's exit; tests without it have none."""
    monkeypatch.setattr(sync, "_background", sync._Background())
    yield
    started = sync._background.is_started()
    sync._background.end()
    assert sync_threads() == []
    assert not started or sync._background._loop.is_closed()
