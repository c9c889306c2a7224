"""The port and the real bee-queue 2.0.0 on one queue, in both directions, and the bytes that each writes."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import Job, JobFailed, LateFinish, OperationTimedOut, Queue, fsck
from beequeue.job import now_ms
from harness.children import end_with_parent
from harness.install import NotInstalled
from tests.conftest import MakeQueue, Seen, skip, until
from tests.node_peer import NodePeer, Peer, Setter

NODE, PYTHON, TWO_SOCKETS = "node", "python", "python on two sockets"
FAR = 4_102_444_800_000
"""epoch ms of a time that does not come"""

directions = pytest.mark.parametrize(
    ("producing", "working"),
    [(NODE, PYTHON), (PYTHON, NODE), (TWO_SOCKETS, NODE)],
    ids=["node to python", "python to node", "python on two sockets to node"],
)
both_ways = pytest.mark.parametrize(
    ("one", "other"), [(NODE, PYTHON), (PYTHON, NODE)], ids=["node then python", "python then node"]
)

QUEUE_EVENTS = (
    *("succeeded", "retrying", "failed", "failed:fatal", "stalled", "raised jobs"),
    *("job succeeded", "job retrying", "job failed", "job progress"),
)
JOB_EVENTS = ("succeeded", "retrying", "failed", "progress")


# --- the two sides -----------------------------------------------------------------------------------------------------


def snake_case(name: str) -> str:
    return re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), name)


def plain(value: Any) -> Any:
    """A value as peer.js prints it."""
    if isinstance(value, Exception):
        return {"message": str(value)}
    if isinstance(value, Job):
        return {name: plain(getattr(value, name)) for name in ("id", "data", "options", "status", "progress")}
    return json.loads(json.dumps(value))  # as it is now


def triple(job: Job) -> int:
    """A custom strategy, under the same name in peer.js."""
    delay: int = job.options["backoff"]["delay"]
    job.options["backoff"]["delay"] = delay * 3
    return delay


class PythonPeer(Peer):
    """The port, with the method names of peer.js."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue = queue
        self._released = asyncio.Event()
        queue.backoff_strategies["triple"] = triple
        for event in QUEUE_EVENTS:
            queue.on(event, functools.partial(self._tell, event))

    def _tell(self, event: str, *args: Any) -> None:
        self._hear(event, [plain(arg) for arg in args])

    async def handle(self, job: Job) -> Any:
        """A handler; the job's data says how it ends, as in peer.js."""
        self._tell("started", job, now_ms())
        order = job.data if isinstance(job.data, dict) else {}
        failures = len(job.options["stacktraces"])
        match order.get("do"):
            case "return":
                pass
            case "fail":
                raise RuntimeError(order["message"])
            case "fail first":
                if failures < order["times"]:
                    raise RuntimeError(f"{order['message']} {failures}")
            case "report":
                for step in order["steps"]:
                    await job.report_progress(step)
            case "hang":
                await self._released.wait()
            case _:
                return job.data
        return order.get("value")

    def make_job(self, data: Any, setters: list[Setter]) -> Job:
        job = self.queue.create_job(data)
        for setter, *args in setters:
            getattr(job, snake_case(setter))(*args)
        for event in JOB_EVENTS:
            job.on(event, lambda value, event=event: self._tell(f"own {event}", job.id, value))
        return job

    async def call(self, name: str, *args: Any) -> Any:
        queue = self.queue
        match name, args:
            case "save", (data, setters):
                return plain(await self.make_job(data, setters).save())
            case "saveAll", (orders,):
                jobs = [self.make_job(data, setters) for data, setters in orders]
                assert await queue.save_all(jobs) == {}
                return [job.id for job in jobs]
            case "process", (concurrency,):
                queue.process(self.handle, concurrency)
            case "release", ():
                self._released.set()
            case "checkHealth", ():
                health = await queue.check_health()
                return {("newestJob" if field == "newest_job" else field): count for field, count in health._asdict().items()}
            case "getJobs", (kind, page):
                return [plain(job) for job in await queue.get_jobs(kind, **page)]
            case "getJob", (job_id,):
                return plain(await queue.get_job(job_id))
            case "removeJob", (job_id,):
                assert await queue.remove_job(job_id) is queue
            case "retry", (job_id,):
                job = await queue.get_job(job_id)
                assert job is not None
                await job.retry()
            case "checkStalledJobs", _:
                return await queue.check_stalled_jobs(*args)
            case "destroy", ():
                return await queue.destroy()
            case _:
                raise AssertionError(f"no call {name} with {len(args)} arguments")
        return None

    async def close(self) -> None:
        self._released.set()
        await self.queue.close()


class MakePeer:
    """Makes the two sides of a test, ready, on queues of one name."""

    def __init__(self, make_queue: MakeQueue) -> None:
        self._make_queue = make_queue
        self.peers: list[Peer] = []

    async def __call__(self, kind: str, *, name: str | None = None, **settings: Any) -> Peer:
        """Makes one side; `settings` have bee-queue's names."""
        if kind == NODE:
            return await self.node(name, settings)
        return await self.python(kind, name, settings)

    async def node(self, name: str | None, settings: dict[str, Any]) -> NodePeer:
        try:
            peer = await NodePeer.start()
        except NotInstalled as reason:
            skip(str(reason))
            raise
        self.peers.append(peer)
        never_opened = self._make_queue(name, auto_connect=False)  # so that the keys of this name are deleted
        await peer.call("queue", never_opened.name, self._make_queue.url, settings)
        return peer

    async def python(self, kind: str, name: str | None, settings: dict[str, Any]) -> PythonPeer:
        ours = {snake_case(setting): value for setting, value in settings.items()}
        queue = self._make_queue(name, ordered_events=kind == PYTHON, **ours)
        peer = PythonPeer(queue)
        self.peers.append(peer)
        await queue.ready()
        return peer


