"""Jobs before they run: options, data, `save` and `save_all`, and which arguments each refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from beequeue import BeeQueueError, CommandError, ConnectionLost, Job, JobFailed, OperationTimedOut, OutcomeUnknown, QueueClosed
from beequeue.job import now_ms
from beequeue.producer import saver as saving_module
from beequeue.producer.saver import JOBS_A_CALL
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import Spoken, assert_says, keys, nested
from tests.relay import Line, Relay

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])

LONE_SURROGATE = "\ud800"
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


# --- a fresh job -------------------------------------------------------------------------------------------------------


async def test_a_fresh_job(make_queue: MakeQueue, redis: Any) -> None:
    """J-02, J-03: It has no id, data {} and two options; Redis does not know it."""
    queue = await make_queue(is_worker=False).ready()
    before = now_ms()
    job = queue.create_job()
    assert before <= job.options["timestamp"] <= now_ms()
    assert (job.id, job.data, job.status, job.progress) == (None, {}, "created", 0)
    assert list(job.options) == ["timestamp", "stacktraces"]
    assert job.options["stacktraces"] == []
    assert job.queue is queue
    assert queue.jobs == {}
    assert await keys(queue, redis) == set()


async def test_setters(make_queue: MakeQueue) -> None:
    """J-04, J-05, J-10, J-13, J-14: Each returns the job. The options stand in the order of the calls."""
    queue = make_queue(is_worker=False)
    queue.backoff_strategies["own"] = lambda job: 1
    job = queue.create_job({})
    assert "retries" not in job.options
    assert job.timeout(5000) is job
    assert job.set_id(7) is job
    assert job.retries(2) is job
    assert job.backoff("own", timedelta(seconds=2)) is job
    assert job.delay_until(now_ms() + 60_000) is job
    assert job.retries(0) is job
    assert job.id == "7"
    assert list(job.options) == ["timestamp", "stacktraces", "timeout", "retries", "backoff", "delay"]
    assert job.options["timeout"] == 5000
    assert job.options["retries"] == 0
    assert job.options["backoff"] == {"strategy": "own", "delay": 2000}
    assert job.timeout(timedelta(minutes=1)).options["timeout"] == 60_000
    assert job.timeout(0).options["timeout"] == 0
    assert job.retries(2).options["retries"] == 2
    assert job.backoff("immediate").options["backoff"] == {"strategy": "immediate"}
    assert job.backoff("immediate", 0).options["backoff"] == {"strategy": "immediate", "delay": 0}


@pytest.mark.parametrize("as_datetime", [False, True], ids=["epoch ms", "datetime"])
async def test_delay_until(make_queue: MakeQueue, as_datetime: bool) -> None:
    """J-07, J-08, J-09, QK-55: A future time becomes an int of epoch ms; now or a past time removes the delay."""
    job = make_queue(is_worker=False).create_job({})
    due = now_ms() + 60_000
    job.delay_until(datetime.fromtimestamp(due / 1000, UTC) if as_datetime else due)
    assert job.options["delay"] == due
    assert type(job.options["delay"]) is int
    job.delay_until(datetime.now(UTC) if as_datetime else time.time() * 1000)
    assert "delay" not in job.options
    job.delay_until(due)
    job.delay_until(now_ms())
    assert "delay" not in job.options
    job.delay_until(due)
    job.delay_until(datetime(1970, 1, 1, tzinfo=UTC) if as_datetime else 0)
    assert "delay" not in job.options


@pytest.mark.parametrize(
    ("setter", "args", "error", "message"),
    [
        ("retries", (-1,), ValueError, "Retries cannot be negative"),
        ("retries", (math.inf,), TypeError, "retries must be an int, not inf"),
        ("retries", (math.nan,), TypeError, "retries must be an int, not nan"),
        ("retries", ("2",), TypeError, "retries must be an int, not '2'"),
        ("retries", (True,), TypeError, "retries must be an int, not True"),
        ("retries", (None,), TypeError, "retries must be an int, not None"),
        ("timeout", (-1,), ValueError, "Timeout cannot be negative"),
        ("timeout", (timedelta(seconds=-1),), ValueError, "Timeout cannot be negative"),
        ("timeout", (2**53,), ValueError, "timeout must be less than 2* not 9007199254740992"),
        ("timeout", (10**5000,), ValueError, "timeout must be less than 2* not an int of 16610 bits"),
        ("timeout", (math.inf,), TypeError, "timeout must be an int of milliseconds or a timedelta, not inf"),
        ("timeout", (math.nan,), TypeError, "timeout must be an int of milliseconds or a timedelta, not nan"),
        ("timeout", ("5",), TypeError, "timeout must be an int of milliseconds or a timedelta, not '5'"),
        ("timeout", (1.5,), TypeError, "timeout must be an int of milliseconds or a timedelta, not 1.5"),
        ("timeout", (True,), TypeError, "timeout must be an int of milliseconds or a timedelta, not True"),
        ("backoff", ("wow", 100), ValueError, "unknown strategy"),
        ("backoff", ("wow", -100), ValueError, "unknown strategy"),
        ("backoff", (None, 100), ValueError, "unknown strategy"),
        ("backoff", ("fixed",), ValueError, "delay must be a positive integer"),
        ("backoff", ("fixed", 0), ValueError, "delay must be a positive integer"),
        ("backoff", ("fixed", -100), ValueError, "delay must be a positive integer"),
        ("backoff", ("exponential", 44.5), ValueError, "delay must be a positive integer"),
        ("backoff", ("exponential", "100"), ValueError, "delay must be a positive integer"),
        ("backoff", ("own", True), ValueError, "delay must be a positive integer"),
        ("backoff", ("own",), ValueError, "delay must be a positive integer"),
        ("backoff", ("immediate", -1), ValueError, "delay must be a positive integer"),
        ("delay_until", (None,), ValueError, "invalid delay timestamp: None is *"),
        ("delay_until", (10**5000,), ValueError, "invalid delay timestamp: an int of 16610 bits is *"),
        ("delay_until", ("wobble",), ValueError, "invalid delay timestamp: 'wobble' is *"),
        ("delay_until", ("12",), ValueError, "invalid delay timestamp: '12' is *"),
        ("delay_until", (True,), ValueError, "invalid delay timestamp: True is *"),
        ("delay_until", (-1,), ValueError, "invalid delay timestamp: -1 is *"),
        ("delay_until", (math.nan,), ValueError, "invalid delay timestamp: nan is *"),
        ("delay_until", (math.inf,), ValueError, "invalid delay timestamp: inf is *"),
        ("delay_until", (2**53,), ValueError, "invalid delay timestamp: 9007199254740992 is *"),
        ("delay_until", (datetime(2100, 1, 1),), ValueError, "invalid delay timestamp: datetime.datetime(2100* time zone"),
        ("delay_until", (datetime(1969, 1, 1, tzinfo=UTC),), ValueError, "invalid delay timestamp: -*"),
        ("set_id", ("",), ValueError, "a job id must not be empty"),
        ("set_id", (None,), TypeError, "a job id must be a string or an int, not None"),
        ("set_id", (True,), TypeError, "a job id must be a string or an int, not True"),
        ("set_id", (1.5,), TypeError, "a job id must be a string or an int, not 1.5"),
        ("set_id", (b"x",), TypeError, "a job id must be a string or an int, not b'x'"),
        ("set_id", (LONE_SURROGATE,), ValueError, "a job id must be text that UTF-8 can carry, not '\\ud800'"),
    ],
)
async def test_setters_refuse(
    make_queue: MakeQueue, setter: str, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """J-06, J-07, J-11, J-12, QK-44, QK-55: They raise at once, in one line, and leave the job as it was."""
    queue = make_queue(is_worker=False)
    queue.backoff_strategies["own"] = lambda job: 1
    job = queue.create_job({}).retries(1).delay_until(now_ms() + 60_000)
    before = dict(job.options)
    with pytest.raises(error) as refused:
        getattr(job, setter)(*args)
    assert type(refused.value) is error
    start, star, end = message.partition("*")
    said = str(refused.value)
    assert said == message or (star and said.startswith(start) and said.endswith(end))
    assert "\n" not in said
    assert (job.id, job.options) == (None, before)


async def test_a_strategy_that_is_no_name_is_refused(make_queue: MakeQueue) -> None:
    """J-12: Also one that cannot be looked up."""
    with pytest.raises(ValueError, match="^unknown strategy$"):
        make_queue(is_worker=False).create_job({}).backoff(["fixed"], 100)  # type: ignore[arg-type]


# --- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(0, id="0"),
        pytest.param("", id="empty text"),
        pytest.param(False, id="False"),
        pytest.param([], id="empty list"),
        pytest.param({"ü 😀": [1, -2.5, None, True, {}, "\x00\n"]}, id="unicode"),
        pytest.param(["x" * 2**20], id="1 MB"),
        pytest.param(nested(500), id="500 deep"),
        pytest.param({LONE_SURROGATE: LONE_SURROGATE}, id="lone surrogates"),
        pytest.param({"id": 2**63, "low": -(2**63)}, id="64 bits"),
    ],
)
@both_orderings
async def test_data_comes_back_equal(make_queue: MakeQueue, ordered: bool, data: Any) -> None:
    """J-01, J-15, QK-53: From the entry, in the handler, and as its result."""
    queue = make_queue(ordered_events=ordered)
    handled: list[Any] = []

    async def handler(job: Job) -> Any:
        handled.append(job.data)
        return job.data

    job = queue.create_job(data)
    job.options["test"] = data
    assert await job.save() is job
    stored = await Job.from_id(queue, "1")
    assert stored is not None
    queue.process(handler)
    received = [stored.data, stored.options["test"], await job.result(), *handled]
    equal = [each == data for each in received]  # pytest cannot show all of them
    assert equal == [True] * 4
    assert {type(each) for each in received} == {type(data)}
    assert list(stored.options) == ["timestamp", "stacktraces", "test"]
    assert stored.options["timestamp"] == job.options["timestamp"]


@pytest.mark.parametrize("entry", ['{"data":null,"options":{}}', '{"options":{}}', '{"data":{}}', "{}"])
async def test_an_entry_that_lacks_members_is_completed(make_queue: MakeQueue, redis: Any, entry: str) -> None:
    """J-17, QK-53: With data {}, the present time as timestamp, and no stack traces."""
    queue = make_queue(is_worker=False)
    await redis.hset(queue.to_key("jobs"), "old", entry)
    before = now_ms()
    job = await queue.get_job("old")
    assert job is not None
    assert (job.id, job.data, job.status, job.progress) == ("old", {}, "created", 0)
    assert before <= job.options["timestamp"] <= now_ms()
    assert job.options["stacktraces"] == []


UNSERIALISABLE = [
    pytest.param(object(), "Type is not JSON serializable: object", id="object"),
    pytest.param({"a": {1, 2}}, "Type is not JSON serializable: set", id="set"),
    pytest.param(b"x", "Type is not JSON serializable: bytes", id="bytes"),
    pytest.param({1: 2}, "Dict key must be str", id="int as key"),
    pytest.param(2**64, "Integer exceeds 64-bit range", id="big int"),
    pytest.param({"a": CIRCLE}, "JSON cannot carry it: Circular reference detected", id="circle"),
    pytest.param(nested(100_000), "JSON cannot carry it: maximum recursion depth exceeded*", id="100,000 deep"),
]


@pytest.mark.parametrize(("data", "message"), UNSERIALISABLE)
async def test_data_that_json_cannot_carry(make_queue: MakeQueue, redis: Any, data: Any, message: str) -> None:
    """S-11, QK-54: Awaiting save raises, in one line. Nothing is sent, and the job may be saved later."""
    queue = await make_queue(is_worker=False).ready()
    job = queue.create_job(data)
    saving = job.save()
    with pytest.raises(TypeError) as refused:
        await saving
    assert_says(refused.value, message)
    assert (job.id, queue.jobs) == (None, {})
    assert await keys(queue, redis) == set()
    job.data = "good"
    assert (await job.save()).id == "1"


@pytest.mark.parametrize(("data", "message"), UNSERIALISABLE)
async def test_save_all_of_data_that_json_cannot_carry(make_queue: MakeQueue, data: Any, message: str) -> None:
    """S-13, S-14, QK-54: Each such job has its own error; the others are saved."""
    queue = make_queue(is_worker=False)
    jobs = [queue.create_job(each) for each in (1, data, 2, data)]
    errors = await queue.save_all(jobs)
    assert list(errors) == [jobs[1], jobs[3]]
    for error in errors.values():
        assert type(error) is TypeError
        assert_says(error, message)
    assert [job.id for job in jobs] == ["1", None, "2", None]
    assert [job.data for job in await queue.get_jobs("waiting")] == [2, 1]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *[("id", b"x"), ("id", 1.5), ("id", LONE_SURROGATE), ("delay", {}), ("delay", "soon"), ("delay", True)],
        *[("delay", math.nan), ("delay", -1), ("delay", 2**53)],
    ],
    ids=ascii,
)
async def test_what_was_put_into_a_job_by_hand(make_queue: MakeQueue, redis: Any, member: str, value: Any) -> None:
    """It is checked too.

    save names it and sends nothing, save_all returns it as that job's error, and the job may be saved later.
    """
    queue = await make_queue(is_worker=False).ready()
    job, other = queue.create_job({}), queue.create_job({})
    if member == "id":
        job.id = value
    else:
        job.options[member] = value
    with pytest.raises((TypeError, ValueError)) as refused:
        await job.save()
    assert_says(refused.value, "*")
    assert member in str(refused.value)
    assert repr(value) in str(refused.value)
    assert await keys(queue, redis) == set()
    errors = await queue.save_all([other, job])
    assert {each: str(error) for each, error in errors.items()} == {job: str(refused.value)}
    assert other.id == "1"
    assert await keys(queue, redis) == {"id", "jobs", "waiting"}
    job.id, job.options["delay"] = None, None
    assert (await job.save()).id == "2"


@pytest.mark.parametrize("delay", [0, 0.5, 2**53 - 1])
async def test_a_delay_that_was_put_in_by_hand(make_queue: MakeQueue, redis: Any, delay: float) -> None:
    """It may be any time that a double can hold."""
    queue = make_queue(is_worker=False)
    job = queue.create_job({})
    job.options["delay"] = delay
    await job.save()
    assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == [("1", delay)]


async def test_an_id_that_was_put_in_as_an_int(make_queue: MakeQueue) -> None:
    """QK-41: It becomes text all the same."""
    queue = make_queue(is_worker=False)
    job = queue.create_job({})
    job.id = 7  # type: ignore[assignment]
    await job.save()
    assert job.id == "7"
    assert queue.jobs == {"7": job}


# --- options at work ---------------------------------------------------------------------------------------------------


async def test_a_handler_may_change_options(make_queue: MakeQueue) -> None:
    """J-18, J-05: The last value that the handler set decides whether the job is tried again, and is stored."""
    queue = make_queue()

    async def handler(job: Job) -> str:
        if job.data == "once" and "retries" not in job.options:
            job.retries(3).timeout(60_000).options["mine"] = 1
        elif job.data == "no more":
            job.retries(0).backoff("fixed", 5)
        else:
            return "again"
        raise ValueError("no")

    runs, failed = await queue.create_job("once").save(), await queue.create_job("no more").retries(5).save()
    queue.process(handler)
    assert await runs.result() == "again"
    with pytest.raises(JobFailed, match="^no$"):
        await failed.result()
    stored = [await Job.from_id(queue, job_id) for job_id in ("1", "2")]
    options = [job.options for job in stored if job is not None]
    assert (options[0]["retries"], options[0]["timeout"], options[0]["mine"]) == (2, 60_000, 1)
    assert (options[1]["retries"], options[1]["backoff"]) == (0, {"strategy": "fixed", "delay": 5})
    assert [len(each["stacktraces"]) for each in options] == [1, 1]


async def test_the_producers_retries(make_queue: MakeQueue, redis: Any) -> None:
    """QK-43: It is a number after each `retrying`, and never below 0."""
    queue = make_queue(is_worker=False)
    none, two = await queue.create_job({}).save(), await queue.create_job({}).retries(2).save()
    left: list[Any] = []
    retrying = Seen()
    for job in (none, two):
        job.on("retrying", lambda error, job=job: left.append((job.id, job.options["retries"])))
        job.on("retrying", retrying)
    for job_id in ("1", "2", "2", "2"):
        await redis.publish(queue.to_key("events"), f'{{"id":"{job_id}","event":"retrying","data":"again"}}')
    await retrying.reaches(4)
    assert left == [("1", 0), ("2", 1), ("2", 0), ("2", 0)]


# --- save --------------------------------------------------------------------------------------------------------------


@both_orderings
@pytest.mark.parametrize("delayed", [False, True], ids=["now", "later"])
async def test_a_save_is_one_command(make_queue: MakeQueue, url: str, redis: Any, ordered: bool, delayed: bool) -> None:
    """S-01, S-03, S-04, J-16: It is one script, on the event connection of an ordered queue.

    The entry is what to_data returns.
    """
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        spoken = Spoken(relay)
        job = queue.create_job({"b": 1, "a": 2}).retries(1)
        due = now_ms() + 60_000
        if delayed:
            job.delay_until(due)
        assert await job.save() is job
        assert job.id == "1"
        assert spoken.names == [("event" if ordered else "command", "add_delayed_job" if delayed else "add_job")]
        assert await redis.hgetall(queue.to_key("jobs")) == {"1": job.to_data()}
        assert job.to_data() == json.dumps(
            {"data": {"b": 1, "a": 2}, "options": job.options, "status": "created", "progress": 0}, separators=(",", ":")
        )
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ([] if delayed else ["1"])
        assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == ([("1", due)] if delayed else [])
        await queue.close()


@both_orderings
async def test_a_job_is_taken_as_it_is_when_save_is_called(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """S-11: With its entry, id and time, even if the queue is not ready yet."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job = queue.create_job("early")
    saving = asyncio.ensure_future(job.save())
    await asyncio.sleep(0)
    job.data = "late"
    job.set_id("late").delay_until(now_ms() + 60_000)
    await saving
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
    entry = json.loads(await redis.hget(queue.to_key("jobs"), "1"))
    assert entry["data"] == "early"
    assert "delay" not in entry["options"]
    assert await redis.exists(queue.to_key("delayed")) == 0


