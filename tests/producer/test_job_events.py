"""Events of jobs, on the worker and over Redis: who receives which, when, in which order; progress; failing listeners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis as sync_redis

from beequeue import BeeQueueError, Job, JobFailed, ListenerFailed, UnreadableData
from tests.conftest import MakeQueue, Seen, until

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])

LOCAL = ("succeeded", "retrying", "failed", "failed:fatal")
REMOTE = ("succeeded", "retrying", "failed", "progress")


async def work(job: Job) -> Any:
    """A handler; the job's data says how it ends."""
    order = job.data if isinstance(job.data, dict) else {}
    for value in order.get("report", []):
        await job.report_progress(value)
    if len(job.options["stacktraces"]) < order.get("fail", 0):
        raise ValueError(f"attempt {len(job.options['stacktraces']) + 1}")
    return order.get("return")


# --- on the worker -------------------------------------------------------------------------------------------------------


async def test_the_order_of_local_events(make_queue: MakeQueue) -> None:
    """EV-01, EV-02, EV-03, EV-04, QK-47: `failed` comes for each attempt, `failed:fatal` only for the last one."""
    worker = make_queue()
    log: list[tuple[Any, ...]] = []
    outcomes: list[Any] = []

    def note(event: str) -> Callable[[Job, Any], None]:
        def listen(job: Job, outcome: Any) -> None:
            newest = job.options["stacktraces"][0].splitlines()[-1]
            log.append((event, job.data["return"], job.status, job.options["retries"], newest, str(outcome)))
            outcomes.append(outcome)

        return listen

    for event in LOCAL:
        worker.on(event, note(event))
    for order in ({"return": "bad", "fail": 2}, {"return": "good", "fail": 1}):
        await worker.create_job(order).retries(1).save()
    worker.process(work)
    await until(lambda: len(log) == 7)
    first, second = ("ValueError: attempt 1", "attempt 1"), ("ValueError: attempt 2", "attempt 2")
    assert log == [
        ("retrying", "bad", "retrying", 0, *first),
        ("failed", "bad", "retrying", 0, *first),
        ("retrying", "good", "retrying", 0, *first),
        ("failed", "good", "retrying", 0, *first),
        ("failed", "bad", "failed", 0, *second),
        ("failed:fatal", "bad", "failed", 0, *second),
        ("succeeded", "good", "succeeded", 0, first[0], "good"),
    ]
    assert outcomes[0] is outcomes[1]
    assert outcomes[4] is outcomes[5]
    assert all(isinstance(outcome, ValueError) for outcome in outcomes[:6])


async def test_local_events_come_after_redis_was_told(make_queue: MakeQueue) -> None:
    """EV-05, P-01: A listener finds the new state in Redis in the step in which it is called."""
    worker = make_queue()
    found = Seen()
    with sync_redis.Redis.from_url(make_queue.url, decode_responses=True) as client:

        def note(event: str) -> Callable[[Job, Any], None]:
            def listen(job: Job, outcome: Any) -> None:
                assert job.id is not None
                status = json.loads(str(client.hget(worker.to_key("jobs"), job.id)))["status"]
                places = [key for key in ("succeeded", "failed") if client.sismember(worker.to_key(key), job.id)]
                waits = job.id in client.lrange(worker.to_key("waiting"), 0, -1)
                runs = job.id in client.lrange(worker.to_key("active"), 0, -1)
                found(event, job.id, status, places, waits, runs)

            return listen

        for event in LOCAL:
            worker.on(event, note(event))
        await worker.create_job({"return": "x"}).save()
        await worker.create_job({"fail": 2}).retries(1).save()
        worker.process(work)
        await found.reaches(5)
    assert found.calls == [
        ("succeeded", "1", "succeeded", ["succeeded"], False, False),
        ("retrying", "2", "retrying", [], True, False),
        ("failed", "2", "retrying", [], True, False),
        ("failed", "2", "failed", ["failed"], False, False),
        ("failed:fatal", "2", "failed", ["failed"], False, False),
    ]