@pytest.fixture
async def make_peer(make_queue: MakeQueue) -> AsyncIterator[MakePeer]:
    make = MakePeer(make_queue)
    yield make
    endings = await asyncio.gather(*(peer.close() for peer in make.peers), return_exceptions=True)
    assert [ending for ending in endings if ending is not None] == []
    assert [peer.heard["error"] for peer in make.peers if "error" in peer.heard] == []


@pytest.fixture
def pair(make_peer: MakePeer) -> Callable[..., Any]:
    """Makes a producer, with further settings, and a worker."""

    async def make(producing: str, working: str, **settings: Any) -> tuple[Peer, Peer]:
        producer = await make_peer(producing, isWorker=False, **settings)
        return producer, await make_peer(working, getEvents=False)

    return make


async def stored(redis: Any, queue_name: str, job_id: str) -> Any:
    """Reads a job's entry."""
    entry = await redis.hget(f"bq:{queue_name}:jobs", job_id)
    return None if entry is None else json.loads(entry)


# --- outcomes ----------------------------------------------------------------------------------------------------------


RESULTS: list[Any] = ["baz", {"ü": [1, {}]}, [], {}, 0, 7, -2.5, "", False, True, None]


@directions
async def test_success(pair: Any, name: str, redis: Any, producing: str, working: str) -> None:
    """S-01, P-01, P-02, EV-01, EV-20, EV-21, EV-27: Every kind of result; nothing and null arrive as nothing."""
    producer, worker = await pair(producing, working)
    jobs = [await producer.save({"do": "return", "value": value}, ("setId", f"ä {value}")) for value in RESULTS]
    jobs.append(await producer.save({"do": "return"}))
    ids = [job["id"] for job in jobs]
    assert ids[-1] == "1"
    expected = [[job_id, value] for job_id, value in zip(ids, [*RESULTS, None], strict=True)]
    await worker.call("process", 1)
    assert await producer.event("job succeeded", len(ids)) == expected
    assert await producer.event("own succeeded", len(ids)) == expected
    local = await worker.event("succeeded", len(ids))
    assert [[job["id"], result] for job, result in local] == expected
    for job in jobs:
        assert await stored(redis, name, job.pop("id")) == {**job, "status": "succeeded"}
    assert await redis.smembers(f"bq:{name}:succeeded") == set(ids)


@directions
async def test_failure(pair: Any, name: str, redis: Any, producing: str, working: str) -> None:
    """P-03, P-05, EV-02, EV-22: The message arrives, and the stack is stored."""
    producer, worker = await pair(producing, working)
    await producer.save({"do": "fail", "message": "Grüße 🎉: fail!"})
    await worker.call("process", 1)
    error = {"message": "Grüße 🎉: fail!"}
    assert await producer.event("own failed") == [["1", error]]
    assert producer.heard["job failed"] == [["1", error]]
    ((job, local),) = await worker.event("failed:fatal")
    assert (job["status"], local) == ("failed", error)
    entry = await stored(redis, name, "1")
    assert entry["status"] == "failed"
    (trace,) = entry["options"]["stacktraces"]
    assert "Error: Grüße 🎉: fail!" in trace
    assert await redis.smembers(f"bq:{name}:failed") == {"1"}


@pytest.mark.parametrize(
    ("thrown", "message", "trace"), [("text", "", "text"), (True, "", True), ({"message": "object"}, "object", "object")]
)
async def test_what_node_throws_need_not_be_an_error(pair: Any, thrown: Any, message: str, trace: Any) -> None:
    """P-05, the wire: a failed message without data, and a stack trace that is no string."""
    producer, worker = await pair(PYTHON, NODE, storeJobs=False)
    await producer.save({"do": "throw", "value": thrown})
    await worker.call("process", 1)
    assert await producer.event("job failed") == [["1", {"message": message}]]
    job = await producer.call("getJob", "1")
    assert (job["status"], job["options"]["stacktraces"]) == ("failed", [trace])