async def test_what_was_saved_is_kept(make_queue: MakeQueue) -> None:
    """S-09, SJ-01, SJ-02: Under its id, with store_jobs."""
    keeping = make_queue(is_worker=False)
    forgetful = make_queue(is_worker=False, store_jobs=False)
    job, delayed = keeping.create_job({}).set_id("own"), keeping.create_job({}).delay_until(now_ms() + 60_000)
    await asyncio.gather(job.save(), delayed.save(), *(forgetful.create_job({}).save() for _ in range(3)))
    assert {job_id: kept.id for job_id, kept in keeping.jobs.items()} == {"own": "own", delayed.id: delayed.id}
    assert keeping.jobs["own"] is job
    assert forgetful.jobs == {}


@both_orderings
@pytest.mark.parametrize(
    "job_id", [" ", "a b\r\n", "ü😀", "x" * 2**20, "5", 7, -1, "\udc80"], ids=lambda job_id: ascii(job_id)[:12]
)
async def test_an_id_of_ones_own(make_queue: MakeQueue, redis: Any, ordered: bool, job_id: str | int) -> None:
    """J-14, S-05, P-02: Any text, unchanged. Its events find the job; the counter stays as it is."""
    queue = make_queue(ordered_events=ordered)
    handled: list[str | None] = []
    job = await queue.create_job("x").set_id(job_id).save()
    assert job.id == str(job_id)
    assert queue.jobs == {str(job_id): job}
    queue.process(lambda job: handled.append(job.id))
    assert await job.result() is None
    assert handled == [str(job_id)]
    (listed,) = await queue.get_jobs("succeeded")
    assert (listed.id, listed.data) == (str(job_id), "x")
    assert await redis.exists(queue.to_key("id")) == 0