@pytest.mark.parametrize("get_events", [True, False])
@pytest.mark.parametrize("send_events", [True, False])
async def test_local_events_need_no_flags(make_queue: MakeQueue, redis: Any, get_events: bool, send_events: bool) -> None:
    """EV-06, EV-25, EV-26, PS-02: Published events need both flags. A queue that receives none does not subscribe."""
    worker = make_queue(get_events=get_events, send_events=send_events)
    log = Seen()
    for event in LOCAL:
        worker.on(event, lambda job, outcome, event=event: log(event, job.id))
        worker.on(f"job {event}", lambda job_id, outcome, event=event: log(f"job {event}", job_id))
    good = worker.create_job({"return": 1})
    good.on("succeeded", lambda result: log("own succeeded", good.id))
    await good.save()
    await worker.create_job({"fail": 2}).retries(1).save()
    worker.process(work)
    both = get_events and send_events
    assert await redis.pubsub_numsub(worker.to_key("events")) == [(worker.to_key("events"), get_events)]
    await log.reaches(9 if both else 5)
    local = [("succeeded", "1"), ("retrying", "2"), ("failed", "2"), ("failed", "2"), ("failed:fatal", "2")]
    published = [("job succeeded", "1"), ("own succeeded", "1"), ("job retrying", "2"), ("job failed", "2")]
    is_local = {*LOCAL}
    assert [call for call in log.calls if call[0] in is_local] == local
    assert [call for call in log.calls if call[0] not in is_local] == (published if both else [])


async def test_what_other_events_of_a_queue_carry(make_queue: MakeQueue, redis: Any) -> None:
    """EV-08, DL-02: `ready` carries nothing, `error` the error, `raised jobs` the count, only on the queue that raised them."""
    activator = make_queue(activate_delayed_jobs=True, is_worker=False)
    other = make_queue(is_worker=False, get_events=False)
    log, elsewhere = Seen(), Seen()
    for event in ("ready", "error", "raised jobs"):
        activator.on(event, lambda *args, event=event: log(event, *args))
    other.on("raised jobs", elsewhere)
    await activator.ready()
    await log.reaches(1)
    await redis.publish(activator.to_key("events"), "garbage")
    await log.reaches(2)
    await redis.zadd(activator.to_key("delayed"), {"a": 1, "b": 2, "c": 3})
    await redis.publish(activator.to_key("earlierDelayed"), "1")
    await log.reaches(3)
    (error,) = make_queue.claim(UnreadableData)
    assert log.calls == [("ready",), ("error", error), ("raised jobs", 3)]
    assert elsewhere.calls == []


async def test_a_jobs_own_events_come_from_messages_only(make_queue: MakeQueue, redis: Any) -> None:
    """EV-09: Also on the worker that runs the job: the handler's object receives none."""
    queue = make_queue(send_events=False)
    own, of_handler, local = Seen(), Seen(), Seen()

    async def handler(job: Job) -> str:
        for event in REMOTE:
            job.on(event, of_handler)
        return "local"

    job = queue.create_job({})
    for event in REMOTE:
        job.on(event, own)
    queue.on("succeeded", lambda job, result: local(result))
    await job.save()
    queue.process(handler)
    assert await local.reaches(1) == [("local",)]
    await redis.publish(queue.to_key("events"), '{"id":"1","event":"succeeded","data":"published"}')
    assert await own.reaches(1) == [("published",)]
    assert of_handler.calls == []


# --- published -----------------------------------------------------------------------------------------------------------


@both_orderings
async def test_what_each_outcome_tells_a_producer(make_queue: MakeQueue, ordered: bool) -> None:
    """EV-20, EV-21, EV-22, EV-24, EV-27, EV-28, EV-31, EV-32, EV-33: The same on every queue."""
    producer = make_queue(is_worker=False, ordered_events=ordered)
    onlooker = await make_queue(is_worker=False, ordered_events=ordered).ready()
    worker = make_queue(get_events=False)
    of_jobs, of_producer, of_onlooker, local = Seen(), Seen(), Seen(), Seen()
    for event in REMOTE:
        producer.on(f"job {event}", lambda job_id, value, event=event: of_producer(event, job_id, value))
        onlooker.on(f"job {event}", lambda job_id, value, event=event: of_onlooker(event, job_id, value))
    orders = [{"return": "barbar"}, {}, {"fail": 2}, {"fail": 1, "return": {"ü": 1}}, {"return": 0}]
    jobs = [producer.create_job(order) for order in orders]
    for job in jobs:
        if job.data.get("fail"):
            job.retries(1)
        for event in REMOTE:
            job.on(event, lambda value, event=event, job=job: of_jobs(event, job.id, value))
        await job.save()
    worker.on("retrying", lambda job, error: local(str(error)))
    worker.process(work)
    expected = [
        ("succeeded", "1", "barbar"),
        ("succeeded", "2", None),
        ("retrying", "3", "attempt 1"),
        ("retrying", "4", "attempt 1"),
        ("succeeded", "5", 0),
        ("failed", "3", "attempt 2"),
        ("succeeded", "4", {"ü": 1}),
    ]
    for seen in (of_jobs, of_producer, of_onlooker):
        calls = await seen.reaches(7)
        assert [(*call[:2], str(call[2]) if isinstance(call[2], JobFailed) else call[2]) for call in calls] == expected
    for own, of_queue in zip(of_jobs.calls, of_producer.calls, strict=True):
        assert own[2] is of_queue[2]
    assert [job.options.get("retries") for job in jobs] == [None, None, 0, 0, None]
    assert {job.status for job in jobs} == {"created"}
    assert producer.jobs == onlooker.jobs == {}