@directions
@pytest.mark.parametrize(
    ("strategy", "delays"),
    [("immediate", [0, 0, 0]), ("fixed", [30, 30, 30]), ("exponential", [20, 40, 80]), ("triple", [10, 30, 90])],
)
async def test_retries(pair: Any, producing: str, working: str, strategy: str, delays: list[int]) -> None:
    """B-01, B-03, B-04, B-05, B-06, B-08, B-09, B-11, B-12, EV-03, EV-24: The producer raises the delayed retries. Each
    attempt finds the status, the options and the stack traces that the last one left.
    """
    producer, worker = await pair(producing, working, activateDelayedJobs=True)
    order = {"do": "fail first", "times": 2, "message": "not yet", "value": "at last"}
    await producer.save(order, ("retries", 3), ("backoff", strategy, *delays[:1]))
    await worker.call("process", 1)
    assert await producer.event("own succeeded") == [["1", "at last"]]
    attempts = await worker.event("started", 3)
    assert [job["status"] for job, _ in attempts] == ["created", "retrying", "retrying"]
    assert [job["options"]["retries"] for job, _ in attempts] == [3, 2, 1]
    assert [len(job["options"]["stacktraces"]) for job, _ in attempts] == [0, 1, 2]
    if strategy != "fixed":
        assert [job["options"]["backoff"] for job, _ in attempts] == [{"strategy": strategy, "delay": d} for d in delays]
    starts = [start for _, start in attempts]
    assert starts[1] - starts[0] >= delays[0]
    assert starts[2] - starts[1] >= delays[1]
    assert [re.findall(r"Error: not yet (\d)", trace) for trace in attempts[2][0]["options"]["stacktraces"]] == [["1"], ["0"]]
    again = [["1", {"message": "not yet 0"}], ["1", {"message": "not yet 1"}]]
    assert producer.heard["own retrying"] == again
    assert producer.heard["job retrying"] == again
    assert "own failed" not in producer.heard
    assert [job["status"] for job, _ in await worker.event("failed", 2)] == ["retrying", "retrying"]
    assert "failed:fatal" not in worker.heard
    assert len(producer.heard.get("raised jobs", [])) == (0 if strategy == "immediate" else 2)


@directions
async def test_retries_end(pair: Any, name: str, redis: Any, producing: str, working: str) -> None:
    """B-13, EV-32: The last failure is final; every stack is kept, the newest first."""
    producer, worker = await pair(producing, working)
    await producer.save({"do": "fail", "message": "never"}, ("retries", 1))
    await worker.call("process", 1)
    assert await producer.event("own failed") == [["1", {"message": "never"}]]
    assert producer.heard["own retrying"] == [["1", {"message": "never"}]]
    entry = await stored(redis, name, "1")
    assert (entry["status"], entry["options"]["retries"]) == ("failed", 0)
    assert len(entry["options"]["stacktraces"]) == 2


@directions
async def test_time_out(pair: Any, name: str, redis: Any, producing: str, working: str) -> None:
    """T-01, T-02, T-03: Each attempt has the whole time."""
    producer, worker = await pair(producing, working)
    await producer.save({"do": "hang"}, ("timeout", 10), ("retries", 1))
    await worker.call("process", 1)
    error = {"message": "Job 1 timed out (10 ms)"}
    assert await producer.event("own failed") == [["1", error]]
    assert producer.heard["own retrying"] == [["1", error]]
    entry = await stored(redis, name, "1")
    assert entry["options"]["timeout"] == 10
    assert all(error["message"] in trace for trace in entry["options"]["stacktraces"])


@directions
async def test_progress(pair: Any, name: str, redis: Any, producing: str, working: str) -> None:
    """PR-02, PR-04, EV-23: Any value, in order, before the end; the last one is stored."""
    producer, worker = await pair(producing, working)
    steps = [20, 0, "", False, [], {"done": {"ü": 0.5}, "of": [None, "🎉"]}]
    await producer.save({"do": "report", "steps": steps, "value": "end"})
    await worker.call("process", 1)
    assert await producer.event("own succeeded") == [["1", "end"]]
    assert producer.heard["own progress"] == [["1", step] for step in steps]
    assert producer.heard["job progress"] == [["1", step] for step in steps]
    assert (await stored(redis, name, "1"))["progress"] == steps[-1]


@pytest.mark.parametrize("kind", [PYTHON, TWO_SOCKETS])
async def test_result_from_a_node_worker(make_peer: MakePeer, make_queue: MakeQueue, kind: str) -> None:
    """EV-20, EV-22: `result()` returns the worker's value, or raises its error."""
    worker = await make_peer(NODE)
    queue = await make_queue(is_worker=False, ordered_events=kind == PYTHON).ready()
    good = await queue.create_job({"do": "return", "value": {"ü": [None]}}).save()
    bad = await queue.create_job({"do": "fail", "message": "fail!"}).save()
    await worker.call("process", 1)
    assert await good.result(timeout=10_000) == {"ü": [None]}
    with pytest.raises(JobFailed, match=r"^fail!$"):
        await bad.result(timeout=10_000)
    assert queue.jobs == {}


async def test_no_result_of_a_running_node_worker_is_lost(make_peer: MakePeer, make_queue: MakeQueue) -> None:
    """With one socket no event overtakes its save."""
    worker = await make_peer(NODE)
    await worker.call("process", 5)
    queue = await make_queue(is_worker=False).ready()

    async def one(number: int) -> Any:
        job = await queue.create_job({"do": "return", "value": number}).save()
        return await job.result(timeout=20_000)

    assert await asyncio.gather(*(one(number) for number in range(500))) == list(range(500))
    assert queue.jobs == {}


# --- data --------------------------------------------------------------------------------------------------------------

DATA = {
    "text": "grüße 🎉 \u2028\u2029 \x00\x07\b\f\n\t\x7f \"'\\/ <!--",
    "numbers": [0, -0.0, 2**53 - 1, 1 - 2**53, 0.1, -2.5, 1e16, 1e20, -1e20, 1e21, 1e-7, 5e-324, sys.float_info.max],
    "nested": {"": {"a": [{}, [], None, True, False, "", {"b": [[[]]]}]}, "__proto__x": 1, "10": 2, "é": 3},
    "deep": json.loads("[" * 300 + "]" * 300),
    "a megabyte": "ü" * 2**19,
    "not an object": "just text",
    "a list": [1, [2]],
    "a number": 7,
    "true": True,
    "nothing": None,
}