async def test_an_id_in_use(make_queue: MakeQueue, redis: Any) -> None:
    """S-06, S-07: Nothing is written, delayed or not. job.id becomes None, and the first job stays bound."""
    queue = make_queue(is_worker=False)
    due = now_ms() + 60_000
    first = await queue.create_job("first").set_id("own").delay_until(due).save()
    second, third = queue.create_job("second").set_id("own").delay_until(due + 1), queue.create_job("third").set_id("own")
    assert await second.save() is second
    assert await third.save() is third
    assert (second.id, third.id) == (None, None)
    assert queue.jobs == {"own": first}
    assert await redis.hgetall(queue.to_key("jobs")) == {"own": first.to_data()}
    assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == [("own", due)]
    assert await redis.exists(queue.to_key("waiting"), queue.to_key("id")) == 0


@both_orderings
@pytest.mark.parametrize("in_bulk", [False, True], ids=["save", "save_all"])
async def test_saving_a_saved_job(make_queue: MakeQueue, redis: Any, ordered: bool, in_bulk: bool) -> None:
    """QK-50: It writes nothing, and the job keeps its id. A job whose entry is gone is stored again under that id."""
    queue = make_queue(ordered_events=ordered)
    job = await queue.create_job("first").save()

    async def save() -> None:
        if in_bulk:
            assert await queue.save_all([job]) == {}
        else:
            assert await job.save() is job

    entry = await redis.hget(queue.to_key("jobs"), "1")
    job.data = "changed"
    await save()
    assert job.id == "1"
    assert queue.jobs == {"1": job}
    assert await redis.hgetall(queue.to_key("jobs")) == {"1": entry}
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
    await queue.remove_job("1")
    await save()
    assert job.id == "1"
    assert await redis.hgetall(queue.to_key("jobs")) == {"1": job.to_data()}
    queue.process(echo)
    assert await job.result() == "changed"
    await save()
    assert job.id == "1"
    assert queue.jobs == {}
    assert await job.result() == "changed"
    assert await redis.exists(queue.to_key("waiting")) == 0