@both_orderings
async def test_the_order_within_one_message(make_queue: MakeQueue, ordered: bool) -> None:
    """EV-23, EV-24, EV-30, EV-31, PR-05: First the queue's event, then the bookkeeping, then the job's own event; then the
    job is unbound.
    """
    queue = make_queue(ordered_events=ordered)
    log: list[Any] = []
    job = queue.create_job({"report": [20], "fail": 1, "return": "end"}).retries(1)

    def note(whose: str, event: str) -> Callable[..., None]:
        def listen(*args: Any) -> None:
            log.append((whose, event, job.progress, job.options["retries"], job.status, queue.jobs == {"1": job}))

        return listen

    for event in REMOTE:
        queue.on(f"job {event}", note("queue", event))
        job.on(event, note("job", event))
    await job.save()
    queue.process(work)
    assert await job.result() == "end"
    await until(lambda: queue.jobs == {})
    assert log == [
        ("queue", "progress", 0, 1, "created", True),
        ("job", "progress", 20, 1, "created", True),
        ("queue", "retrying", 20, 1, "created", True),
        ("job", "retrying", 20, 0, "created", True),
        ("queue", "progress", 20, 0, "created", True),
        ("job", "progress", 20, 0, "created", True),
        ("queue", "succeeded", 20, 0, "created", True),
        ("job", "succeeded", 20, 0, "created", True),
    ]
    assert job.status == "created"


@both_orderings
async def test_which_objects_hear_of_their_job(make_queue: MakeQueue, ordered: bool) -> None:
    """EV-29: Jobs that were saved, or fetched by get_job.

    Not those of get_jobs or from_id, nor those of a queue without get_events.
    """
    saver = make_queue(is_worker=False, ordered_events=ordered)
    fetcher = make_queue(is_worker=False, ordered_events=ordered)
    lister = await make_queue(is_worker=False, ordered_events=ordered).ready()
    deaf = make_queue(is_worker=False, get_events=False)
    heard, others_heard = Seen(), Seen()
    saved = await saver.create_job({"return": "x"}).save()
    fetched = await fetcher.get_job("1")
    listed = await lister.get_jobs("waiting")
    objects = {"saved": saved, "fetched": fetched, "listed": listed[0], "read": await Job.from_id(lister, "1")}
    objects["deaf"] = await deaf.get_job("1")
    for whose, job in objects.items():
        assert job is not None
        job.on("succeeded", lambda result, whose=whose: heard(whose, result))
    lister.on("job succeeded", others_heard)
    worker = make_queue(get_events=False)
    worker.process(work)
    await heard.reaches(2)
    await others_heard.reaches(1)
    await saver.create_job({}).save()
    await others_heard.reaches(2)
    assert sorted(heard.calls) == [("fetched", "x"), ("saved", "x")]
    assert fetcher.jobs == lister.jobs == {}


async def test_listeners_hear_what_comes_later(make_queue: MakeQueue) -> None:
    """EV-34: No event is repeated for a late listener."""
    queue = make_queue()
    reported, gate, late = asyncio.Event(), asyncio.Event(), Seen()

    async def handler(job: Job) -> str:
        await job.report_progress(1)
        await gate.wait()
        await job.report_progress(2)
        return "end"

    job = queue.create_job({})
    job.on("progress", lambda value: reported.set())
    await job.save()
    queue.process(handler)
    await reported.wait()
    for event in REMOTE:
        job.on(event, lambda value, event=event: late(event, "1", value))
        queue.on(f"job {event}", lambda job_id, value, event=event: late(f"job {event}", job_id, value))
    gate.set()
    await late.reaches(4)
    job.on("succeeded", lambda value: late("too late", "1", value))
    await (await queue.create_job({}).save()).result()
    told = [("job progress", 2), ("progress", 2), ("job succeeded", "end"), ("succeeded", "end")]
    assert [(event, value) for event, job_id, value in late.calls if job_id == "1"] == told