@directions
async def test_data(pair: Any, producing: str, working: str) -> None:
    """The wire: the handler gets the data that was saved, and returns it."""
    producer, worker = await pair(producing, working)
    expected = [{} if data is None else data for data in DATA.values()]
    for kind, data in DATA.items():
        await producer.save(data, ("setId", kind))
    await worker.call("process", 1)
    returned = await producer.event("own succeeded", len(DATA))
    assert dict(returned) == dict(zip(DATA, expected, strict=True))
    started = await worker.event("started", len(DATA))
    assert [job["data"] for job, _ in started] == expected


async def test_not_a_number_arrives_as_null(pair: Any) -> None:
    """The wire: as JSON.stringify writes it."""
    producer, worker = await pair(PYTHON, NODE)
    await producer.save([math.nan, math.inf, -math.inf])
    await worker.call("process", 1)
    assert await producer.event("own succeeded") == [["1", [None, None, None]]]


HALVES: dict[str, Any] = {
    "alone": "\ud83d",
    "among others": ["ü 🎉 \udc00 \u2028", {"\ud83d": None}],
    "with a float": [0.5, "\ud83d"],
    "with a number beyond 64 bits": [1e20, "\ud83d"],
}


async def test_half_a_character(pair: Any) -> None:
    """The wire: Node writes lone surrogates; the port reads them, runs such a job and returns it."""
    producer, worker = await pair(NODE, PYTHON)
    for kind, data in HALVES.items():
        await producer.save(data, ("setId", kind))
    await worker.call("process", 1)
    assert dict(await producer.event("own succeeded", len(HALVES))) == HALVES


# --- ids, removal, what is told of a queue -------------------------------------------------------------------------------


@both_ways
async def test_ids(make_peer: MakePeer, name: str, redis: Any, one: str, other: str) -> None:
    """S-01, S-05, S-06, S-07, HC-06: One counter; the second save of an id gets none and changes nothing."""
    first, second = await make_peer(one, isWorker=False), await make_peer(other, isWorker=False)
    assert (await first.save({"n": 1}, ("setId", "mine")))["id"] == "mine"
    assert (await first.save({"n": 2}, ("setId", "later"), ("delayUntil", FAR)))["id"] == "later"
    entries = await redis.hgetall(f"bq:{name}:jobs")
    assert (await second.save({"n": 3}, ("setId", "mine")))["id"] is None
    assert (await second.save({"n": 4}, ("setId", "later"), ("delayUntil", FAR + 1)))["id"] is None
    assert (await second.save({"n": 5}, ("setId", "mine"), ("delayUntil", FAR)))["id"] is None
    assert await redis.hgetall(f"bq:{name}:jobs") == entries
    assert await redis.lrange(f"bq:{name}:waiting", 0, -1) == ["mine"]
    assert await redis.zrange(f"bq:{name}:delayed", 0, -1, withscores=True) == [("later", FAR)]
    assert (await second.call("checkHealth"))["newestJob"] == 0
    assert [(await peer.save({}))["id"] for peer in (first, second, first)] == ["1", "2", "3"]


async def test_an_automatic_id_passes_over_one_that_node_took(make_peer: MakePeer) -> None:
    """QK-51"""
    node, python = await make_peer(NODE, isWorker=False), await make_peer(PYTHON, isWorker=False)
    await node.save({}, ("setId", "1"))
    assert (await python.save({}))["id"] == "2"
    assert (await node.save({}))["id"] == "3"


@both_ways
async def test_save_all(make_peer: MakePeer, one: str, other: str) -> None:
    """S-12, S-18: One side saves many jobs at once, and the other finds them."""
    first, second = await make_peer(one, isWorker=False), await make_peer(other, isWorker=False)
    setters: list[list[Setter]] = [[], [("setId", "mine")], [("delayUntil", FAR)], [("setId", "mine")], []]
    ids = await first.call("saveAll", [[{"n": number}, of_job] for number, of_job in enumerate(setters)])
    assert ids == ["1", "mine", "2", None, "3"]
    assert [job["data"]["n"] for job in await second.call("getJobs", "waiting", {})] == [4, 1, 0]
    assert [job["data"]["n"] for job in await second.call("getJobs", "delayed", {})] == [2]


@both_ways
async def test_removal(make_peer: MakePeer, make_queue: MakeQueue, name: str, redis: Any, one: str, other: str) -> None:
    """RM-05, RM-09: A job that the other side saved, in whichever key it is; its id may be used again."""
    saver, remover = await make_peer(one), await make_peer(other, isWorker=False)
    await saver.save({"do": "return"}, ("setId", "succeeded"))
    await saver.save({"do": "fail", "message": "fail!"}, ("setId", "failed"))
    await saver.call("process", 1)
    await saver.event("own failed")
    await saver.save({"do": "hang"}, ("setId", "active"))
    await saver.event("started", 3)
    await saver.save({}, ("setId", "waiting"))
    await saver.save({}, ("setId", "delayed"), ("delayUntil", FAR))
    assert set((await remover.call("checkHealth")).values()) == {0, 1}
    for job_id in ("succeeded", "failed", "active", "waiting", "delayed", "unknown"):
        await remover.call("removeJob", job_id)
        assert await remover.call("getJob", job_id) is None
    assert set((await saver.call("checkHealth")).values()) == {0}
    assert await redis.hlen(f"bq:{name}:jobs") == 0
    assert (await remover.save({}, ("setId", "waiting")))["id"] == "waiting"
    await saver.call("release")
    await saver.event("succeeded", 2)
    if one == PYTHON:
        assert [str(error).split()[1] for error in make_queue.claim(LateFinish)] == ["active"]


