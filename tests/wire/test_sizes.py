"""Messages from untrusted publishers: how much memory they cost a listening process, and that it goes on.

Memory is measured in a separate process (Linux): resident memory, and its peak since the last report.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from redis.asyncio import Redis

from beequeue import Job, OutcomeUnknown, UnreadableData
from beequeue.events import encode_event
from beequeue.producer import guard, tracker
from harness.server import Server, find_server, running_server
from tests import ROOT
from tests.conftest import MakeQueue, Seen, skip, until
from tests.observe import calls_of

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
    """A listener's report; memory in bytes. `errors` counts each kind since the last report."""

    resident: int
    peak: int
    tracked: int
    errors: dict[str, int]


class Listener:
    """A process with a queue that listens, and with a job of its own that waits for its end."""

    def __init__(self, server: Server, redis: Any, process: asyncio.subprocess.Process) -> None:
        self.server = server
        self.redis = redis
        self._process = process
        self._asked = 0

    async def tells(self, mark: str) -> Told:
        """Its report at a mark."""
        assert self._process.stdout is not None
        while True:
            number, *told = json.loads(await self._process.stdout.readline())
            if number == mark:
                return Told(*told)

    async def asked(self) -> Told:
        """Its report once it has read everything published so far."""
        self._asked += 1
        mark = str(self._asked)
        telling = asyncio.create_task(self.tells(mark))
        async with asyncio.timeout(30):
            while not telling.done():  # a listener that Redis is about to cut off may miss it
                await self.publish(json.dumps({"id": mark, "event": "mark"}).encode())
                await asyncio.wait((telling,), timeout=1)
        return telling.result()

    async def publish(self, payload: bytes, channel: str = "events") -> int:
        """Publishes a message; returns the number of subscribers, including any cut off for its size."""
        reached: int = await self.redis.publish(f"bq:q:{channel}", payload)
        return reached

    async def publish_many(self, count: int, script: str) -> None:
        """Runs a script that calls `say(channel, message)` for `i` from 1 to `count`, never far ahead of the listener."""
        say = "local function say(channel, message) redis.call('PUBLISH', 'bq:q:' .. channel, message) end\n"
        text = f"{say}for i = ARGV[1], ARGV[2] do {script} end"
        for first in range(1, count + 1, 5_000):
            await self.redis.eval(text, 0, first, min(count, first + 4_999))
            if first % 20_000 == 1:
                await self.asked()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the process for a while: it reads nothing."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    async def is_cut_off(self) -> bool:
        """Whether Redis has no subscriber left."""
        return not await self.redis.client_list(_type="pubsub")

    async def ends_well(self) -> None:
        """Ends its own job, which has waited all the time, and checks that it learns so."""
        await self.publish(b'{"id":"mine","event":"succeeded","data":"well"}')
        assert self._process.stdout is not None
        async with asyncio.timeout(30):
            while isinstance(told := json.loads(await self._process.stdout.readline()), list):
                pass  # a mark published twice because it took long
            assert told == "well"
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
        async with Redis.from_url(server.url, socket_timeout=60) as redis:
            listener = Listener(server, redis, process)
            async with asyncio.timeout(30):
                await listener.tells("ready")
            await listener.asked()
            yield listener
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def event(size: int, job_id: bytes = b"x") -> bytes:
    """A whole message about `x`, a job that nobody here knows."""
    return b'{"id":"' + job_id + b'","event":"succeeded","data":"' + b"a" * size + b'"}'