# --- progress ------------------------------------------------------------------------------------------------------------


async def test_any_value_but_none_is_progress(make_queue: MakeQueue) -> None:
    """PR-01, PR-02, PR-07, QK-45: 0, False and "" too. A job that was not saved cannot report progress."""
    queue = make_queue(is_worker=False)
    heard = Seen()
    job = queue.create_job({})
    assert job.progress == 0
    with pytest.raises(BeeQueueError, match="^a job without an id cannot report progress: save it first$"):
        await job.report_progress(5)
    assert job.progress == 0
    job.on("progress", heard)
    await job.save()
    with pytest.raises(ValueError, match="^Progress cannot be empty$"):
        await job.report_progress(None)
    values: list[Any] = [0, False, "", 12.5, [], {"a": "value", "ü": [None]}, "text"]
    for value in values:
        await job.report_progress(value)
    calls = await heard.reaches(len(values))
    assert [json.dumps(value) for (value,) in calls] == [json.dumps(value) for value in values]
    assert job.progress == "text"


async def test_progress_tells_how_many_it_reached(make_queue: MakeQueue, redis: Any) -> None:
    """PR-03, PR-04, PR-06: From any object of a job with an id. Nothing is stored before the job ends."""
    silent = make_queue(is_worker=False, get_events=False)
    job = await silent.create_job({}).save()
    entry = await redis.hget(silent.to_key("jobs"), "1")
    assert await job.report_progress(1) == 0
    listener = await make_queue(is_worker=False).ready()
    heard = Seen()
    fetched = await listener.get_job("1")
    assert fetched is not None
    fetched.on("progress", heard)
    assert await job.report_progress(2) == 1
    assert await (await make_queue(is_worker=False).ready()).create_job({}).set_id("1").report_progress(3) == 2
    assert await heard.reaches(2) == [(2,), (3,)]
    assert (job.progress, fetched.progress) == (2, 3)
    assert await redis.hget(silent.to_key("jobs"), "1") == entry


@both_orderings
async def test_progress_is_set_before_it_is_sent_and_stored_with_the_outcome(
    make_queue: MakeQueue, redis: Any, ordered: bool
) -> None:
    """PR-04, PR-05, PR-06, EV-23, QK-46"""
    queue = make_queue(ordered_events=ordered)
    steps: list[Any] = []

    async def handler(job: Job) -> None:
        reporting = asyncio.create_task(job.report_progress({"step": 1}))
        await asyncio.sleep(0)
        steps.append(job.progress)
        await reporting
        if job.options["retries"]:
            raise ValueError

    heard = Seen()
    job = queue.create_job({}).retries(1)
    job.on("progress", lambda value: heard(value, job.progress))
    await job.save()
    queue.on("retrying", heard)
    queue.process(handler)
    await job.result()
    assert steps == [{"step": 1}] * 2
    assert [call for call in heard.calls if call[0] == {"step": 1}] == [({"step": 1}, {"step": 1})] * 2
    found = await queue.get_job("1")
    assert found is not None
    assert found.progress == {"step": 1}


# --- faults --------------------------------------------------------------------------------------------------------------


async def test_listeners_that_raise_stop_nothing(make_queue: MakeQueue) -> None:
    """QK-37, ER-03: Not the next listener, the next event of one outcome, the bookkeeping, nor the next job."""
    queue = make_queue()
    log: list[str] = []
    job = queue.create_job({"report": [20], "fail": 1, "return": "end"}).retries(1)

    def bad(*args: Any) -> None:
        raise RuntimeError("mine")

    async def bad_later(*args: Any) -> None:
        raise RuntimeError("mine, later")

    def listen(emitter: Any, event: str, whose: str) -> None:
        emitter.on(event, bad)
        emitter.on(event, bad_later)
        emitter.on(event, lambda *args: log.append(f"{whose}{event}"))

    for event in LOCAL:
        listen(queue, event, "")
    for event in REMOTE:
        listen(queue, f"job {event}", "")
        listen(job, event, "own ")
    await job.save()
    queue.process(work)
    assert await job.result() == "end"
    await until(lambda: "succeeded" in log and "own succeeded" in log)
    assert [event for event in log if " " not in event] == ["retrying", "failed", "succeeded"]
    published = ["job progress", "own progress", "job retrying", "own retrying"]
    published += ["job progress", "own progress", "job succeeded", "own succeeded"]
    assert [event for event in log if " " in event] == published
    assert (job.progress, job.options["retries"], queue.jobs) == (20, 0, {})
    await queue.create_job({"fail": 1}).save()
    await until(lambda: "failed:fatal" in log and "job failed" in log)
    await until(lambda: len(make_queue.errors) == 2 * len(log))
    failures = make_queue.claim(ListenerFailed)
    assert {str(failure.__cause__) for failure in failures} == {"mine", "mine, later"}