@both_ways
async def test_both_tell_the_same_of_a_queue(make_peer: MakePeer, one: str, other: str) -> None:
    """HC-01, HC-02, HC-03, HC-04, HC-08, G-02, G-03, G-08, G-09, G-10, G-11, G-12, G-21, G-26: Each field of each job."""
    saver, worker = await make_peer(one, isWorker=False, storeJobs=False), await make_peer(other, storeJobs=False)
    for number in range(3):
        await saver.save({"do": "report", "steps": [{"ü": number}]}, ("timeout", 5000))
    await saver.save({"do": "fail", "message": "fail!"}, ("setId", "ä"), ("retries", 1), ("backoff", "immediate"))
    await worker.call("process", 1)
    await saver.event("job failed")
    await saver.save({"do": "hang"}, ("backoff", "exponential", 10), ("retries", 2))
    await worker.event("started", 6)
    for number in range(3):
        await saver.save({"n": number})
        await saver.save({"n": number}, ("delayUntil", FAR - number))
    health = {"waiting": 3, "active": 1, "succeeded": 3, "failed": 1, "delayed": 3, "newestJob": 10}
    assert await saver.call("checkHealth") == await worker.call("checkHealth") == health
    pages: list[tuple[str, dict[str, int]]] = [(kind, {}) for kind in health if kind != "newestJob"]
    pages += [("waiting", {"start": 1, "end": 1}), ("waiting", {"start": -2, "end": -1}), ("delayed", {"start": 1, "end": 9})]
    for kind, page in pages:
        ones, others = [await peer.call("getJobs", kind, page) for peer in (saver, worker)]
        assert len(ones) == (health[kind] if page == {} else 2 if kind == "delayed" or page["start"] < 0 else 1)
        if kind in ("succeeded", "failed"):
            ones, others = [sorted(jobs, key=lambda job: str(job["id"])) for jobs in (ones, others)]
        assert ones == others
        for job in ones:
            assert await saver.call("getJob", job["id"]) == await worker.call("getJob", job["id"]) == job
    assert await saver.call("getJob", "unknown") is await worker.call("getJob", "unknown") is None


@both_ways
async def test_destroy(make_peer: MakePeer, name: str, redis: Any, one: str, other: str) -> None:
    """DE-01, DE-04, DE-05: Of keys that the other side made."""
    saver, destroyer = await make_peer(one, isWorker=False), await make_peer(other, isWorker=False)
    await saver.save({})
    await saver.save({}, ("delayUntil", FAR))
    assert await destroyer.call("destroy") == 4
    assert await destroyer.call("destroy") == 0
    assert await redis.keys(f"bq:{name}:*") == []
    assert (await saver.save({}))["id"] == "1"


@both_ways
@pytest.mark.parametrize("working", [NODE, PYTHON])
async def test_jobs_are_run_in_the_order_of_their_saves(make_peer: MakePeer, one: str, other: str, working: str) -> None:
    """P-10, P-14: Both sides save in turn."""
    savers = [await make_peer(kind, isWorker=False) for kind in (one, other)]
    ids = [(await savers[number % 2].save({}))["id"] for number in range(10)]
    worker = await make_peer(working)
    await worker.call("process", 1)
    assert [job["id"] for job, _ in await worker.event("succeeded", 10)] == ids


@both_ways
async def test_a_failed_job_is_retried_by_the_other_side(make_peer: MakePeer, one: str, other: str) -> None:
    """JR-03"""
    worker, other_side = await make_peer(one), await make_peer(other, isWorker=False)
    await worker.save({"do": "fail first", "times": 1, "message": "fail!", "value": "at last"})
    await worker.call("process", 1)
    await worker.event("failed:fatal")
    await other_side.call("retry", "1")
    assert await other_side.event("job succeeded") == [["1", "at last"]]
    assert (await other_side.call("checkHealth"))["failed"] == 0


async def test_node_runs_what_a_closing_python_worker_hands_back(make_peer: MakePeer, make_queue: MakeQueue) -> None:
    """CL-11: Nothing is left behind, and the job is the next to run."""
    producer = await make_peer(NODE, isWorker=False)
    await producer.save({"n": 1})
    await producer.save({"n": 2})
    started = Seen()

    async def hang(job: Job) -> None:
        started(job.id)
        await asyncio.Event().wait()

    closing = make_queue().process(hang)
    await started.reaches(1)
    with pytest.raises(OperationTimedOut):
        await closing.close(timeout=10)
    make_queue.queues.remove(closing)
    worker = await make_peer(NODE)
    await worker.call("process", 1)
    assert await producer.event("own succeeded", 2) == [["1", {"n": 1}], ["2", {"n": 2}]]