@both_orderings
async def test_a_saved_job_does_not_take_over_another_ones_id(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """S-06: Whether save refuses at once, or learns it from Redis."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    other = await queue.create_job("other").set_id("other").save()
    job = await queue.create_job("mine").save()
    with contextlib.suppress(BeeQueueError):
        await job.set_id("other").save()
    assert job.id != "other"
    assert queue.jobs["other"] is other
    assert await redis.hget(queue.to_key("jobs"), "other") == other.to_data()


@both_orderings
async def test_two_saves_at_once(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """The second raises and changes nothing. After the first has ended, the job may be saved again."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    job = queue.create_job({})
    first, second, third = await asyncio.gather(job.save(), job.save(), queue.save_all([job]), return_exceptions=True)
    assert first is job
    assert type(second) is BeeQueueError
    assert str(second) == "<Job None created> is being saved already"
    assert isinstance(third, dict)
    assert str(third[job]) == "<Job None created> is being saved already"
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
    assert (await job.save()).id == "1"


@pytest.mark.parametrize("delayed", [False, True])
async def test_a_save_beside_save_all(make_queue: MakeQueue, redis: Any, delayed: bool) -> None:
    """Each job is stored once, also the first one of a call that has not left yet."""
    queue = await make_queue(is_worker=False).ready()
    jobs = [queue.create_job(number) for number in range(3 * JOBS_A_CALL)]
    if delayed:
        jobs[JOBS_A_CALL].delay_until(now_ms() + 60_000)

    async def save(job: Job) -> bool:
        with contextlib.suppress(BeeQueueError):
            await job.save()
            return True
        return False

    together = asyncio.ensure_future(queue.save_all(jobs))
    alone = await asyncio.gather(*map(save, jobs))
    errors = await together
    assert {job for job, is_saved in zip(jobs, alone, strict=True) if is_saved} == {*errors}
    assert await redis.hlen(queue.to_key("jobs")) == len(jobs)


async def test_a_save_that_was_cancelled_leaves_a_usable_job(make_queue: MakeQueue, redis: Any) -> None:
    queue = make_queue(is_worker=False)
    job = queue.create_job({})
    saving = asyncio.ensure_future(job.save())
    await asyncio.sleep(0)
    saving.cancel()
    await queue.ready()
    assert (await job.save()).id == "1"
    job = queue.create_job({}).set_id("own")
    saving = asyncio.ensure_future(job.save())
    await asyncio.sleep(0)
    saving.cancel()
    await until(lambda: redis.hexists(queue.to_key("jobs"), "own"))
    await until(lambda: queue.jobs.get("own") is job)
    assert (await job.save()).id == "own"


@both_orderings
async def test_an_id_is_free_again_when_its_job_was_removed_at_its_end(make_queue: MakeQueue, ordered: bool) -> None:
    """S-08: After success and after failure; it is then used once more."""
    queue = make_queue(ordered_events=ordered, remove_on_success=True, remove_on_failure=True)

    gate = asyncio.Event()

    async def handler(job: Job) -> Any:
        await gate.wait()
        if job.data == "bad":
            raise ValueError("bad")
        return job.data

    queue.process(handler)
    for data in ("one", "bad", "two"):
        gate.clear()
        job = await queue.create_job(data).set_id("own").save()
        assert job.id == "own"
        gate.set()
        if data == "bad":
            with pytest.raises(JobFailed, match="^bad$"):
                await job.result()
        else:
            assert await job.result() == data
        assert await Job.from_id(queue, "own") is None


async def test_a_delayed_save_sets_the_queues_own_timer(make_queue: MakeQueue, redis: Any) -> None:
    """S-10: Even without a message, since another job is due before. Not when the id was in use."""
    queue = await make_queue(activate_delayed_jobs=True).ready()
    looked, raised = Seen(), Seen()
    queue.on("raised jobs", raised)
    await queue.create_job({}).set_id("own").delay_until(now_ms() + 50).save()
    await raised.reaches(1)
    await redis.zadd(queue.to_key("delayed"), {"unheard of": 5})
    await queue.create_job({}).set_id("own").delay_until(now_ms() + 20).save()
    job = await queue.create_job({}).delay_until(now_ms() + 300).save()
    queue.process(looked)
    await job.result()
    assert raised.calls == [(1,), (2,)]


# --- save_all ----------------------------------------------------------------------------------------------------------


@both_orderings
async def test_save_all_needs_one_round_trip(make_queue: MakeQueue, url: str, redis: Any, ordered: bool) -> None:
    """S-12, S-13, S-18: All calls leave before any reply has come, many jobs in a call.

    Delayed jobs and used ids are treated as by save.
    """
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered).ready()
        await queue.create_job("first").set_id("used").save()
        due = now_ms() + 60_000
        jobs = [queue.create_job(number) for number in range(20)]
        delayed = queue.create_job("delayed").delay_until(due)
        own, used = queue.create_job("own").set_id("own"), queue.create_job("used").set_id("used")
        spoken = Spoken(relay)
        relay.hold("event" if ordered else "command")
        saving = asyncio.ensure_future(queue.save_all(job for job in [*jobs, delayed, own, used, jobs[0]]))
        await until(lambda: len(spoken.names) == 3)
        assert not saving.done()
        relay.release("event" if ordered else "command")
        assert await saving == {}
        assert [job.id for job in [*jobs, delayed, own, used]] == [*map(str, range(1, 22)), "own", None]
        assert spoken.names == [
            ("event" if ordered else "command", name) for name in ["add_jobs", "add_delayed_job", "add_jobs"]
        ]
        assert await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True) == [("21", due)]
        waiting = ["own", *map(str, range(20, 0, -1)), "used"]
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == waiting
        assert sorted(queue.jobs) == sorted({*waiting, "21"})
        assert queue.jobs["own"] is own
        await queue.close()


