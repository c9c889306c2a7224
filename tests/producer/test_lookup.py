"""Jobs seen from outside: get, list, remove, retry, results, counts, destroy, clean, and the flags that govern them."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, get_type_hints

import pytest
import redis as sync_redis

import beequeue.store.store
from beequeue import (
    BeeQueueError,
    ConnectionLost,
    Health,
    Job,
    JobFailed,
    LateFinish,
    OutcomeUnknown,
    Queue,
    QueueClosed,
    QueueSettings,
    UnreadableData,
)
from beequeue.job import now_ms
from beequeue.producer import tracker
from beequeue.store.scripts import SCRIPTS
from beequeue.store.store import KEYS
from harness.server import Server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import Heard, Spoken, assert_says, keys, nested, soon
from tests.relay import Line, Relay

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])

FAR = 4_102_444_800_000
"""epoch ms of a time that does not come"""
NODE_TRACE = "Error: fail!\n    at handler (/app/worker.js:3:9)"
KINDS = ("waiting", "active", "delayed", "succeeded", "failed")

WRONG_IDS = [
    ("", ValueError, "a job id must not be empty"),
    (None, TypeError, "a job id must be a string or an int, not None"),
    (True, TypeError, "a job id must be a string or an int, not True"),
    (1.5, TypeError, "a job id must be a string or an int, not 1.5"),
    (b"1", TypeError, "a job id must be a string or an int, not b'1'"),
    (["1"], TypeError, "a job id must be a string or an int, not ['1']"),
    pytest.param(
        10**5000,
        ValueError,
        "a job id must be text, or an int that Python can print, not an int of 16610 bits",
        id="5001 digits",
    ),
    ("\ud800", ValueError, "a job id must be text that UTF-8 can carry, not '\\ud800'"),
]


async def good_or_bad(job: Job) -> Any:
    if job.data == "bad":
        raise ValueError("bad luck")
    return job.data


# --- get_job -----------------------------------------------------------------------------------------------------------


@both_orderings
async def test_get_job(make_queue: MakeQueue, ordered: bool) -> None:
    """G-01, G-02, G-03, G-06, SJ-01: It returns the object that was saved or fetched here; elsewhere a new one, which
    receives its events.
    """
    producer = make_queue(is_worker=False, ordered_events=ordered)
    other = make_queue(is_worker=False, ordered_events=ordered)
    saved = await producer.create_job({"foo": "bar"}).save()
    assert await producer.get_job("1") is saved
    assert await producer.get_job("2") is None
    fetched = await other.get_job("1")
    assert fetched is not None
    assert fetched is not saved
    assert fetched.to_data() == saved.to_data()
    assert await other.get_job("1") is fetched
    assert (producer.jobs, other.jobs) == ({"1": saved}, {"1": fetched})
    make_queue(get_events=False).process(echo)
    assert await saved.result() == await fetched.result() == {"foo": "bar"}
    assert (producer.jobs, other.jobs) == ({}, {})


async def test_get_job_without_keeping(make_queue: MakeQueue) -> None:
    """G-04, G-07, SJ-02: Without the flags it returns a new, equal object each time, and keeps none."""
    queue = make_queue(is_worker=False, get_events=False, send_events=False, store_jobs=False)
    saved = await queue.create_job({"foo": ["ü"]}).set_id("an id").save()
    fetched, again = await queue.get_job("an id"), await queue.get_job("an id")
    for job in (fetched, again):
        assert job is not None
        assert (job.id, job.data, job.to_data()) == ("an id", {"foo": ["ü"]}, saved.to_data())
    assert fetched is not again
    assert saved not in (fetched, again)
    assert queue.jobs == {}


async def test_a_fetched_job_has_what_is_stored(make_queue: MakeQueue, redis: Any) -> None:
    """G-26, G-27: All five attributes, and its queue. from_id reads again what get_job keeps."""
    queue = make_queue(is_worker=False)
    saved = await queue.create_job("as saved").save()
    stored = {"data": [1], "options": {"timestamp": saved.options["timestamp"], "stacktraces": ["s"], "mine": 2}}
    await redis.hset(queue.to_key("jobs"), "1", json.dumps({**stored, "status": "retrying", "progress": {"p": 1}}))
    afresh = await Job.from_id(queue, "1")
    assert afresh is not None
    assert (afresh.id, afresh.data, afresh.options) == ("1", stored["data"], stored["options"])
    assert (afresh.status, afresh.progress, afresh.queue) == ("retrying", {"p": 1}, queue)
    assert queue.jobs == {"1": saved}
    assert await queue.get_job("1") is saved
    assert await Job.from_id(queue, "2") is None


@both_orderings
async def test_get_job_of_a_kept_job(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """QK-42: It returns the object as it is, unless its entry is gone or is another job's."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    saved = await queue.create_job("mine").save()
    await redis.hdel(queue.to_key("jobs"), "1")
    assert await queue.get_job("1") is None
    assert queue.jobs == {"1": saved}
    await redis.hset(queue.to_key("jobs"), "1", '{"data":"another","options":{"timestamp":5,"stacktraces":[]}}')
    another = await queue.get_job("1")
    assert another is not None
    assert another.data == "another"
    assert queue.jobs == {"1": another}
    with pytest.raises(OutcomeUnknown, match="^job 1: its id has been given to another job$"):
        await saved.result()