# --- delayed, stalled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saving", "raising"), [(NODE, PYTHON), (PYTHON, NODE), (TWO_SOCKETS, NODE)])
async def test_the_other_side_raises_delayed_jobs(make_peer: MakePeer, saving: str, raising: str) -> None:
    """DL-01, DL-02, DL-05, DL-11: earlierDelayed wakes it, twice; the job that is not due stays."""
    raiser = await make_peer(raising, isWorker=False, activateDelayedJobs=True)
    saver = await make_peer(saving)
    await saver.call("process", 1)
    await saver.save({"n": 0}, ("delayUntil", FAR))
    due = now_ms() + 300
    later = await saver.save({"n": 1}, ("delayUntil", due))
    earlier = await saver.save({"n": 2}, ("delayUntil", due - 150))
    started = await saver.event("started", 2)
    assert [(job["id"], job["options"]["delay"]) for job, _ in started] == [(earlier["id"], due - 150), (later["id"], due)]
    assert started[0][1] >= due - 150
    assert started[1][1] >= due
    await saver.event("own succeeded", 2)
    assert await raiser.event("raised jobs", 2) == [[1], [1]]
    assert "raised jobs" not in saver.heard
    assert (await saver.call("checkHealth"))["delayed"] == 1


async def test_python_recovers_the_job_of_a_killed_node_worker(make_peer: MakePeer) -> None:
    """ST-05, ST-13, ST-17, EV-07"""
    victim = await make_peer(NODE, stallInterval=100)
    survivor = await make_peer(PYTHON, stallInterval=100, stalledCheckInterval=0)
    await survivor.save({"do": "hang", "value": "recovered"}, ("retries", 1))
    await victim.call("process", 1)
    await victim.event("started")
    assert isinstance(victim, NodePeer)
    await victim.kill()
    await survivor.call("release")
    await survivor.call("process", 1)
    await survivor.call("checkStalledJobs", 60)
    assert await survivor.event("own succeeded") == [["1", "recovered"]]
    assert survivor.heard["stalled"] == [["1"]]
    ((job, _),) = survivor.heard["started"]
    assert job["options"]["retries"] == 1


WORKER = """
import asyncio, sys
from beequeue import Queue

async def hang(job):
    print(job.id, flush=True)
    await asyncio.Event().wait()

asyncio.run(Queue(sys.argv[1], sys.argv[2], stall_interval=100).run(hang))
"""


async def test_node_recovers_the_job_of_a_killed_python_worker(make_peer: MakePeer, name: str, url: str) -> None:
    """ST-05, ST-13, ST-17, EV-07"""
    survivor = await make_peer(NODE, stallInterval=100)
    await survivor.save({"do": "hang", "value": "recovered"})
    command = (sys.executable, "-c", WORKER, name, url)
    victim = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, preexec_fn=end_with_parent())
    try:
        assert victim.stdout is not None
        async with asyncio.timeout(10):
            assert await victim.stdout.readline() == b"1\n"
    finally:
        victim.kill()
        await victim.wait()
    await survivor.call("release")
    await survivor.call("process", 1)
    await survivor.call("checkStalledJobs", 60)
    assert await survivor.event("own succeeded") == [["1", "recovered"]]
    assert survivor.heard["stalled"] == [["1"]]


@both_ways
async def test_a_living_worker_is_not_taken_for_dead(make_peer: MakePeer, redis: Any, name: str, one: str, other: str) -> None:
    """ST-16: Over several checks by the other side."""
    worker = await make_peer(one, stallInterval=100, stalledCheckInterval=0)
    checker = await make_peer(other, stallInterval=100, isWorker=False)
    await worker.save({"do": "hang", "value": "once"})
    await worker.call("process", 1)
    await worker.event("started")
    for _ in range(4):
        await redis.delete(f"bq:{name}:stallBlock")
        assert await checker.call("checkStalledJobs") == 0
        await until(functools.partial(heartbeat_seen, redis, name))
    await worker.call("release")
    assert await worker.event("own succeeded") == [["1", "once"]]
    assert len(worker.heard["started"]) == 1


async def heartbeat_seen(redis: Any, name: str) -> bool:
    return not await redis.exists(f"bq:{name}:stalling")


# --- a mixed fleet -------------------------------------------------------------------------------------------------------


async def test_a_mixed_fleet(make_peer: MakePeer, name: str, redis: Any) -> None:
    """P-13, EV-28: 10,000 jobs of two producers through two workers of each kind, each exactly once."""
    count, batch = 10_000, 250
    producers = [await make_peer(kind, isWorker=False, storeJobs=False) for kind in (NODE, PYTHON)]
    workers = [await make_peer(kind, getEvents=False) for kind in (NODE, PYTHON, NODE, PYTHON)]
    for worker in workers:
        await worker.call("process", 5)

    async def produce(producer: Peer) -> list[str]:
        ids: list[str] = []
        while len(ids) < count // 2:
            orders = [[{"n": number}, []] for number in range(batch)]
            ids += await producer.call("saveAll", orders)
        return ids

    ids = [job_id for saved in await asyncio.gather(*map(produce, producers)) for job_id in saved]
    assert len(set(ids)) == count
    for producer in producers:
        ended = await producer.event("job succeeded", count)
        assert sorted(job_id for job_id, _ in ended) == sorted(ids)
    for worker in workers:
        await worker.close()
    done = [[job["id"] for job, _ in worker.heard["succeeded"]] for worker in workers]
    assert sorted(job_id for of_worker in done for job_id in of_worker) == sorted(ids)
    assert all(done)
    health = {"waiting": 0, "active": 0, "succeeded": count, "failed": 0, "delayed": 0, "newestJob": count}
    assert await producers[0].call("checkHealth") == health
    assert await redis.exists(*(f"bq:{name}:{key}" for key in ("waiting", "active", "stalling"))) == 0