def dear(size: int, job_id: bytes) -> bytes:
    """A message that takes thirty times its size when decoded."""
    return b'{"id":"' + job_id + b'","event":"succeeded","data":[' + b"{}," * (size // 3) + b"{}]}"


async def test_an_event_of_100_mb_never_comes(listener: Listener) -> None:
    """Redis's limit for subscribers (32 MB) cuts the connection instead; the library reconnects and goes on

    The listener is stopped meanwhile, because Valkey 9.1 may write all of it before it checks its limit.
    """
    before = await listener.asked()
    with listener.stopped():
        await listener.publish(event(100 * MB))
        await until(listener.is_cut_off)
    after = await listener.asked()
    assert after.errors == {"ConnectionLost": 1}
    assert after.peak - before.resident < 210 * MB  # the data that the socket held
    assert after.resident - before.resident < 30 * MB
    assert after.tracked == 1
    await listener.ends_well()


@pytest.mark.parametrize(
    ("payload", "errors"),
    [
        (event(100 * MB), {}),
        (event(100 * MB, b"mine"), {"UnreadableData": 1}),
        (dear(100 * MB, b"mine"), {"UnreadableData": 1}),
    ],
    ids=["nobody's", "mine", "dear"],
)
async def test_without_that_limit_an_event_costs_a_few_times_its_size_and_only_for_a_while(
    listener: Listener, payload: bytes, errors: dict[str, int]
) -> None:
    """none of them is decoded; a forged end of a running job changes nothing"""
    await listener.redis.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    before = await listener.asked()
    for _ in range(3):
        await listener.publish(payload)
        after = await listener.asked()
        assert after.errors == errors
        assert 100 * MB < after.peak - before.resident < 350 * MB  # as it is read, and as a message
        assert (await listener.asked()).resident - before.resident < 120 * MB  # the reader may keep its grown buffer
        assert after.tracked == 1
    await listener.ends_well()


@pytest.mark.parametrize(
    ("payload", "errors", "most"),
    [
        (dear(27 * MB, b"x"), {}, 110 * MB),
        (dear(27 * MB, b"mine"), {"UnreadableData": 1}, 110 * MB),
        (dear(15 * MB, b"mine").replace(b"succeeded", b"mark2"), {}, 550 * MB),
    ],
    ids=["nobody's", "mine", "below the limit"],
)
async def test_an_event_that_would_take_thirty_times_its_size(
    listener: Listener, payload: bytes, errors: dict[str, int], most: int
) -> None:
    before = await listener.asked()
    await listener.publish(payload)
    after = await listener.asked()
    assert after.errors == errors
    assert after.peak - before.resident < most
    assert after.tracked == 1
    await listener.ends_well()


@pytest.mark.parametrize(
    ("payload", "errors"),
    [
        (b"\xff" * (10 * MB), {"UnreadableData": 1}),
        (b"[" * (10 * MB), {"UnreadableData": 1}),
        (b'{"id":"x","event":"progress","data":' + b"[" * (5 * MB) + b"]" * (5 * MB) + b"}", {}),
        (b'{"id":"mine","event":"progress","data":' + b"[" * (5 * MB) + b"]" * (5 * MB) + b"}", {"UnreadableData": 1}),
        (b'{"id":"' + b"9" * (10 * MB) + b'","event":"succeeded"}', {}),
        (b'{"id":"1","event":"' + b"e" * (10 * MB) + b'"}', {}),
        (b"9" * (10 * MB), {"UnreadableData": 1}),
    ],
    ids=["no text", "deep", "deep within", "deep within mine", "long id", "long name", "long number"],
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
    # memory that the allocator keeps of one serves the next
    assert (await listener.asked()).resident - before.resident < 45 * MB
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
async def test_a_flood_leaves_nothing(listener: Listener, flood: str) -> None:
    """200,000 messages; a million about jobs that nobody here knows"""
    script, error = FLOODS[flood]
    many = 1_000_000 if flood == "unknown ids" else 200_000
    await listener.publish_many(50_000, script)
    before = await listener.asked()
    looks = await calls_of(listener.redis, "evalsha")
    await listener.publish_many(many - 50_000, script)
    after = await listener.asked()
    assert set(after.errors) <= {error}
    # at most 20 in 10 s, then their number; it takes a minute at most
    assert sum(after.errors.values()) <= 7 * 21
    assert after.tracked == 1
    assert after.resident - before.resident < 3 * MB
    # one look at the delayed jobs at a time, however many messages ask for it
    assert await calls_of(listener.redis, "evalsha") - looks < 5_000
    await listener.ends_well()


# --- intended large results -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_large_result_arrives(make_queue: MakeQueue, ordered: bool) -> None:
    """15 MB with the default settings; and one exactly as large as the limit"""
    worker = make_queue(get_events=False)
    worker.process(lambda job: "a" * job.data)
    queue = await make_queue(is_worker=False, ordered_events=ordered).ready()
    assert len(await (await queue.create_job(15 * MB).save()).result(30_000)) == 15 * MB
    message = len(encode_event("2", "succeeded", "a" * MB))
    exact = await make_queue(is_worker=False, ordered_events=ordered, max_event_bytes=message).ready()
    assert len(await (await exact.create_job(MB).save()).result(30_000)) == MB


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_job_whose_result_is_too_large_is_looked_up(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, ordered: bool, remove: bool
) -> None:
    """at once, whether somebody waits for it or listens; a failure is recognised"""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 60)
    queue = await make_queue(is_worker=False, ordered_events=ordered, max_event_bytes=100_000).ready()
    waited, heard, failed = [await queue.create_job(kind).save() for kind in ("waited", "heard", "failed")]
    ends, failures, told = Seen(), Seen(), Seen()
    heard.on("unknown", ends)
    failed.on("failed", failures)
    queue.on("job succeeded", told)
    result = asyncio.create_task(waited.result())

    def handler(job: Job) -> str:
        if job.data == "failed":
            raise ValueError("a" * 200_000)
        return "a" * 200_000

    worker = make_queue(get_events=False, remove_on_success=remove)
    worker.process(handler)
    with pytest.raises(OutcomeUnknown, match="gone" if remove else "it succeeded"):
        await asyncio.wait_for(result, 10)
    await ends.reaches(1)
    await failures.reaches(1)
    assert str(failures.calls[0][0]).endswith("a" * 100)
    assert queue.jobs == {}
    assert told.calls == []
    said = "a message of 200,0"
    assert [str(error)[: len(said)] for error in make_queue.claim(UnreadableData)] == [said] * 3


async def test_messages_that_cannot_be_read_are_counted(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """each of the first 20 is reported; of the others, only their number"""
    monkeypatch.setattr(guard, "PERIOD_S", 0.3)
    queue = await make_queue(is_worker=False).ready()
    for number in range(100):
        await redis.publish(queue.to_key("events"), f"[{number}")
    await until(lambda: len(make_queue.errors) == 21)
    await until(lambda: queue._tracker._guard.complaints._period is None)
    await redis.publish(queue.to_key("events"), "[again")
    await until(lambda: len(make_queue.errors) == 22)
    *each, count, again = [str(error) for error in make_queue.claim(UnreadableData)]
    assert all(f"b'[{number}'" in text for number, text in enumerate(each))
    assert count.startswith("80 more messages on the events channel within 0.3 s could not be read")
    assert "b'[again'" in again
