"""What a stranger may publish: how much memory it costs a process that listens, and that it goes on.

Memory is that of a process of its own (Linux): resident now, and its peak since it was last asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis

from harness.server import Server, find_server, running_server
from tests.conftest import skip
from tests.observe import calls_of

ROOT = Path(__file__).parent.parent
MB = 1_000_000

LISTENER = """
import asyncio, json, sys
from beequeue import Queue

def memory():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    return [int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]

async def main(url, name):
    queue = Queue(name, url, is_worker=False, activate_delayed_jobs=True, reconnect=lambda attempt: 10)
    errors = {}
    def count(error):
        kind = type(error).__name__
        errors[kind] = errors.get(kind, 0) + 1
        assert len(str(error)) < 1000
    def tell(number, value):
        print(json.dumps([number, *memory(), len(queue.jobs), errors]), flush=True)
        errors.clear()
    queue.on("error", count)
    queue.on("job mark", tell)
    await queue.ready()
    job = await queue.create_job().set_id("mine").save()
    tell("ready", None)
    print(json.dumps(await job.result()), flush=True)
    await queue.close()

asyncio.run(main(*sys.argv[1:]))
"""


class Told(NamedTuple):
    """What a listener says of itself; bytes. `errors`: how many of each kind since it was last asked."""

    resident: int
    peak: int
    tracked: int
    errors: dict[str, int]


class Listener:
    """A process with a queue that listens, and one job of its own that waits for its end."""

    def __init__(self, server: Server, redis: Any, process: asyncio.subprocess.Process) -> None:
        self.server = server
        self.redis = redis
        self._process = process
        self._asked = 0

    async def tells(self, mark: str) -> Told:
        """What it says at a mark."""
        assert self._process.stdout is not None
        while True:
            number, *told = json.loads(await self._process.stdout.readline())
            if number == mark:
                return Told(*told)

    async def asked(self) -> Told:
        """What it says when it has read all that was published so far."""
        self._asked += 1
        mark = str(self._asked)
        telling = asyncio.create_task(self.tells(mark))
        async with asyncio.timeout(30):
            while not telling.done():  # one that Redis is about to cut off may not hear it
                await self.publish(json.dumps({"id": mark, "event": "mark"}).encode())
                await asyncio.wait((telling,), timeout=1)
        return telling.result()

    async def publish(self, payload: bytes, channel: str = "events") -> int:
        """Returns how many heard it, if they were not cut off for its size."""
        reached: int = await self.redis.publish(f"bq:q:{channel}", payload)
        return reached

    async def publish_many(self, count: int, script: str) -> None:
        """Runs a script that publishes by `say(channel, message)`, `i` from 1 to `count`; never far ahead of the listener."""
        say = "local function say(channel, message) redis.call('PUBLISH', 'bq:q:' .. channel, message) end\n"
        text = f"{say}for i = ARGV[1], ARGV[2] do {script} end"
        for first in range(1, count + 1, 5_000):
            await self.redis.eval(text, 0, first, min(count, first + 4_999))
            if first % 20_000 == 1:
                await self.asked()

    async def ends_well(self) -> None:
        """Its own job has waited all the time, and is told its end."""
        await self.publish(b'{"id":"mine","event":"succeeded","data":"well"}')
        assert self._process.stdout is not None
        async with asyncio.timeout(30):
            assert json.loads(await self._process.stdout.readline()) == "well"
            assert await self._process.wait() == 0


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server(find_server(os.environ)) as started:
        yield started


@pytest.fixture
async def listener(server: Server) -> AsyncIterator[Listener]:
    if sys.platform != "linux":
        skip("memory is read from /proc")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LISTENER, server.url, "q", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with Redis.from_url(server.url) as redis:
            listener = Listener(server, redis, process)
            async with asyncio.timeout(30):
                await listener.tells("ready")
            await listener.asked()
            yield listener
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def event(size: int) -> bytes:
    """A whole message about a job that nobody here knows."""
    return b'{"id":"x","event":"succeeded","data":"' + b"a" * size + b'"}'


async def test_an_event_of_100_mb_never_comes(listener: Listener) -> None:
    """Redis's limit for subscribers (32 MB) cuts the connection instead; the library reconnects and goes on"""
    before = await listener.asked()
    await listener.publish(event(100 * MB))
    after = await listener.asked()
    assert after.errors == {"ConnectionLost": 1}
    assert after.peak - before.resident < 210 * MB  # Valkey may write some of it before it cuts
    assert after.resident - before.resident < 30 * MB
    assert after.tracked == 1
    await listener.ends_well()


async def test_without_that_limit_an_event_costs_a_few_times_its_size_and_only_for_a_while(listener: Listener) -> None:
    await listener.redis.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    before = await listener.asked()
    for _ in range(3):
        await listener.publish(event(100 * MB))
        after = await listener.asked()
        assert after.errors == {}
        assert 100 * MB < after.peak - before.resident < 500 * MB  # as it is read, as a message, as JSON, as a value
        assert (await listener.asked()).resident - before.resident < 120 * MB  # the reader may keep what it has grown to
    await listener.ends_well()


@pytest.mark.parametrize(
    ("payload", "errors"),
    [
        (b"\xff" * (10 * MB), {"UnreadableData": 1}),
        (b"[" * (10 * MB), {"UnreadableData": 1}),
        (b'{"id":"x","event":"progress","data":' + b"[" * (5 * MB) + b"]" * (5 * MB) + b"}", {"UnreadableData": 1}),
        (b'{"id":"' + b"9" * (10 * MB) + b'","event":"succeeded"}', {}),
        (b'{"id":"1","event":"' + b"e" * (10 * MB) + b'"}', {}),
        (b"9" * (10 * MB), {"UnreadableData": 1}),
    ],
    ids=["no text", "deep", "deep within", "long id", "long name", "long number"],
)
async def test_a_strange_event_of_10_mb_costs_a_few_times_its_size(
    listener: Listener, payload: bytes, errors: dict[str, int]
) -> None:
    before = await listener.asked()
    for _ in range(6):
        await listener.publish(payload)
        after = await listener.asked()
        assert after.errors == errors
        assert after.peak - before.resident < 80 * MB
    # what the allocator keeps of one serves the next
    assert (await listener.asked()).resident - before.resident < 30 * MB
    await listener.ends_well()


FLOODS = {
    "unknown ids": ('say(\'events\', \'{"id":"\' .. i .. \'","event":"succeeded","data":1}\')', None),
    "unknown events": ('say(\'events\', \'{"id":"mine","event":"\' .. i .. \'","data":1}\')', None),
    "no events": ("say('events', '[' .. i)", "UnreadableData"),
    "times to come": ("say('earlierDelayed', 4000000000000 + i)", None),
    "times that have come": ("say('earlierDelayed', i)", None),
    "no times": ("say('earlierDelayed', ({'inf', '-inf', 'nan', '1e999', '-1', '', 'x', '\\255'})[i % 8 + 1])", None),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_200_000_messages_leave_nothing(listener: Listener, flood: str) -> None:
    script, error = FLOODS[flood]
    await listener.publish_many(50_000, script)
    before = await listener.asked()
    looks = await calls_of(listener.redis, "evalsha")
    await listener.publish_many(150_000, script)
    after = await listener.asked()
    assert set(after.errors) <= {error}
    assert after.tracked == 1
    assert after.resident - before.resident < 3 * MB
    # one look at the delayed jobs at a time, however many messages ask for it
    assert await calls_of(listener.redis, "evalsha") - looks < 5_000
    await listener.ends_well()