# --- bytes ---------------------------------------------------------------------------------------------------------------


class Wire:
    """All that a queue writes and publishes; times and stack traces, which differ from run to run, are made equal."""

    def __init__(self, redis: Any, queue_name: str) -> None:
        self._redis = redis
        self._prefix = f"bq:{queue_name}:"

    async def __aenter__(self) -> Wire:
        self._messages = self._redis.pubsub()
        await self._messages.subscribe(*(self._prefix + channel for channel in ("events", "earlierDelayed", "end")))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._messages.aclose()

    async def published(self) -> list[tuple[str, bytes]]:
        """The messages since the last call, by channel, in order."""
        await self._redis.publish(self._prefix + "end", "")
        messages: list[tuple[str, bytes]] = []
        async for message in self._messages.listen():
            if message["type"] != "message":
                continue
            channel = message["channel"].decode().removeprefix(self._prefix)
            if channel == "end":
                break
            messages.append((channel, self._without_chance(message["data"])))
        return messages

    async def entries(self) -> dict[bytes, bytes]:
        """The hash `jobs`."""
        entries = await self._redis.hgetall(self._prefix + "jobs")
        return {job_id: self._without_chance(entry) for job_id, entry in entries.items()}

    async def places(self) -> Any:
        """Which keys hold which ids."""
        lists = [await self._redis.lrange(self._prefix + key, 0, -1) for key in ("waiting", "active")]
        sets = [await self._redis.smembers(self._prefix + key) for key in ("succeeded", "failed", "stalling")]
        return lists, sets, await self._redis.zrange(self._prefix + "delayed", 0, -1, withscores=True)

    @staticmethod
    def _without_chance(text: bytes) -> bytes:
        string = rb'"(?:[^"\\]|\\.)*"'
        traces = rb'(?<="stacktraces":\[)%b(?:,%b)*(?=\])' % (string, string)
        text = re.sub(traces, lambda found: re.sub(string, b'"trace"', found[0]), text)
        return re.sub(rb"\b1[789]\d{11}\b", b"NOW", text)


@pytest.fixture
async def raw_redis(url: str) -> AsyncIterator[Any]:
    async with Redis.from_url(url) as client:
        yield client


Order = tuple[Any, list[Setter]]

SAVES: dict[str, Order] = {
    "empty": ({}, []),
    "nothing": (None, []),
    "text": (DATA["text"], []),
    "integers": ([0, -1, 2**53 - 1, 1 - 2**53], []),
    "short floats": ([0.1, -2.5, 1234.5678, 1e-7], []),
    "nested": ({"b": {"é": [{}, [], None, True, False, ""]}, "a": {"z": 1, "y": 2}}, []),
    "all options": ({}, [("timeout", 5000), ("retries", 3), ("backoff", "exponential", 100)]),
    "options in another order": ({}, [("backoff", "fixed", 7), ("retries", 0), ("timeout", 0)]),
    "set again": ({}, [("retries", 1), ("timeout", 5), ("retries", 2), ("backoff", "triple", 1), ("backoff", "immediate")]),
    "grüße 🎉 \u2028": ("an id of its own", []),
    "delayed": ({}, [("delayUntil", FAR)]),
    "delayed more": ({}, [("retries", 1), ("delayUntil", FAR + 1)]),
    "delayed less": ({}, [("delayUntil", FAR - 1), ("retries", 1)]),
    "not delayed": ({}, [("delayUntil", 1)]),
}


async def test_what_a_save_writes(make_peer: MakePeer, raw_redis: Any, name: str) -> None:
    """S-03, S-04, J-08, J-09, J-13: The wire, byte for byte."""
    seen: dict[str, dict[str, Any]] = {}
    for kind in (NODE, PYTHON, TWO_SOCKETS):
        queue_name = f"{name}-{kind}"
        peer = await make_peer(kind, name=queue_name, isWorker=False)
        async with Wire(raw_redis, queue_name) as wire:
            for job_id, (data, setters) in SAVES.items():
                await peer.save(data, ("setId", job_id), *setters)
            await peer.save({"id": "automatic"})
            await peer.save({"id": "automatic"}, ("delayUntil", FAR - 2))
            seen[kind] = {"entries": await wire.entries(), "published": await wire.published(), "places": await wire.places()}
    assert seen[PYTHON] == seen[NODE]
    assert seen[TWO_SOCKETS] == seen[NODE]
    assert seen[NODE]["entries"][b"all options"] == (
        b'{"data":{},"options":{"timestamp":NOW,"stacktraces":[],"timeout":5000,"retries":3,'
        b'"backoff":{"strategy":"exponential","delay":100}},"status":"created","progress":0}'
    )
    assert seen[NODE]["published"] == [("earlierDelayed", b"%d" % time) for time in (FAR, FAR - 1, FAR - 2)]


async def test_half_a_character_as_it_is_written(make_peer: MakePeer, raw_redis: Any, name: str) -> None:
    """The wire: the lone surrogate as an escape, all other characters as themselves."""
    entries = []
    for kind in (NODE, PYTHON):
        peer = await make_peer(kind, name=f"{name}-{kind}", isWorker=False)
        await peer.save("ü \ud83d \u2028", ("setId", "ü"))
        async with Wire(raw_redis, f"{name}-{kind}") as wire:
            entries.append(await wire.entries())
    assert entries[0] == entries[1]