async def test_save_all_bounds_each_call(make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by size: Redis serves no other client while a script runs. A large job has a call to itself."""
    monkeypatch.setattr(saving_module, "JOBS_A_CALL", 3)
    monkeypatch.setattr(saving_module, "BYTES_A_CALL", 2_000)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        sizes = [10] * 7 + [800, 800, 800] + [5_000] + [10]
        jobs = [queue.create_job("x" * size) for size in sizes]
        assert await queue.save_all(jobs) == {}
        assert [job.id for job in jobs] == [str(number) for number in range(1, 13)]
        assert [name for _, name in spoken.names] == ["add_jobs"] * 3 + ["add_job"] * 3
        await queue.close()


async def test_the_size_of_a_call_is_exact(make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that fill the limit leave together; one byte more starts a new call, and so does a delayed job."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()

        def create(text: str) -> Job:
            job = queue.create_job(text)
            job.options["timestamp"] = 1
            return job

        monkeypatch.setattr(saving_module, "BYTES_A_CALL", 2 * len(create("x").encode()))
        spoken = Spoken(relay)
        now, later = "xx", create("x").delay_until(now_ms() + 60_000)
        jobs = [create(text) for text in (*now, *now)]
        assert await queue.save_all([*jobs, later, *(create(text) for text in (*now, "x", "xx"))]) == {}
        assert [name for _, name in spoken.names] == [
            *["add_jobs", "add_jobs", "add_delayed_job"],
            *["add_jobs", "add_job", "add_job"],
        ]
        await queue.close()


async def test_a_job_saved_meanwhile_does_not_count_for_a_call(
    make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one call leaves, other code saves the first job of the next call."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        jobs = [queue.create_job("x") for _ in range(5)]
        for job in jobs:
            job.options["timestamp"] = 1
        monkeypatch.setattr(saving_module, "BYTES_A_CALL", 2 * len(jobs[0].encode()))
        spoken = Spoken(relay)
        together, alone = asyncio.ensure_future(queue.save_all(jobs)), asyncio.ensure_future(jobs[2].save())
        assert list(await together) == [jobs[2]]
        await alone
        assert sorted(name for _, name in spoken.names) == ["add_job", "add_jobs", "add_jobs"]
        await queue.close()


@pytest.mark.parametrize(("delayed", "steps"), [(False, [2, 4, 5]), (True, [5])], ids=["now", "later"])
async def test_calls_of_save_all_let_others_have_their_turn(
    make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch, delayed: bool, steps: list[int]
) -> None:
    """After each call of several jobs: it leaves while the next one is encoded."""
    monkeypatch.setattr(saving_module, "JOBS_A_CALL", 2)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        relay.hold("event")
        jobs = [queue.create_job(number) for number in range(5)]
        if delayed:
            for job in jobs:
                job.delay_until(now_ms() + 60_000)
        saving = asyncio.ensure_future(queue.save_all(jobs))
        seen = [0]
        while seen[-1] < 5:
            await asyncio.sleep(0)
            seen.append(sum(job.saving for job in jobs))
        assert [*dict.fromkeys(seen)] == [0, *steps]
        relay.release("event")
        assert await saving == {}
        await queue.close()


async def test_save_all_without_time_is_sent(make_queue: MakeQueue, url: str) -> None:
    """It is sent, and not waited for."""
    async with Relay(url) as relay, make_queue(redis=relay.url, is_worker=False) as queue:
        relay.hold("event")
        job = queue.create_job({})
        errors = await queue._saver.save_all([job], 0)
        assert [isinstance(error, ConnectionLost) and error.maybe_applied for error in errors.values()] == [True]
        relay.release("event")
        await until(lambda: job.id == "1")


async def test_save_all_of_many(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More jobs than leave at once are stored in order."""
    monkeypatch.setattr(saving_module, "JOBS_IN_FLIGHT", 7)
    queue = make_queue(is_worker=False)
    jobs = [queue.create_job(number) for number in range(30)]
    assert await queue.save_all(iter(jobs)) == {}
    assert [job.id for job in jobs] == [str(number) for number in range(1, 31)]
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == [str(number) for number in range(30, 0, -1)]


async def test_save_all_of_nothing(make_queue: MakeQueue) -> None:
    """S-17"""
    queue = make_queue(is_worker=False)
    assert await queue.save_all([]) == {}
    assert await queue.save_all(iter(())) == {}


@both_orderings
async def test_a_save_that_redis_refuses(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """S-15: It is that job's error alone, and the job may be saved later."""
    queue = make_queue(is_worker=False, ordered_events=ordered)
    await redis.set(queue.to_key("id"), "no number")
    jobs = [queue.create_job({}).set_id("a"), queue.create_job({}), queue.create_job({}).set_id("b")]
    errors = await queue.save_all(jobs)
    assert list(errors) == [jobs[1]]
    assert isinstance(errors[jobs[1]], CommandError)
    assert "not an integer" in str(errors[jobs[1]])
    assert [job.id for job in jobs] == ["a", None, "b"]
    assert sorted(queue.jobs) == ["a", "b"]
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["b", "a"]
    with pytest.raises(CommandError, match="not an integer"):
        await jobs[1].save()
    await redis.delete(queue.to_key("id"))
    assert (await jobs[1].save()).id == "1"


@both_orderings
async def test_a_connection_lost_under_save_all(
    make_queue: MakeQueue, url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """S-16, S-13: Each job without an answer has its own error. The jobs before and after it are saved."""
    monkeypatch.setattr(saving_module, "JOBS_IN_FLIGHT", 3)
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, is_worker=False, ordered_events=ordered, reconnect=lambda attempt: 10)
        await queue.ready()

        def cut(line: Line, data: bytes) -> None:
            if b"the 4th" in data:
                line.cut()

        relay.said_on = cut
        jobs = [queue.create_job(f"the {number}th").set_id(f"own {number}") for number in range(1, 10)]
        errors = await queue.save_all(jobs)
        assert list(errors) == jobs[3:6]
        assert len(set(map(id, errors.values()))) == 3
        for error in errors.values():
            assert isinstance(error, ConnectionLost)
            assert error.maybe_applied
        assert sorted(queue.jobs) == [job.id for job in jobs if job not in errors]
        relay.said_on = lambda line, data: None
        assert await queue.save_all(errors) == {}
        assert await redis.llen(queue.to_key("waiting")) == 9
        await queue.close()
    assert len(make_queue.claim(ConnectionLost)) == 1


async def test_save_all_on_a_closed_queue(make_queue: MakeQueue, redis: Any) -> None:
    """S-19: It raises, and changes no job."""
    queue = await make_queue(is_worker=False).ready()
    await queue.close()
    job = queue.create_job({}).set_id("own")
    before = dict(job.options)
    for jobs in ([job], []):
        with pytest.raises(QueueClosed, match="^closed$"):
            await queue.save_all(jobs)
    with pytest.raises(QueueClosed, match="^closed$"):
        await job.save()
    assert (job.id, job.options, queue.jobs) == ("own", before, {})
    assert await keys(queue, redis) == set()


async def test_a_queue_that_closes_under_save_all(make_queue: MakeQueue, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S-16, S-13: Once a job is sent it never raises. Each job that was not sent has `QueueClosed` as its error."""
    monkeypatch.setattr(saving_module, "JOBS_IN_FLIGHT", 3)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        spoken = Spoken(relay)
        relay.hold("event")
        jobs = [queue.create_job(number) for number in range(6)]
        saving = asyncio.ensure_future(queue.save_all(jobs))
        await until(lambda: spoken.names == [("event", "add_jobs")])
        make_queue.queues.remove(queue)
        with pytest.raises(OperationTimedOut):
            await queue.close(10)
        errors = await saving
        assert list(errors) == jobs
        for job in jobs[:3]:
            assert isinstance(error := errors[job], ConnectionLost)
            assert error.maybe_applied
        for job in jobs[3:]:
            assert isinstance(errors[job], QueueClosed)


@pytest.mark.parametrize("foreign", ["of another queue", "of another queue of this name"])
async def test_save_all_refuses_jobs_of_another_queue(make_queue: MakeQueue, redis: Any, name: str, foreign: str) -> None:
    """QK-57: It raises before anything is sent."""
    queue = await make_queue(is_worker=False).ready()
    other = await make_queue(f"{name}-other" if foreign == "of another queue" else name, is_worker=False).ready()
    own, strange = queue.create_job({}), other.create_job({}).set_id("strange")
    with pytest.raises(ValueError, match="^save_all takes jobs of its own queue, and <Job strange created> is of another one$"):
        await queue.save_all([own, strange])
    assert own.id is None
    assert await keys(queue, redis) | await keys(other, redis) == set()
    assert (await own.save()).id == "1"


@pytest.mark.parametrize("wrong", [None, "a", 5, {}, [], {"data": 1}], ids=repr)
async def test_save_all_refuses_what_is_no_job(make_queue: MakeQueue, redis: Any, wrong: Any) -> None:
    """It names the argument before anything is sent."""
    queue = await make_queue(is_worker=False).ready()
    job = queue.create_job({})
    with pytest.raises(TypeError) as refused:
        await queue.save_all([job, wrong])
    assert str(refused.value) == f"save_all takes jobs, not {wrong!r}"
    assert job.id is None
    assert await keys(queue, redis) == set()


async def test_the_older_job_of_an_id_that_is_given_anew(make_queue: MakeQueue, redis: Any) -> None:
    """QK-71, DE-06: destroy leaves the queue's job objects as they are.

    A new job with an older one's id ends the older one's wait.
    """
    queue = make_queue(is_worker=False)
    older = await queue.create_job("older").save()
    waiting = asyncio.ensure_future(older.result())
    assert await queue.destroy() == 3
    assert queue.jobs == {"1": older}
    assert not waiting.done()
    newer = await queue.create_job("newer").save()
    assert newer.id == "1"
    assert queue.jobs == {"1": newer}
    with pytest.raises(OutcomeUnknown, match="^job 1: its id has been given to another job$"):
        await waiting
    worker = make_queue(get_events=False)
    worker.process(echo)
    assert await newer.result() == "newer"
    with pytest.raises(OutcomeUnknown):
        await older.result()