MESSAGES = [
    b"",
    b"not json",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"{}",
    b'{"id":"1"}',
    b'{"event":"succeeded"}',
    b'{"id":1,"event":"succeeded"}',
    b'{"id":null,"event":"progress","data":1}',
    b'{"id":"1","event":null}',
    b'{"id":"1","event":"succeeded"',
    b'\xff\xfe{"id":"1","event":"succeeded"}',
]


@both_orderings
async def test_messages_that_are_none_are_reported(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """QK-38: Each of them is, and it changes nothing."""
    queue = await make_queue(ordered_events=ordered).ready()
    heard = Seen()
    job = queue.create_job({"return": "good"})
    for event in REMOTE:
        job.on(event, heard)
        queue.on(f"job {event}", heard)
    await job.save()
    for message in MESSAGES:
        await redis.publish(queue.to_key("events"), message)
    await until(lambda: len(make_queue.errors) == len(MESSAGES))
    assert len(make_queue.claim(UnreadableData)) == len(MESSAGES)
    assert heard.calls == []
    assert queue.jobs == {"1": job}
    queue.process(work)
    assert await job.result() == "good"


async def test_messages_about_jobs_that_nobody_holds(make_queue: MakeQueue, redis: Any) -> None:
    """QK-38, EV-28: Only the queue emits them."""
    queue = await make_queue(is_worker=False).ready()
    heard = Seen()
    queue.on("job succeeded", heard)
    await redis.publish(queue.to_key("events"), '{"id":"unheard of","event":"succeeded","data":[1]}')
    assert await heard.reaches(1) == [("unheard of", [1])]
    assert queue.jobs == {}


@both_orderings
async def test_unknown_events_are_handed_on(make_queue: MakeQueue, redis: Any, ordered: bool) -> None:
    """QK-49: Also one named `error`, with and without listeners.

    None of them ends a job, and none becomes the queue's own event.
    """
    queue = await make_queue(is_worker=False, ordered_events=ordered).ready()
    of_queue, own, not_these = Seen(), Seen(), Seen()
    job = await queue.create_job({}).save()
    names = ["cheers", "error", "ready", "failed:fatal", "stalled", "__class__", ""]
    for name in names:
        await redis.publish(queue.to_key("events"), json.dumps({"id": "1", "event": name, "data": "unheard"}))
    queue.on("job progress", of_queue)
    await job.report_progress(1)
    await of_queue.reaches(1)
    for name in names:
        queue.on(f"job {name}", lambda job_id, data, name=name: of_queue(name, job_id, data))
        queue.on(name, not_these)
        job.on(name, lambda data, name=name: own(name, data))
        await redis.publish(queue.to_key("events"), json.dumps({"id": "1", "event": name, "data": [name]}))
    assert (await of_queue.reaches(1 + len(names)))[1:] == [(name, "1", [name]) for name in names]
    assert await own.reaches(len(names)) == [(name, [name]) for name in names]
    assert not_these.calls == []
    assert queue.jobs == {"1": job}
    assert (job.status, job.last_event) == ("created", None)


async def test_a_listener_of_a_jobs_event_named_error_may_fail(make_queue: MakeQueue, redis: Any) -> None:
    """QK-37, QK-49: Its failure is reported like any other."""
    queue = await make_queue(is_worker=False).ready()
    job = await queue.create_job({}).save()

    def bad(data: Any) -> None:
        raise RuntimeError("mine")

    job.on("error", bad)
    await redis.publish(queue.to_key("events"), '{"id":"1","event":"error"}')
    await until(lambda: make_queue.errors, deadline_s=2)
    (failure,) = make_queue.claim(ListenerFailed)
    assert str(failure.__cause__) == "mine"