RUNS: dict[str, Order] = {
    "no result": ({"do": "return"}, []),
    **{f"result {value}": ({"do": "return", "value": value}, []) for value in RESULTS if value is not None},
    "text": ({"do": "return", "value": DATA["text"]}, []),
    "nested": ({"do": "return", "value": SAVES["nested"][0]}, []),
    "progress": ({"do": "report", "steps": [20, {"ü": [0.5]}, ""], "value": "end"}, []),
    "failure": ({"do": "fail", "message": 'Grüße 🎉 \u2028 "fail!"'}, []),
    "time-out": ({"do": "hang"}, [("timeout", 10)]),
    "without backoff": ({"do": "fail first", "times": 2, "message": "no"}, [("retries", 2)]),
    "for good": ({"do": "fail", "message": "no"}, [("retries", 1), ("timeout", 5000)]),
    **{
        strategy: ({"do": "fail first", "times": 2, "message": "no"}, [("backoff", strategy, 5), ("retries", 3)])
        for strategy in ("immediate", "fixed", "exponential", "triple")
    },
    "🎉": ({}, []),
}
FAILING = {"failure", "time-out", "for good"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"removeOnSuccess": True, "removeOnFailure": True}, {"sendEvents": False}],
    ids=["kept", "removed", "no events"],
)
async def test_what_a_worker_writes(make_peer: MakePeer, raw_redis: Any, name: str, settings: dict[str, bool]) -> None:
    """B-11, B-12, RO-01, RO-02, RO-03, RO-04, PS-02, PS-03, PS-04, PR-04: The wire, byte for byte, in the same order."""
    seen: dict[str, dict[str, Any]] = {}
    for kind in (NODE, PYTHON):
        queue_name = f"{name}-{kind}"
        peer = await make_peer(kind, name=queue_name, activateDelayedJobs=True, **settings)
        await peer.call("process", 1)
        seen[kind] = {}
        async with Wire(raw_redis, queue_name) as wire:
            for job_id, (data, setters) in RUNS.items():
                end = "failed:fatal" if job_id in FAILING else "succeeded"
                ended = len(peer.heard.get(end, [])) + 1
                await peer.save(data, ("setId", job_id), *setters)
                await peer.event(end, ended)
                seen[kind][job_id] = await wire.published()
            seen[kind]["entries"] = await wire.entries()
            seen[kind]["places"] = await wire.places()
    assert seen[PYTHON] == seen[NODE]
    events = [] if settings == {"sendEvents": False} else [("events", b'{"id":"no result","event":"succeeded"}')]
    assert seen[NODE]["no result"] == events
    assert len(seen[NODE]["entries"]) == (0 if "removeOnSuccess" in settings else len(RUNS))


# --- a queue that was repaired -----------------------------------------------------------------------------------------


async def test_node_works_on_a_repaired_queue(make_peer: MakePeer, make_queue: MakeQueue, redis: Redis) -> None:
    """Jobs that Node saved are damaged and repaired.

    Ended jobs stay ended, each of the others runs once, and Node finds them all.
    """
    node = await make_peer(NODE)
    ids = ["ended", "ghost", "orphan", "twice", "active too", "silent", "well"]
    queue = make_queue(is_worker=False, get_events=False)
    key = queue.to_key
    await node.save({"do": "return", "value": 1}, ("setId", "ended"))
    worker = make_queue(get_events=False)
    worker.process(lambda job: 1)
    await node.event("own succeeded")
    await worker.close()
    for job_id in ids[1:]:
        await node.save({"do": "return", "value": job_id}, ("setId", job_id), ("retries", 1))
    await redis.delete(key("stallBlock"))
    await redis.srem(key("succeeded"), "ended")
    await redis.hdel(key("jobs"), "ghost")
    await redis.lrem(key("waiting"), 0, "orphan")
    await redis.lpush(key("waiting"), "twice")
    await redis.lpush(key("active"), "active too", "silent")
    await redis.lrem(key("waiting"), 0, "silent")
    await redis.sadd(key("stalling"), "silent")

    report = await fsck.check(queue)
    assert {(finding.kind, finding.id) for finding in report.findings} == {
        ("ghost", "ghost"),
        ("orphan", "ended"),
        ("orphan", "orphan"),
        ("two-states", "twice"),
        ("two-states", "active too"),
        ("too-old", "silent"),
    }
    await fsck.repair(queue, report)
    await redis.sadd(key("stalling"), "active too")  # it stayed in active: a stall check is to bring it back
    again = await fsck.check(queue)
    assert [(finding.kind, finding.id) for finding in again.findings] == [("too-old", "active too")]
    await fsck.repair(queue, again)
    assert (await fsck.check(queue)).findings == []

    await node.call("process", 2)
    started = sorted(job["id"] for job, _ in await node.event("started", 5))
    assert started == sorted(ids[2:])
    succeeded = await node.event("own succeeded", 6)
    assert sorted(map(tuple, succeeded)) == sorted(
        (job_id, job_id if job_id != "ended" else 1) for job_id in ["ended", *ids[2:]]
    )
    health = await node.call("checkHealth")
    assert (health["waiting"], health["active"], health["succeeded"], health["failed"]) == (0, 0, 6, 0)
    assert len(node.heard["started"]) == 5
    assert (await node.call("getJob", "ended"))["status"] == "succeeded"
    await node.call("removeJob", "ended")
    assert (await fsck.check(queue)).findings == []