@both_orderings
async def test_a_job_without_a_timestamp_stays_the_same_job(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """G-06, J-17: The time at which it was read does not identify it."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    await redis.hset(queue.to_key("jobs"), "old", '{"data":1,"options":{}}')
    await redis.lpush(queue.to_key("waiting"), "old")
    job = await queue.get_job("old")
    await until(lambda: now_ms() > job.options["timestamp"] if job is not None else False)
    assert await queue.get_job("old") is job
    assert await queue.get_jobs("waiting") == [job]


@both_orderings
async def test_get_job_keeps_none_that_has_ended(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """QK-40, SJ-01: Its result() tells at once how it ended: by the set that holds it, not by its status."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    worker = make_queue(get_events=False)
    for data in ("good", "bad", "node"):
        await worker.create_job(data).save()
    await redis.lrem(worker.to_key("waiting"), 0, "3")
    done = Seen()
    worker.on("succeeded", done)
    worker.on("failed", done)
    worker.process(good_or_bad)
    await done.reaches(2)
    node = {"data": {}, "options": {"timestamp": 1, "stacktraces": [NODE_TRACE, "older"]}, "status": "created"}
    await redis.hset(worker.to_key("jobs"), "3", json.dumps(node))
    await redis.sadd(worker.to_key("failed"), "3")
    good, bad, of_node = [await queue.get_job(job_id) for job_id in ("1", "2", "3")]
    assert good is not None
    assert bad is not None
    assert of_node is not None
    with pytest.raises(OutcomeUnknown, match="^job 1 succeeded, and results are not stored$"):
        await good.result()
    with pytest.raises(JobFailed, match="^ValueError: bad luck$"):
        await bad.result()
    with pytest.raises(JobFailed, match="^Error: fail!$"):
        await of_node.result()
    assert queue.jobs == {}
    assert await queue.get_job("1") is not good


async def test_a_reconnect_finds_what_ended_unseen(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """QK-40: A job that was removed elsewhere is kept until the reconnect, and no longer."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=lambda attempt: 10).ready()
        gone, stays = await queue.create_job({}).save(), await queue.create_job({}).save()
        unknown = Seen()
        gone.on("unknown", unknown)
        await make_queue(is_worker=False).remove_job("1")
        assert queue.jobs == {"1": gone, "2": stays}
        for line in relay.lines:
            if line.role == "event":
                line.cut()
        await unknown.reaches(1)
        assert queue.jobs == {"2": stays}
        await queue.close()
    assert len(make_queue.claim(ConnectionLost)) == 1


@both_orderings
async def test_clearing_jobs(make_queue: MakeQueue, ordered: bool) -> None:
    """SJ-03: The next get_job reads the job again, and that object receives its events."""
    queue = make_queue(ordered_events=ordered)
    saved = await queue.create_job({}).save()
    queue.jobs = {}
    fetched = await queue.get_job("1")
    assert fetched is not None
    assert fetched is not saved
    queue.jobs.clear()
    queue.jobs = {"1": saved}
    assert await queue.get_job("1") is saved
    queue.process(echo)
    assert await saved.result() == {}
    with pytest.raises(BeeQueueError, match="^result\\(\\) is for a job that this queue has saved or fetched$"):
        await fetched.result()


@both_orderings
async def test_ids_are_text_at_every_door(make_queue: MakeQueue, ordered: bool) -> None:
    """QK-41: 3 means "3"."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    saved = await queue.create_job({}).set_id("3").save()
    assert await queue.get_job(3) is saved
    read = await Job.from_id(queue, 3)
    assert read is not None
    assert read.id == "3"
    await queue.remove_job(3)
    assert queue.jobs == {}
    assert await queue.get_job(3) is None


@pytest.mark.parametrize(("job_id", "error", "message"), WRONG_IDS)
async def test_wrong_ids(make_queue: MakeQueue, job_id: Any, error: type[Exception], message: str) -> None:
    queue = make_queue(is_worker=False)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: queue.get_job(job_id),
        lambda: Job.from_id(queue, job_id),
        lambda: queue.remove_job(job_id),
    ]
    for call in calls:
        with pytest.raises(error) as refused:
            await call()
        assert type(refused.value) is error
        assert str(refused.value) == message


@pytest.mark.parametrize("entry", ["not json", "[]", '{"data":{},"options":[]}', "[" * 100_000])
@both_orderings
async def test_an_entry_that_cannot_be_read(make_queue: MakeQueue, redis: Any, ordered: bool, entry: str) -> None:
    """get_job raises, names the job in one line, and keeps nothing. A list leaves it out and reports it."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    good = await queue.create_job({}).save()
    await redis.hset(queue.to_key("jobs"), "poison", entry)
    await redis.lpush(queue.to_key("waiting"), "poison")
    for call in (queue.get_job, lambda job_id: Job.from_id(queue, job_id)):
        with pytest.raises(UnreadableData, match="poison") as refused:
            await call("poison")
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 400
    assert queue.jobs == {"1": good}
    assert await queue.get_jobs("waiting") == [good]
    (reported,) = make_queue.claim(UnreadableData)
    assert "poison" in str(reported)


@both_orderings
async def test_get_job_of_a_job_that_its_connection_cannot_carry(
    make_queue: MakeQueue, own_server: Server, redis: Any, ordered: bool
) -> None:
    """Redis cuts a subscriber for which more than 32 MB wait, and other calls' saves would be lost with it."""
    queue = await make_queue(redis=own_server.url, is_worker=False, ordered_events=ordered).ready()
    for size in (29_000_000, 34_000_000):
        await queue.create_job("x" * size).set_id(str(size)).save()
    queue.jobs = {}
    for read in (queue.get_job, partial(Job.from_id, queue)):
        small = await read("29000000")
        assert small is not None
        assert len(small.data) == 29_000_000
        saving = asyncio.ensure_future(queue.create_job({}).save())
        if ordered:
            with pytest.raises(BeeQueueError) as refused:
                await read("34000000")
            stored = f"{len(small.to_data()) + 5_000_000:,}"
            assert str(refused.value) == (
                f"job 34000000 is stored in {stored} bytes, and get_job and Job.from_id read at most "
                "30,000,000; read it with get_jobs, or by a queue with ordered_events=False"
            )
        else:
            large = await read("34000000")
            assert large is not None
            assert len(large.data) == 34_000_000
        await saving
    assert "34000000" not in queue.jobs or not ordered
    assert [len(job.data) for job in await queue.get_jobs("waiting", -2, -1)] == [34_000_000, 29_000_000]
    assert queue.reconnects == 0
    await queue.close()


# --- get_jobs ----------------------------------------------------------------------------------------------------------


async def test_get_jobs_of_each_kind(make_queue: MakeQueue) -> None:
    """G-08, G-09, G-10, G-11, G-12, G-14, G-15, G-17: By start and end, by size, or by neither."""
    queue = make_queue()
    listed: list[list[str | None]] = []

    async def handler(job: Job) -> Any:
        listed.append([active.id for active in await queue.get_jobs("active", start=0, end=100)])
        return await good_or_bad(job)

    good, bad = await queue.create_job("good").save(), await queue.create_job("bad").save()
    delayed = await queue.create_job({}).delay_until(FAR).save()
    assert await queue.get_jobs("waiting", start=0, end=2) == [bad, good]
    assert await queue.get_jobs("waiting", start=1, end=1) == [good]
    assert await queue.get_jobs("delayed", start=0, end=1) == [delayed]
    queue.process(handler)
    with pytest.raises(JobFailed):
        await bad.result()
    assert await good.result() == "good"
    assert listed == [["1"], ["2"]]
    assert [job.id for job in await queue.get_jobs("succeeded", size=1)] == ["1"]
    assert [job.id for job in await queue.get_jobs("failed", size=1)] == ["2"]
    assert [[job.id for job in await queue.get_jobs(kind)] for kind in KINDS] == [[], [], ["3"], ["1"], ["2"]]


@pytest.mark.parametrize("store_jobs", [True, False])
async def test_get_jobs_keeps_order_and_objects(make_queue: MakeQueue, redis: Any, store_jobs: bool) -> None:
    """G-18, G-19, G-21, G-25, QK-67: In the order of the list, whether jobs are kept here or not; it keeps no new ones."""
    queue = make_queue(is_worker=False, store_jobs=store_jobs)
    other = make_queue(is_worker=False, get_events=False)
    saved = [await (queue if number % 2 else other).create_job(number).save() for number in range(1, 7)]
    kept = {str(number): saved[number - 1] for number in (1, 3, 5)} if store_jobs else {}
    assert queue.jobs == kept
    await redis.rename(queue.to_key("waiting"), queue.to_key("active"))
    for start, end, ids in ((0, 100, "654321"), (1, 2, "54"), (-2, -1, "21"), (4, -3, ""), (7, 9, "")):
        jobs = await queue.get_jobs("active", start, end)
        assert "".join(job.id or "" for job in jobs) == ids
        assert [job.data for job in jobs] == [int(job_id) for job_id in ids]
        for job in jobs:
            assert job is kept[job.id or ""] if job.id in kept else job not in saved
    for number in range(1, 7):
        await redis.zadd(queue.to_key("delayed"), {str(number): FAR - number})
    assert "".join(job.id or "" for job in await queue.get_jobs("delayed", end=-2)) == "65432"
    await redis.sadd(queue.to_key("failed"), *range(1, 7))
    jobs = await queue.get_jobs("failed")
    assert sorted(job.data for job in jobs) == [1, 2, 3, 4, 5, 6]
    assert [job for job in jobs if job in saved] == [job for job in jobs if job.id in kept]
    assert queue.jobs == kept


async def test_get_jobs_without_a_page(make_queue: MakeQueue, redis: Any) -> None:
    """G-20, QK-66: It returns 101 of a list, since end is included, and 100 of a set."""
    queue = make_queue(is_worker=False)
    ids = await store(redis, queue, 150)
    await redis.rpush(queue.to_key("waiting"), *ids)
    await redis.rpush(queue.to_key("active"), *ids)
    await redis.zadd(queue.to_key("delayed"), {job_id: float(job_id) for job_id in ids})
    for kind in ("waiting", "active", "delayed"):
        assert [job.id for job in await queue.get_jobs(kind)] == ids[:101]
    await redis.sadd(queue.to_key("succeeded"), *ids)
    await redis.sadd(queue.to_key("failed"), *ids)
    for kind in ("succeeded", "failed"):
        assert len({job.id for job in await queue.get_jobs(kind)} & set(ids)) == 100


async def test_some_of_many_succeeded_jobs(make_queue: MakeQueue, redis: Any) -> None:
    """G-13: 80 different jobs of 10,000."""
    queue = make_queue(is_worker=False, redis_scan_count=50)
    await redis.sadd(queue.to_key("succeeded"), *await store(redis, queue, 10_000))
    jobs = await queue.get_jobs("succeeded", size=80)
    assert len(jobs) == len({job.id for job in jobs}) == 80
    assert {job.data for job in await queue.get_jobs("succeeded", size=20_000)} == set(range(1, 10_001))


async def test_get_jobs_of_thousands(make_queue: MakeQueue, redis: Any) -> None:
    """More than one read asks for, in order."""
    queue = make_queue(is_worker=False)
    ids = await store(redis, queue, 2500)
    await redis.rpush(queue.to_key("waiting"), *ids)
    assert [job.id for job in await queue.get_jobs("waiting", end=-1)] == ids


async def test_how_get_jobs_reads(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """G-22, G-24: SSCAN asks for the lesser of size and redis_scan_count; one HMGET reads all entries."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, redis_scan_count=50).ready()
        ids = await store(redis, queue, 101)
        await redis.rpush(queue.to_key("waiting"), *ids)
        await redis.sadd(queue.to_key("failed"), *(f"member {number}" for number in range(1000)))
        spoken = Spoken(relay)
        await queue.get_jobs("waiting")
        assert spoken.names == [("command", "LRANGE"), ("command", "HMGET")]
        assert spoken.commands[1][1] == [b"HMGET", queue.to_key("jobs").encode(), *(job_id.encode() for job_id in ids)]
        for size, count in ((7, b"7"), (80, b"50")):
            spoken.commands.clear()
            await queue.get_jobs("failed", size=size)
            names = [name for _, name in spoken.names]
            assert names == ["SSCAN"] * (len(names) - 1) + ["HMGET"]
            assert {command[-1] for _, command in spoken.commands[:-1]} == {count}
        await queue.close()


async def test_get_jobs_leaves_out_what_has_gone(make_queue: MakeQueue, redis: Any) -> None:
    """G-23: It does not report them."""
    queue = make_queue(is_worker=False)
    kept, gone = await queue.create_job({}).save(), await queue.create_job({}).save()
    await redis.hdel(queue.to_key("jobs"), gone.id)
    await redis.sadd(queue.to_key("failed"), "1", "2")
    assert await queue.get_jobs("waiting") == await queue.get_jobs("failed") == [kept]
    await redis.hdel(queue.to_key("jobs"), kept.id)
    assert await queue.get_jobs("waiting") == await queue.get_jobs("failed") == []


@pytest.mark.parametrize(
    ("kind", "page", "error", "message"),
    [
        ("stalling", {}, ValueError, "Improper queue type 'stalling': it must be one of waiting, active, delayed, *"),
        ("", {}, ValueError, "Improper queue type '': *"),
        ("Waiting", {}, ValueError, "Improper queue type 'Waiting': *"),
        (None, {}, ValueError, "Improper queue type None: *"),
        (["waiting"], {}, ValueError, "Improper queue type ['waiting']: *"),
        ("waiting", {"start": None}, TypeError, "start must be an int, not None"),
        ("waiting", {"start": "0"}, TypeError, "start must be an int, not '0'"),
        ("delayed", {"start": False}, TypeError, "start must be an int, not False"),
        ("active", {"end": 1.0}, TypeError, "end must be an int, not 1.0"),
        ("failed", {"end": None}, TypeError, "end must be an int, not None"),
        ("failed", {"size": 0}, ValueError, "size must be at least 1, not 0"),
        ("succeeded", {"size": -1}, ValueError, "size must be at least 1, not -1"),
        ("waiting", {"size": 0}, ValueError, "size must be at least 1, not 0"),
        ("succeeded", {"size": "1"}, TypeError, "size must be an int, not '1'"),
    ],
)
async def test_get_jobs_refuses(
    make_queue: MakeQueue, kind: Any, page: dict[str, Any], error: type[Exception], message: str
) -> None:
    """G-16, QK-66: It names the argument and its value. Once the queue is closed, `closed` comes first."""
    queue = make_queue(is_worker=False)
    with pytest.raises(error) as refused:
        await queue.get_jobs(kind, **page)
    assert type(refused.value) is error
    assert_says(refused.value, message)
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await queue.get_jobs(kind, **page)


@pytest.mark.parametrize("name", ["start", "end"])
async def test_an_index_that_redis_cannot_count_to(make_queue: MakeQueue, name: str) -> None:
    """QK-66: It is named too."""
    queue = make_queue(is_worker=False)
    with pytest.raises(ValueError, match=rf"^{name} must .*{2**63}$"):
        await queue.get_jobs("waiting", **{name: 2**63})


# --- remove ------------------------------------------------------------------------------------------------------------


@both_orderings
@pytest.mark.parametrize("store_jobs", [True, False])
async def test_removal(make_queue: MakeQueue, redis: Any, ordered: bool, store_jobs: bool) -> None:
    """RM-01, RM-02, RM-03, RM-05, RM-06: Both ways do the same.

    The job is gone, here too, and removing it again is no error.
    """
    queue = make_queue(is_worker=False, ordered_events=ordered, store_jobs=store_jobs)
    first, second = await queue.create_job(1).save(), await queue.create_job(2).save()
    third = await queue.create_job(3).delay_until(FAR).save()
    removed = await asyncio.gather(queue.remove_job("1"), second.remove(), queue.remove_job("unheard of"))
    assert removed[0] is removed[2] is queue
    assert removed[1] is second
    assert queue.jobs == ({"3": third} if store_jobs else {})
    assert await queue.get_job("1") is await queue.get_job("2") is None
    assert await redis.hkeys(queue.to_key("jobs")) == ["3"]
    assert await redis.exists(queue.to_key("waiting")) == 0
    assert await third.remove() is third
    assert await third.remove() is third
    assert await first.remove() is first
    assert await keys(queue, redis) == {"id"}


async def test_a_removal_takes_the_id_out_of_every_place(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """RM-09, QK-17: In one step, on the event connection; no other id is touched."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        jobs = [await queue.create_job({}).save() for _ in range(3)]
        for kind in ("succeeded", "failed", "stalling"):
            await redis.sadd(queue.to_key(kind), "1", "2")
        await redis.rpush(queue.to_key("active"), "1", "2", "1")
        await redis.rpush(queue.to_key("waiting"), "1")
        await redis.zadd(queue.to_key("delayed"), {"1": FAR, "2": FAR})
        spoken = Spoken(relay)
        await jobs[0].remove()
        assert spoken.names == [("event", "remove_job")]
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["3", "2"]
        assert await redis.lrange(queue.to_key("active"), 0, -1) == ["2"]
        assert await redis.zrange(queue.to_key("delayed"), 0, -1) == ["2"]
        for kind in ("succeeded", "failed", "stalling"):
            assert await redis.smembers(queue.to_key(kind)) == {"2"}
        assert sorted(await redis.hkeys(queue.to_key("jobs"))) == ["2", "3"]
        await queue.close()


async def test_a_removal_tells_nobody(make_queue: MakeQueue, redis: Any) -> None:
    """RM-10: Nothing is published; another queue keeps its objects."""
    queue, other = make_queue(is_worker=False), make_queue(is_worker=False)
    saved = await queue.create_job({}).delay_until(FAR).save()
    kept = await other.get_job("1")
    async with Heard(redis, queue) as heard:
        await saved.remove()
        await queue.remove_job("unheard of")
        assert await heard.before("marker") == []
    assert other.jobs == {"1": kept}


async def test_a_job_whose_data_is_gone_when_it_is_taken(make_queue: MakeQueue, redis: Any) -> None:
    """RM-07, RM-01: Its worker skips it without a report, and runs the next."""
    worker, producer = make_queue(get_events=False), make_queue(is_worker=False)
    handled: list[Any] = []

    async def handler(job: Job) -> None:
        handled.append(job.data)

    dead = await producer.create_job("dead").save()
    await redis.hdel(producer.to_key("jobs"), dead.id)
    producer.jobs.clear()
    worker.process(handler)
    good = await producer.create_job("good").save()
    await good.result()
    assert handled == ["good"]
    assert await places(producer, redis) == {"2": {"succeeded"}}
    await worker.close()


@both_orderings
async def test_removing_a_running_job(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """SJ-01, QK-18: Its result is unknown at once. Its worker reports a late finish and writes nothing."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    worker = make_queue(get_events=False)
    gate, started, unknown = asyncio.Event(), Seen(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    job = await queue.create_job({}).save()
    job.on("unknown", unknown)
    waiting = asyncio.ensure_future(job.result())
    worker.process(handler)
    await started.reaches(1)
    await job.remove()
    with pytest.raises(OutcomeUnknown, match="^job 1: it was removed$"):
        await waiting
    assert len(unknown.calls) == 1
    gate.set()
    await until(lambda: worker.late_finishes == 1)
    assert len(make_queue.claim(LateFinish)) == 1
    assert await keys(queue, redis) <= {"id", "stallBlock"}


@both_orderings
async def test_removing_a_job_that_has_ended(make_queue: MakeQueue, ordered: bool) -> None:
    """Its result stays known."""
    queue = make_queue(ordered_events=ordered)
    job = await queue.create_job("x").save()
    queue.process(echo)
    assert await job.result() == "x"
    await job.remove()
    assert await job.result() == "x"
    assert queue.unknown_outcomes == 0


@both_orderings
async def test_a_removal_whose_reply_is_lost_is_not_repeated(
    make_queue: MakeQueue, url: str, redis: Any, ordered: bool
) -> None:
    """Repeated, it would take away the job that another producer has saved under the id meanwhile."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered, reconnect=soon).ready()
        other = make_queue(is_worker=False)
        await other.create_job("old").set_id("own").save()
        role = "event" if ordered else "command"
        relay.hold(role)
        removing = asyncio.create_task(queue.remove_job("own"))
        await until(lambda: gone("own", queue, redis))
        new = await other.create_job("new").set_id("own").save()
        for line in relay.lines:
            if line.role == role:
                line.cut()
        relay.release(role)
        with pytest.raises(ConnectionLost) as lost:
            await removing
        assert lost.value.maybe_applied
        assert await new.is_in_set("waiting")
        fetched = await queue.get_job("own")
        assert fetched is not None
        assert fetched.data == "new"
        make_queue.claim(ConnectionLost)
        await queue.close()


# --- retry and is_in_set -----------------------------------------------------------------------------------------------


@both_orderings
async def test_retry(make_queue: MakeQueue, url: str, redis: Any, ordered: bool) -> None:
    """JR-03, QK-48: From failed or succeeded to the head of waiting, in one step.

    The job receives the events of its new attempt.
    """
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        worker = make_queue(get_events=False)
        job, heard = await queue.create_job("bad").retries(0).save(), Seen()
        job.on("failed", lambda error: heard("failed", str(error)))
        job.on("succeeded", lambda result: heard("succeeded", result))
        worker.process(good_or_bad)
        with pytest.raises(JobFailed):
            await job.result()
        await worker.close()
        assert queue.jobs == {}
        later = await queue.create_job({}).save()
        spoken = Spoken(relay)
        assert await job.retry() == (1, 2)
        assert spoken.names == [("event" if ordered else "command", "retry_job")]
        assert queue.jobs == {"1": job, "2": later}
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1", "2"]
        assert await redis.exists(queue.to_key("failed")) == 0
        entry = json.loads(await redis.hget(queue.to_key("jobs"), "1"))
        entry["data"] = "good"
        await redis.hset(queue.to_key("jobs"), "1", json.dumps(entry))
        again = asyncio.ensure_future(job.result())
        make_queue(get_events=False).process(good_or_bad)
        assert await again == "good"
        assert await job.retry() == (0, 1)
        await heard.reaches(3)
        assert heard.calls == [("failed", "bad luck"), ("succeeded", "good"), ("succeeded", "good")]
        await queue.close()


@both_orderings
async def test_retry_from_a_listener_of_failed(make_queue: MakeQueue, ordered: bool) -> None:
    """JR-01: With the handler's own object: the job runs again, and succeeds."""
    queue = make_queue(ordered_events=ordered)
    failed, done = Seen(), Seen()
    queue.on("succeeded", done)

    @queue.on("failed")
    async def again(job: Job, error: Exception) -> None:
        failed(str(error))
        assert await job.retry() == (1, 1)

    async def handler(job: Job) -> str:
        if not failed.calls:
            raise ValueError("first")
        return "second"

    await queue.create_job({}).save()
    queue.process(handler)
    ((job, result),) = await done.reaches(1)
    assert (job.id, result, failed.calls) == ("1", "second", [("first",)])
    await until(lambda: not queue.jobs)


@both_orderings
@pytest.mark.parametrize("kind", ["waiting", "active", "delayed"])
async def test_retry_of_a_job_that_has_not_ended(make_queue: MakeQueue, redis: Any, ordered: bool, kind: str) -> None:
    """JR-02, QK-48: It is no error; the job stays where it is, and runs once."""
    queue = make_queue(ordered_events=ordered)
    gate, runs = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        runs()
        await gate.wait()

    job = queue.create_job({})
    if kind == "delayed":
        job.delay_until(FAR)
    await job.save()
    if kind == "active":
        queue.process(handler)
        await runs.reaches(1)
    before = await places(queue, redis)
    assert before == {"1": {kind}}
    assert await job.retry() == (0, 1 if kind == "waiting" else 0)
    assert await places(queue, redis) == before
    assert queue.jobs == {"1": job}
    if kind != "active":
        gate.set()
        await redis.delete(queue.to_key("delayed"), queue.to_key("waiting"))
        await redis.lpush(queue.to_key("waiting"), "1")
        queue.process(handler)
    gate.set()
    await job.result()
    assert len(runs.calls) == 1


@both_orderings
async def test_retry_of_a_job_that_is_gone(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """QK-48: It raises, queues nothing and keeps nothing."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job = await queue.create_job({}).save()
    await redis.delete(queue.to_key("jobs"), queue.to_key("waiting"))
    with pytest.raises(BeeQueueError, match="^job 1 cannot be retried: it has no entry in jobs$"):
        await job.retry()
    assert queue.jobs == {}
    assert await keys(queue, redis) == {"id"}
    with pytest.raises(OutcomeUnknown, match="^job 1: it has no entry in jobs$"):
        await job.result()


@both_orderings
async def test_a_retry_in_vain_does_not_unsettle_a_result(make_queue: MakeQueue, ordered: bool) -> None:
    queue = make_queue(ordered_events=ordered, remove_on_success=True)
    job = await queue.create_job("x").save()
    queue.process(echo)
    assert await job.result() == "x"
    with pytest.raises(BeeQueueError, match="no entry"):
        await job.retry()
    assert await job.result() == "x"
    assert queue.unknown_outcomes == 0


async def test_retry_of_a_fetched_job(make_queue: MakeQueue, redis: Any) -> None:
    """QK-48, QK-40: The job had ended, so it was not bound; it receives the events of its new attempt."""
    queue = make_queue(remove_on_success=True)
    await store(redis, queue, 2)
    await redis.sadd(queue.to_key("failed"), "1")
    fetched, open_one = await queue.get_job("1"), await Job.from_id(queue, "2")
    assert fetched is not None
    assert open_one is not None
    assert queue.jobs == {}
    with pytest.raises(JobFailed):
        await fetched.result()
    assert await fetched.retry() == (1, 1)
    assert await open_one.retry() == (0, 1)
    await redis.lpush(queue.to_key("waiting"), "2")
    queue.process(echo)
    assert await fetched.result() == 1
    assert await open_one.result() == 2


@both_orderings
async def test_is_in_set(make_queue: MakeQueue, url: str, redis: Any, ordered: bool) -> None:
    """JR-04, JR-05, QK-70: Of lists and of the sorted set too; False while the key does not exist."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        kinds = (*KINDS, "stalling")
        job = await queue.create_job({}).set_id("an id").save()
        assert [await job.is_in_set(kind) for kind in kinds] == [True, False, False, False, False, False]
        spoken = Spoken(relay)
        await redis.delete(queue.to_key("waiting"))
        for kind in kinds:
            assert await job.is_in_set(kind) is False
            await add_to(redis, queue, kind, "other", "an id")
            assert [await job.is_in_set(each) for each in kinds] == [each == kind for each in kinds]
            await redis.delete(queue.to_key(kind))
        assert {role for role, _ in spoken.names} == {"event" if ordered else "command"}
        await queue.close()


@pytest.mark.parametrize("kind", ["", "jobs", "id", "success", "Waiting", None, 5, ["waiting"]], ids=repr)
async def test_is_in_set_of_another_name(make_queue: MakeQueue, kind: Any) -> None:
    """QK-70: It raises, and names it."""
    job = await make_queue(is_worker=False).create_job({}).save()
    with pytest.raises(
        ValueError, match="^is_in_set takes one of waiting, active, delayed, succeeded, failed, stalling, not "
    ) as no:
        await job.is_in_set(kind)
    assert str(no.value).endswith(f", not {kind!r}")


async def test_without_an_id(make_queue: MakeQueue, redis: Any) -> None:
    """QK-52, QK-45: Each call raises, and neither writes nor publishes."""
    queue = await make_queue(is_worker=False).ready()
    job = queue.create_job({})
    calls: list[tuple[Callable[[], Awaitable[Any]], str]] = [
        (job.remove, "a job without an id cannot be removed: save it first"),
        (job.retry, "a job without an id cannot be retried: save it first"),
        (lambda: job.is_in_set("waiting"), "a job without an id cannot be in a set: save it first"),
        (lambda: job.report_progress(1), "a job without an id cannot report progress: save it first"),
        (job.result, "result() is for a job that this queue has saved or fetched"),
    ]
    async with Heard(redis, queue) as heard:
        for call, message in calls:
            with pytest.raises(BeeQueueError) as refused:
                await call()
            assert str(refused.value) == message
        assert await heard.before("marker") == []
    assert job.progress == 0
    assert await keys(queue, redis) == set()


@pytest.mark.parametrize("progress", [object(), {1, 2}, b"x"], ids=lambda value: type(value).__name__)
async def test_progress_that_json_cannot_carry(make_queue: MakeQueue, redis: Any, progress: Any) -> None:
    """It raises and names the type. Nothing is published, and the job's own value stays."""
    queue = make_queue(is_worker=False)
    job = await queue.create_job({}).save()
    async with Heard(redis, queue) as heard:
        with pytest.raises(TypeError, match=f"^Type is not JSON serializable: {type(progress).__name__}$"):
            await job.report_progress(progress)
        assert await heard.before("marker") == []
    assert job.progress == 0


@both_orderings
async def test_the_last_progress_is_stored(make_queue: MakeQueue, ordered: bool) -> None:
    """QK-46: With a retry and with the end; get_job and from_id read it."""
    queue = make_queue(ordered_events=ordered)
    other = make_queue(is_worker=False, ordered_events=ordered)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started(job.progress)
        if len(started.calls) == 1:
            await job.report_progress(0.5)
            await job.report_progress({"half": "ü"})
            raise ValueError
        await gate.wait()
        await job.report_progress("end")

    job = await queue.create_job({}).retries(1).save()
    queue.process(handler)
    await started.reaches(2)
    retried = await other.get_job("1")
    assert retried is not None
    assert (retried.status, retried.progress) == ("retrying", {"half": "ü"})
    gate.set()
    await job.result()
    ended = await Job.from_id(other, "1")
    assert ended is not None
    assert (ended.status, ended.progress) == ("succeeded", "end")
    assert [progress for (progress,) in started.calls] == [0, {"half": "ü"}]


# --- order on one socket -----------------------------------------------------------------------------------------------


async def test_what_is_issued_behind_a_save_sees_it(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """QK-39: get, retry, is_in_set and remove, even if all replies come late and in one read."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        relay.hold("event")
        job = queue.create_job({}).set_id("own")
        calls = asyncio.gather(
            job.save(),
            queue.get_job("own"),
            job.retry(),
            job.is_in_set("waiting"),
            job.report_progress(1),
            queue.remove_job("own"),
            queue.get_job("own"),
            job.is_in_set("waiting"),
        )
        await until(lambda: len(spoken.names) == 8)
        relay.release("event")
        assert await calls == [job, job, (0, 1), True, 1, queue, None, False]
        scripts = ("add_job", "get_job", "retry_job", "LPOS", "PUBLISH", "remove_job", "get_job", "LPOS")
        assert spoken.names == [("event", script) for script in scripts]
        assert queue.jobs == {}
        with pytest.raises(OutcomeUnknown, match="^job own: it was removed$"):
            await job.result()
        await queue.close()


async def test_a_job_saved_right_behind_a_removal_of_its_id_is_kept(make_queue: MakeQueue, url: str) -> None:
    """QK-39: Their replies come in one read. The removed job ends as unknown; the new one receives its end."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        old, new = await queue.create_job("old").set_id("own").save(), queue.create_job("new").set_id("own")
        relay.hold("event")
        calls = asyncio.gather(old.remove(), new.save())
        await until(lambda: len(spoken.names) == 3)
        relay.release("event")
        await calls
        assert queue.jobs == {"own": new}
        with pytest.raises(OutcomeUnknown):
            await old.result()
        make_queue(get_events=False).process(echo)
        assert await new.result() == "new"
        await queue.close()


async def test_get_job_of_a_job_that_ends_right_behind(make_queue: MakeQueue, url: str) -> None:
    """QK-39, G-06, EV-29: Reply and event come in one read.

    The object receives it, also a listener that was added after the call.
    """
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker = make_queue(get_events=False)
        jobs = [await worker.create_job(number).save() for number in range(20)]
        spoken, done, heard = Spoken(relay), Seen(), Seen()
        worker.on("succeeded", done)

        async def fetch_and_listen(job_id: str) -> None:
            job = await queue.get_job(job_id)
            assert job is not None
            job.on("succeeded", lambda result: heard(job.id, result))

        relay.hold("event")
        calls = asyncio.gather(*(fetch_and_listen(job.id or "") for job in jobs))
        await until(lambda: len(spoken.names) == 20)
        worker.process(echo)
        await done.reaches(20)
        assert not calls.done()
        relay.release("event")
        await calls
        assert sorted(await heard.reaches(20)) == sorted((job.id, job.data) for job in jobs)
        assert queue.jobs == {}
        await queue.close()


async def test_get_job_of_a_job_whose_end_stands_before_the_reply(make_queue: MakeQueue, url: str) -> None:
    """QK-39, QK-40: It returns the kept object, which receives its end once; nothing stays bound."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker = make_queue(get_events=False)
        job = await queue.create_job("x").save()
        spoken, done, heard = Spoken(relay), Seen(), Seen()
        job.on("succeeded", heard)
        worker.on("succeeded", done)
        relay.hold("event")
        worker.process(echo)
        await done.reaches(1)
        fetching = asyncio.ensure_future(queue.get_job("1"))
        await until(lambda: len(spoken.names) == 1)
        relay.release("event")
        assert await fetching is job
        assert await job.result() == "x"
        assert heard.calls == [("x",)]
        assert queue.jobs == {}
        await queue.close()


async def test_removing_a_job_whose_end_stands_before_the_reply(make_queue: MakeQueue, url: str) -> None:
    """QK-39: The job has ended with its result, which is not lost."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker, done, heard = make_queue(get_events=False), Seen(), Seen()
        job = await queue.create_job("x").save()
        for event in ("succeeded", "unknown"):
            job.on(event, heard)
        worker.on("succeeded", done)
        spoken = Spoken(relay)
        relay.hold("event")
        worker.process(echo)
        await done.reaches(1)
        removing = asyncio.ensure_future(job.remove())
        await until(lambda: len(spoken.names) == 1)
        relay.release("event")
        await removing
        assert await job.result() == "x"
        assert heard.calls == [("x",)]
        assert queue.jobs == {}
        await queue.close()


@pytest.mark.parametrize("by", ["the same object", "another object"])
async def test_retry_behind_a_failure_in_the_same_read(make_queue: MakeQueue, url: str, by: str) -> None:
    """QK-48, QK-39: The old `failed` is heard once and does not end the new attempt; the object that retried receives the
    new attempt's events.
    """
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker = make_queue(get_events=False)
        runs = Seen()

        async def handler(job: Job) -> str:
            runs()
            if len(runs.calls) == 1:
                raise ValueError("first")
            await gate.wait()
            return "second"

        gate, failed, log = asyncio.Event(), Seen(), []
        job = await queue.create_job({}).save()
        retrying = job if by == "the same object" else await Job.from_id(queue, "1")
        assert retrying is not None
        for who, each in {"saved": job, "retried": retrying}.items() if retrying is not job else {"both": job}.items():
            each.on("failed", lambda error, who=who: log.append((who, str(error))))
            each.on("succeeded", lambda result, who=who: log.append((who, result)))
            each.on("unknown", lambda error, who=who: log.append((who, str(error))))
        worker.on("failed", failed)
        spoken = Spoken(relay)
        relay.hold("event")
        worker.process(handler)
        await failed.reaches(1)
        calls = asyncio.ensure_future(retrying.retry())
        await runs.reaches(2)
        assert spoken.names == [("event", "retry_job")]
        relay.release("event")
        assert await calls == (1, 1)
        gate.set()
        assert await retrying.result(timeout=3000) == "second"
        assert log == [
            ("saved" if retrying is not job else "both", "first"),
            ("retried" if retrying is not job else "both", "second"),
        ]
        assert queue.jobs == {}
        await queue.close()


# --- results -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.02)


@both_orderings
@pytest.mark.usefixtures("look_often")
async def test_the_result_of_a_job_removed_elsewhere(make_queue: MakeQueue, ordered: bool) -> None:
    """QK-40: The wait ends as unknown, and the job is not kept."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job, heard = await queue.create_job({}).save(), Seen()
    job.on("unknown", heard)
    waiting = [asyncio.ensure_future(job.result()) for _ in range(2)]
    await make_queue(is_worker=False, get_events=False).remove_job("1")
    for result in waiting:
        with pytest.raises(OutcomeUnknown, match="^job 1: it is gone, and no event reported its end$"):
            await result
    assert len(heard.calls) == queue.unknown_outcomes == 1
    assert queue.jobs == {}


@both_orderings
@pytest.mark.usefixtures("look_often")
async def test_the_results_of_a_worker_that_sends_no_events(make_queue: MakeQueue, ordered: bool) -> None:
    """PS-02, EV-26: A success is unknown; a failure has the message line of its stack trace."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    good, bad = await queue.create_job("good").save(), await queue.create_job("bad").save()
    heard = Seen()
    for job in (good, bad):
        for event in ("succeeded", "failed", "unknown"):
            job.on(event, lambda outcome, job=job, event=event: heard(job.data, event))
    results = [asyncio.ensure_future(job.result()) for job in (good, bad)]
    make_queue(send_events=False).process(good_or_bad)
    with pytest.raises(
        OutcomeUnknown, match="^job 1: it succeeded, but no event brought its result, and results are not stored$"
    ):
        await results[0]
    with pytest.raises(JobFailed, match="^ValueError: bad luck$"):
        await results[1]
    assert sorted(heard.calls) == [("bad", "failed"), ("good", "unknown")]
    assert queue.jobs == {}


@both_orderings
@pytest.mark.usefixtures("look_often")
async def test_the_result_of_a_job_that_node_failed(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """Without an event, the failure has the first line of Node's stack."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job = await queue.create_job({}).save()
    waiting = asyncio.ensure_future(job.result())
    job.options["stacktraces"].append(NODE_TRACE)
    await redis.hset(queue.to_key("jobs"), "1", job.to_data())
    await redis.lrem(queue.to_key("waiting"), 0, "1")
    await redis.sadd(queue.to_key("failed"), "1")
    with pytest.raises(JobFailed, match="^Error: fail!$"):
        await waiting


@both_orderings
@pytest.mark.usefixtures("look_often")
async def test_clearing_jobs_while_a_result_is_waited_for(make_queue: MakeQueue, ordered: bool) -> None:
    """SJ-03: No event finds the job any more, but Redis still tells how it ended."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    good, bad = await queue.create_job("good").save(), await queue.create_job("bad").save()
    results = [asyncio.ensure_future(job.result()) for job in (good, bad)]
    await asyncio.sleep(0)
    queue.jobs = {}
    make_queue(get_events=False).process(good_or_bad)
    with pytest.raises(OutcomeUnknown, match="^job 1: it succeeded"):
        await results[0]
    with pytest.raises(JobFailed, match="^ValueError: bad luck$"):
        await results[1]
    assert queue.jobs == {}


@both_orderings
@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("what", ["plain", "lone surrogates", "500 deep", "no timestamp", "options changed since"])
async def test_looking_does_not_disturb_a_job_that_has_not_ended(
    make_queue: MakeQueue, url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool, what: str
) -> None:
    """For every kind of entry: the result comes when the job ends."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        data = {"lone surrogates": "\udc00 \ud800", "500 deep": nested(500)}.get(what, "x")
        job: Job | None = await queue.create_job(data).save()
        if what == "no timestamp":
            queue.jobs = {}
            await redis.hset(queue.to_key("jobs"), "1", '{"data":"x","options":{}}')
            job = await queue.get_job("1")
        assert job is not None
        if what == "options changed since":
            job.options["timestamp"] += 1
            assert await queue.get_job("1") is job
        spoken = Spoken(relay)
        waiting = asyncio.ensure_future(job.result())
        await until(lambda: waiting.done() or len(spoken.names) >= 4)
        assert {name for _, name in spoken.names} == {"ended"}
        assert not waiting.done()
        monkeypatch.setattr(tracker, "LOOK_EVERY_S", 60)
        make_queue(get_events=False).process(echo)
        equal = await waiting == data  # pytest cannot show it
        assert equal
        assert queue.unknown_outcomes == 0
        await queue.close()


@both_orderings
@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("data", ["x", "\ud800"], ids=["plain", "lone surrogate"])
async def test_looking_tells_another_job_with_the_same_id(make_queue: MakeQueue, redis: Any, ordered: bool, data: str) -> None:
    """QK-71: By its timestamp, for every kind of entry: the older job's end is unknown."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job = await queue.create_job({}).save()
    await put(redis, queue, "1", {"data": data, "options": {"timestamp": 5, "stacktraces": []}})
    with pytest.raises(OutcomeUnknown, match="^job 1: it is gone, and no event reported its end$"):
        await job.result(timeout=5000)


@pytest.mark.usefixtures("look_often")
async def test_an_end_that_was_read_comes_before_what_a_look_finds(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """QK-39: Event and answer come in one read, and the event is delivered a step later."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker, done, heard = make_queue(get_events=False), Seen(), Seen()
        worker.on("succeeded", done)
        job = await queue.create_job("x").save()
        for event in ("succeeded", "unknown"):
            job.on(event, heard)
        relay.hold("event")
        worker.process(echo)
        await done.reaches(1)
        spoken = Spoken(relay)
        waiting = asyncio.ensure_future(job.result())
        await until(lambda: spoken.names == [("event", "ended")])
        await redis.ping()  # Redis has answered the look by then
        relay.release("event")
        assert await waiting == "x"
        assert heard.calls == [("x",)]
        assert queue.unknown_outcomes == 0
        await queue.close()


async def test_on_two_sockets_an_event_may_come_after_the_answer(
    make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the next look believes what the first one found."""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.02)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=False).ready()
        worker, done = make_queue(get_events=False), Seen()
        worker.on("succeeded", done)
        job = await queue.create_job("x").save()
        relay.hold("event")
        worker.process(echo)
        await done.reaches(1)
        spoken = Spoken(relay)
        waiting = asyncio.ensure_future(job.result())
        await until(lambda: spoken.names == [("command", "ended"), ("command", "look_up")])
        monkeypatch.setattr(tracker, "LOOK_EVERY_S", 60)
        await queue.check_health()  # answered behind the look
        relay.release("event")
        assert await waiting == "x"
        await queue.close()


@both_orderings
async def test_a_look_reads_few_bytes_at_once_and_decodes_only_what_has_ended(
    make_queue: MakeQueue, url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """Decoding 100 jobs of 500 kB would keep Redis from everybody else for 0.7 s."""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(beequeue.store.store, "LOOKED_AT_BYTES", 1_000)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        jobs = [await queue.create_job("x" * 600).save() for _ in range(7)]
        spoken = Spoken(relay)
        results = [asyncio.ensure_future(job.result()) for job in jobs]
        await until(lambda: len(spoken.names) >= 4)
        role = "event" if ordered else "command"
        assert spoken.names[:4] == [(role, "ended")] * 4
        assert [[*map(bytes.decode, ids(command))] for _, command in spoken.commands[:4]] == [
            ["1", "2", "3", "4", "5", "6", "7"],
            ["3", "4", "5", "6", "7"],
            ["5", "6", "7"],
            ["7"],
        ]
        for job_id in "1", "3", "4", "7":
            await redis.sadd(queue.to_key("succeeded"), job_id)
        for index in 0, 2, 3, 6:
            with pytest.raises(OutcomeUnknown, match="it succeeded"):
                await results[index]
        assert {job_id for _, command in spoken.commands for job_id in ids(command) if is_look_up(command)} == {
            *b"1 3 4 7".split()
        }
        for index in 1, 4, 5:
            assert not results[index].done()
            results[index].cancel()
        await queue.close()


@both_orderings
@pytest.mark.usefixtures("look_often")
async def test_closing_while_a_look_is_under_way(make_queue: MakeQueue, url: str, ordered: bool) -> None:
    """ER-07: It ends the wait with `closed`, and reports no `error`."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        job = await queue.create_job({}).save()
        spoken = Spoken(relay)
        relay.hold("event" if ordered else "command")
        waiting = asyncio.ensure_future(job.result())
        await until(lambda: spoken.names == [("event" if ordered else "command", "ended")])
        await queue.close()
        with pytest.raises(QueueClosed, match="^closed$"):
            await waiting


async def test_several_wait_for_one_result(make_queue: MakeQueue) -> None:
    """Each has its own time-out, in ms or as a timedelta."""
    queue = make_queue()
    job = await queue.create_job("x").save()
    for limit in (0, 10, timedelta(milliseconds=10)):
        with pytest.raises(TimeoutError):
            await job.result(timeout=limit)
    short, long = asyncio.ensure_future(job.result(1)), asyncio.ensure_future(job.result(timedelta(minutes=1)))
    cancelled = asyncio.ensure_future(job.result())
    with pytest.raises(TimeoutError):
        await short
    cancelled.cancel()
    queue.process(echo)
    assert await long == "x"
    assert await job.result(0) == "x"


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, "timeout must be at least 0 ms, not -1"),
        (timedelta(seconds=-1), ValueError, "timeout must be at least 0 ms, not -1000"),
        (1.5, TypeError, "timeout must be an int of milliseconds or a timedelta, not 1.5"),
        ("1", TypeError, "timeout must be an int of milliseconds or a timedelta, not '1'"),
        (True, TypeError, "timeout must be an int of milliseconds or a timedelta, not True"),
    ],
)
async def test_wrong_time_outs(make_queue: MakeQueue, limit: Any, error: type[Exception], message: str) -> None:
    job = await make_queue(is_worker=False).create_job({}).save()
    with pytest.raises(error) as refused:
        await job.result(limit)
    assert type(refused.value) is error
    assert str(refused.value) == message


# --- check_health ------------------------------------------------------------------------------------------------------


@both_orderings
async def test_check_health(make_queue: MakeQueue, url: str, redis: Any, ordered: bool) -> None:
    """HC-01, HC-08, QK-72: Ints, all of one moment: one script counts them."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        assert await queue.check_health() == (0, 0, 0, 0, 0, 0)
        await queue.create_job({}).save()
        for count, kind in enumerate(("active", "succeeded", "failed", "delayed"), 2):
            await add_to(redis, queue, kind, *(str(number) for number in range(count)))
        spoken = Spoken(relay)
        health = await queue.check_health()
        assert health == Health(waiting=1, active=2, succeeded=3, failed=4, delayed=5, newest_job=1)
        assert {type(count) for count in health} == {int}
        assert spoken.names == [("command", "check_health")]
        await redis.set(queue.to_key("id"), "123456789012345678")
        assert (await queue.check_health()).newest_job == 123456789012345678
        await queue.close()


async def test_ids_of_ones_own_count_for_nothing(make_queue: MakeQueue) -> None:
    """HC-06: There is no newest job."""
    queue = make_queue(is_worker=False)
    await queue.create_job({}).set_id("own").save()
    await queue.create_job({}).set_id("99").save()
    assert (await queue.check_health()).newest_job == 0


async def test_health_while_a_job_runs(make_queue: MakeQueue) -> None:
    """HC-02: As its own handler sees it."""
    queue = make_queue()

    async def handler(job: Job) -> dict[str, int]:
        return (await queue.check_health())._asdict()

    job = await queue.create_job({}).save()
    queue.process(handler)
    counts = {"waiting": 0, "active": 1, "succeeded": 0, "failed": 0, "delayed": 0, "newest_job": 1}
    assert await job.result() == counts


async def test_health_by_the_time_of_an_event(make_queue: MakeQueue) -> None:
    """HC-03, HC-04, HC-05: After succeeded; after failed, for both events; after a retry, and then counted once, with its
    status each time.
    """
    queue = make_queue(get_events=False, store_jobs=False)
    seen = Seen()

    for event in ("retrying", "failed", "failed:fatal", "succeeded"):

        @queue.on(event)
        async def count(job: Job, outcome: Any, event: str = event) -> None:
            status = job.status
            health = await queue.check_health()
            seen(job.id, event, status, health.succeeded, health.failed)

    async def handler(job: Job) -> None:
        if job.data == "bad" or (job.data == "late" and not job.options["stacktraces"]):
            raise ValueError("no")

    queue.process(handler)
    for number, (data, count_of_events) in enumerate((("good", 1), ("bad", 2), ("late", 3)), 1):
        saved = await queue.create_job(data).retries(1 if data == "late" else 0).save()
        assert saved.id == str(number)
        before = len(seen.calls)
        await seen.reaches(before + count_of_events)
    good, failed, fatal, *late = seen.calls
    assert good == ("1", "succeeded", "succeeded", 1, 0)
    assert failed == ("2", "failed", "failed", 1, 1)
    assert fatal == ("2", "failed:fatal", "failed", 1, 1)
    assert [call[:3] for call in late] == [
        ("3", "retrying", "retrying"),
        ("3", "failed", "retrying"),
        ("3", "succeeded", "succeeded"),
    ]
    assert late[-1][3:] == (2, 1)
    assert {failed for *_, failed in late} == {1}


def test_what_is_promised_is_documented() -> None:
    """QK-72: Every event is named in the docstrings, and every public method has a docstring."""
    assert Queue.__doc__
    assert Job.__doc__
    for event in (
        *("ready", "error", "succeeded", "retrying", "failed", "failed:fatal", "stalled", "raised jobs"),
        *("job succeeded", "job failed", "job retrying", "job progress"),
    ):
        assert f"`{event}`" in Queue.__doc__
    for event in ("succeeded", "failed", "retrying", "progress"):
        assert f"`{event}`" in Job.__doc__
    for owner in (Queue, Job, Health):
        for name, member in inspect.getmembers(owner):
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{owner.__name__}.{name}"
    assert get_type_hints(Health)["newest_job"] is int


# --- destroy -----------------------------------------------------------------------------------------------------------


async def test_destroy(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """DE-01, DE-03, DE-04, DE-05: One DEL of ten keys; it returns how many there were; automatic ids start again."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url).ready()
        await queue.create_job({}).save()
        assert await queue.destroy() == 3
        assert await keys(queue, redis) == set()
        queue.process(echo)
        done = await queue.create_job({}).save()
        assert done.id == "1"
        await done.result()
        await queue.create_job({}).delay_until(FAR).save()
        assert await keys(queue, redis) == {"id", "jobs", "succeeded", "delayed", "stallBlock"}
        spoken = Spoken(relay)
        assert await queue.destroy() == 5
        ((role, (command, *named)),) = [each for each in spoken.commands if each[0] == "command"]
        assert (role, command) == ("command", b"DEL")
        assert sorted(named) == sorted(queue.to_key(key).encode() for key in KEYS)
        assert len(KEYS) == 10
        assert "stalls" in KEYS
        assert await keys(queue, redis) == set()
        assert await queue.destroy() == 0
        await redis.hset(queue.to_key("stalls"), "x", 1)
        assert await queue.destroy() == 1
        assert (await queue.create_job({}).save()).id == "1"
        await queue.close()


async def test_destroy_on_a_closed_queue(make_queue: MakeQueue, redis: Any) -> None:
    """DE-02"""
    queue = make_queue(is_worker=False)
    await queue.create_job({}).save()
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await queue.destroy()
    assert await keys(queue, redis) == {"id", "jobs", "waiting"}


async def test_destroy_stops_nothing(make_queue: MakeQueue, redis: Any) -> None:
    """DE-06, QK-71: Jobs stay bound, timers and connections go on, and the end of a running job creates no key."""
    queue = make_queue(activate_delayed_jobs=True)
    gate, started, raised = asyncio.Event(), Seen(), Seen()

    async def handler(job: Job) -> Any:
        started(job.id)
        if job.data == "running":
            await gate.wait()
            if job.id == "2":
                raise ValueError
        return job.data

    queue.on("raised jobs", raised)
    queue.process(handler, 2)
    jobs = [await queue.create_job("running").save() for _ in range(2)]
    await started.reaches(2)
    due = now_ms() + 1_000
    await redis.zadd(queue.to_key("delayed"), {"some": FAR})
    later = await queue.create_job("later").delay_until(due).save()
    await queue.destroy()
    assert queue.jobs == {"1": jobs[0], "2": jobs[1], "3": later}
    await redis.hset(queue.to_key("jobs"), "raised", '{"data":"raised","options":{}}')
    await redis.zadd(queue.to_key("delayed"), {"raised": 1})
    gate.set()
    await until(lambda: queue.late_finishes == 2)
    assert len(make_queue.claim(LateFinish)) == 2
    await raised.reaches(1)
    await started.reaches(3)
    assert started.calls[-1] == ("raised",)
    assert now_ms() >= due
    await until(lambda: redis.sismember(queue.to_key("succeeded"), "raised"))
    assert await keys(queue, redis) - {"stallBlock"} == {"jobs", "succeeded"}
    assert queue.running == 0


# --- clean -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["succeeded", "failed"])
async def test_clean(make_queue: MakeQueue, url: str, redis: Any, kind: str) -> None:
    """It deletes jobs created long enough ago, from one set, and nothing else."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        now = now_ms()
        ages = {"hour": 3_600_000, "minute": 60_000, "second": 1000, "new": -60_000}
        for job_id, age in ages.items():
            await put(redis, queue, job_id, {"options": {"timestamp": now - age}})
        other = "failed" if kind == "succeeded" else "succeeded"
        await redis.sadd(queue.to_key(kind), *ages)
        for place in (other, "waiting", "active", "delayed"):
            await put(redis, queue, place, {"options": {"timestamp": 1}})
            await add_to(redis, queue, place, place)
        everywhere = await places(queue, redis)
        spoken = Spoken(relay)
        assert await queue.clean(kind, timedelta(hours=2)) == 0
        assert await queue.clean(kind, 3_600_000) == 1
        assert await redis.smembers(queue.to_key(kind)) == {"minute", "second", "new"}
        assert await queue.clean(kind, timedelta(seconds=30)) == 1
        assert await queue.clean(kind) == 1
        assert await queue.clean(kind) == 0
        assert {role for role, _ in spoken.names} == {"command"}
        for gone in ("hour", "minute", "second"):
            del everywhere[gone]
        assert await places(queue, redis) == everywhere
        assert sorted(await redis.hkeys(queue.to_key("jobs"))) == sorted(everywhere)
        assert [job.id for job in await queue.get_jobs(kind)] == ["new"]
        await queue.close()


async def test_clean_has_a_limit(make_queue: MakeQueue, redis: Any) -> None:
    """1000 by default. It reads more pages than one, and never deletes more than the limit."""
    queue = make_queue(is_worker=False, redis_scan_count=50)
    await redis.sadd(queue.to_key("failed"), *await store(redis, queue, 2500))
    assert await queue.clean("failed", limit=1) == 1
    assert await queue.clean("failed", 0, 60) == 60
    assert await queue.clean("failed") == 1000
    assert await redis.scard(queue.to_key("failed")) == await redis.hlen(queue.to_key("jobs")) == 1439
    assert await queue.clean("failed", limit=10**9) == 1439
    assert await redis.exists(queue.to_key("failed"), queue.to_key("jobs")) == 0


async def test_a_clean_whose_reply_is_lost_is_not_repeated(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """Repeated, it would delete more than its limit."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        await redis.sadd(queue.to_key("failed"), *await store(redis, queue, 20))

        def hold_the_reply(line: Line, data: bytes) -> None:
            if SCRIPTS["clean"].sha.encode() in data and not queue.reconnects:
                relay.hold(line.role)

        relay.said_on = hold_the_reply
        cleaning = asyncio.create_task(queue.clean("failed", limit=5))
        await until(lambda: counts(queue, redis, "failed", 15))
        for line in relay.lines:
            if line.role == "command":
                line.cut()
        relay.release("command")
        with pytest.raises(ConnectionLost) as lost:
            await cleaning
        assert lost.value.maybe_applied
        assert (await queue.check_health()).failed == 15
        make_queue.claim(ConnectionLost)
        await queue.close()


async def test_clean_of_ended_jobs(make_queue: MakeQueue, redis: Any) -> None:
    """Real jobs: get_job finds none of them. An id without an entry goes too; a job that was retried stays."""
    queue = make_queue()
    jobs = [await queue.create_job(data).save() for data in ("good", "bad", "bad")]
    queue.process(good_or_bad)
    await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
    await redis.sadd(queue.to_key("failed"), "ghost")
    await queue.close()
    cleaner = make_queue(is_worker=False)
    again = await cleaner.get_job("3")
    assert again is not None
    await again.retry()
    assert await cleaner.clean("failed") == 2
    assert await cleaner.clean("succeeded") == 1
    assert await redis.hkeys(cleaner.to_key("jobs")) == ["3"]
    assert await cleaner.get_job("2") is None
    assert await cleaner.get_job("3") is again
    assert await places(cleaner, redis) == {"3": {"waiting"}}


async def test_a_job_retried_while_clean_looks_stays(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """Looking and deleting are one step."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        await redis.sadd(queue.to_key("failed"), *await store(redis, queue, 2))
        at_once = sync_redis.Redis.from_url(url)

        def retry(line: Line, data: bytes) -> None:
            if SCRIPTS["clean"].sha.encode() in data:
                at_once.smove(queue.to_key("failed"), queue.to_key("succeeded"), "1")

        relay.said_on = retry
        assert await queue.clean("failed") == 1
        assert await places(queue, redis) == {"1": {"succeeded"}}
        assert await redis.hkeys(queue.to_key("jobs")) == ["1"]
        at_once.close()
        await queue.close()


@pytest.mark.parametrize("data", ["\ud800", nested(500), "x" * 2**20], ids=["lone surrogates", "500 deep", "1 MB"])
async def test_clean_knows_the_age_of_every_job(make_queue: MakeQueue, redis: Any, data: Any) -> None:
    """Whatever data it carries: a job that this library can read always has a time."""
    queue = make_queue(is_worker=False)
    await queue.create_job(data).save()
    await redis.sadd(queue.to_key("succeeded"), "1")
    assert await queue.clean("succeeded", timedelta(days=1)) == 0
    assert await queue.clean("succeeded") == 1


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("waiting",), ValueError, "clean takes one of succeeded, failed, not 'waiting'"),
        (("",), ValueError, "clean takes one of succeeded, failed, not ''"),
        ((None,), ValueError, "clean takes one of succeeded, failed, not None"),
        ((["failed"],), ValueError, "clean takes one of succeeded, failed, not ['failed']"),
        (("failed", -1), ValueError, "older_than must be at least 0 ms, not -1"),
        (("failed", timedelta(-1)), ValueError, "older_than must be at least 0 ms, not -86400000"),
        (("failed", 1.5), TypeError, "older_than must be an int of milliseconds or a timedelta, not 1.5"),
        (("failed", "1"), TypeError, "older_than must be an int of milliseconds or a timedelta, not '1'"),
        (("failed", None), TypeError, "older_than must be an int of milliseconds or a timedelta, not None"),
        (("failed", True), TypeError, "older_than must be an int of milliseconds or a timedelta, not True"),
        (("failed", 0, 0), ValueError, "limit must be at least 1, not 0"),
        (("failed", 0, -1), ValueError, "limit must be at least 1, not -1"),
        (("failed", 0, None), TypeError, "limit must be an int, not None"),
        (("failed", 0, 1.0), TypeError, "limit must be an int, not 1.0"),
        (("failed", 0, True), TypeError, "limit must be an int, not True"),
    ],
)
async def test_clean_refuses(
    make_queue: MakeQueue, redis: Any, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """It names the argument and its value, and deletes nothing. On a closed queue `closed` comes first."""
    queue = make_queue(is_worker=False)
    await redis.sadd(queue.to_key("failed"), *await store(redis, queue, 1))
    with pytest.raises(error) as refused:
        await queue.clean(*args)
    assert type(refused.value) is error
    assert str(refused.value) == message
    assert await places(queue, redis) == {"1": {"failed"}}
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await queue.clean(*args)


# --- flags -------------------------------------------------------------------------------------------------------------


async def test_only_what_a_flag_asks_for_is_subscribed(make_queue: MakeQueue, redis: Any) -> None:
    """PS-01, PS-05: get_events and send_events are on by default.

    Without events a queue hears only `earlierDelayed`, if it raises delayed jobs.
    """
    settings = QueueSettings()
    assert settings.get_events is settings.send_events is True
    for get_events, activate_delayed_jobs, subscribed in (
        (True, False, [1, 0]),
        (False, False, [1, 0]),
        (False, True, [1, 1]),
        (True, True, [2, 2]),
    ):
        queue = await make_queue(get_events=get_events, activate_delayed_jobs=activate_delayed_jobs).ready()
        channels = [queue.to_key("events"), queue.to_key("earlierDelayed")]
        assert [count for _, count in await redis.pubsub_numsub(*channels)] == subscribed


async def test_what_a_worker_without_send_events_publishes(make_queue: MakeQueue, redis: Any) -> None:
    """PS-02, PS-03, PS-04: No ends and no retries; but messages of `earlierDelayed`, and the progress that its handler
    reports.
    """
    worker = make_queue(get_events=False, send_events=False)
    done, fatal, retrying = Seen(), Seen(), Seen()
    worker.on("succeeded", done)
    worker.on("failed:fatal", fatal)
    worker.on("retrying", retrying)

    async def handler(job: Job) -> None:
        await job.report_progress(50)
        await good_or_bad(job)

    async with Heard(redis, worker) as heard:
        await worker.create_job({}).delay_until(FAR).save()
        await worker.create_job("good").save()
        await worker.create_job("bad").save()
        await worker.create_job("bad").retries(1).backoff("fixed", 60_000).save()
        worker.process(handler)
        await done.reaches(1)
        await fatal.reaches(1)
        await retrying.reaches(1)
        due = await redis.zscore(worker.to_key("delayed"), "4")
        progress = [f'{{"id":"{job_id}","event":"progress","data":50}}' for job_id in (2, 3, 4)]
        assert await heard.before("marker") == [str(FAR), *progress, str(int(due))]


async def test_remove_on_success_and_on_failure(make_queue: MakeQueue, redis: Any) -> None:
    """RO-01, RO-02, RO-03, RO-04, RO-05: At the end, not at a retry; by the worker's flags, not the producer's.

    The events come all the same.
    """
    producer = make_queue(is_worker=False, remove_on_success=False, remove_on_failure=False)
    worker = make_queue(get_events=False, remove_on_success=True, remove_on_failure=True)
    stored, seen = Seen(), Seen()

    for event in ("retrying", "failed:fatal", "succeeded"):

        @worker.on(event)
        async def look(job: Job, outcome: Any, event: str = event) -> None:
            stored(
                event, await redis.hexists(worker.to_key("jobs"), job.id), (await places(worker, redis)).get(str(job.id), set())
            )

        producer.on("job " + event, lambda job_id, outcome, event=event: seen(event, job_id))
    producer.on("job failed", lambda job_id, outcome: seen("failed", job_id))
    good = await producer.create_job("good").save()
    bad = await producer.create_job("bad").retries(1).backoff("fixed", 60_000).save()
    worker.process(good_or_bad)
    assert await good.result() == "good"
    await stored.reaches(2)
    assert await redis.zrem(worker.to_key("delayed"), "2") == 1
    await redis.lpush(worker.to_key("waiting"), "2")
    with pytest.raises(JobFailed, match="^bad luck$"):
        await bad.result()
    assert sorted(await stored.reaches(3)) == [
        ("failed:fatal", False, set()),
        ("retrying", True, {"delayed"}),
        ("succeeded", False, set()),
    ]
    assert seen.calls == [("succeeded", "1"), ("retrying", "2"), ("failed", "2")]
    keeping = make_queue(remove_on_success=False)
    careless = make_queue(is_worker=False, remove_on_success=True, remove_on_failure=True)
    await worker.close()
    kept = await careless.create_job("good").save()
    keeping.process(good_or_bad)
    assert await kept.result() == "good"
    assert await places(keeping, redis) == {"3": {"succeeded"}}
    assert await redis.hexists(keeping.to_key("jobs"), "3")


# --- what the tests look with ------------------------------------------------------------------------------------------


async def put(redis: Any, queue: Queue, job_id: str, entry: dict[str, Any]) -> None:
    await redis.hset(queue.to_key("jobs"), job_id, json.dumps(entry, separators=(",", ":")))


async def store(redis: Any, queue: Queue, count: int) -> list[str]:
    """Stores entries "1" to `count`, each with its number as data; returns the ids."""
    ids = [str(number) for number in range(1, count + 1)]
    entries = {job_id: f'{{"data":{job_id},"options":{{"timestamp":{job_id}}}}}' for job_id in ids}
    await redis.hset(queue.to_key("jobs"), mapping=entries)
    return ids


def is_look_up(command: list[bytes]) -> bool:
    return command[:2] == [b"EVALSHA", SCRIPTS["look_up"].sha.encode()]


def ids(command: list[bytes]) -> list[bytes]:
    """The ids that a call of `ended` or `look_up` asks about."""
    args = command[3 + int(command[2]) + 1 :]
    return args if is_look_up(command) else args[::2]


async def gone(job_id: str, queue: Queue, redis: Any) -> bool:
    return not await redis.hexists(queue.to_key("jobs"), job_id)


async def counts(queue: Queue, redis: Any, kind: str, count: int) -> bool:
    """Whether a set has `count` ids."""
    found: int = await redis.scard(queue.to_key(kind))
    return found == count


async def add_to(redis: Any, queue: Queue, kind: str, *ids: str) -> None:
    key = queue.to_key(kind)
    if kind in ("waiting", "active"):
        await redis.rpush(key, *ids)
    elif kind == "delayed":
        await redis.zadd(key, dict.fromkeys(ids, FAR))
    else:
        await redis.sadd(key, *ids)


async def places(queue: Queue, redis: Any) -> dict[str, set[str]]:
    """Which ids some key holds, and which key; sets list an id once."""
    found: dict[str, set[str]] = {}
    for kind in KINDS:
        key = queue.to_key(kind)
        if kind in ("waiting", "active"):
            ids = await redis.lrange(key, 0, -1)
            assert len(ids) == len(set(ids))
        else:
            ids = await (redis.zrange(key, 0, -1) if kind == "delayed" else redis.smembers(key))
        for job_id in ids:
            found.setdefault(job_id, set()).add(kind)
    return found
