"""The jobs that a queue keeps after saving them: those whose event may still come, and no others."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

import beequeue.tasks
from beequeue import CommandError, Job, TaskFailed
from beequeue.events import encode_event
from beequeue.producer import tracker
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import Spoken
from tests.relay import Relay

both_orderings = pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])

FAR = 4_102_444_800_000
"""epoch ms of a time that does not come"""


@pytest.fixture
def sweep_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SWEEP_EVERY_S", 0.02)
    monkeypatch.setattr(tracker, "SWEEP_PAUSE_S", 0.001)


async def even_or_fail(job: Job) -> Any:
    if job.data % 2:
        raise ValueError("odd")
    return job.data


@both_orderings
async def test_a_queue_without_events_keeps_nothing(make_queue: MakeQueue, ordered: bool) -> None:
    """S-09: Saved, fetched or retried: no event would ever end the binding."""
    queue = make_queue(get_events=False, ordered_events=ordered)
    done = Seen()
    queue.on("succeeded", done)
    jobs = [queue.create_job(number) for number in range(5)]
    assert await queue.save_all(jobs) == {}
    job = await queue.create_job(5).save()
    await queue.create_job(6).save()
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, Job) and each.queue is queue and each.data == 6]
    fetched = await queue.get_job(job.id or "")
    assert fetched is not None
    assert fetched is not job
    assert queue.jobs == {}
    queue.process(echo)
    await done.reaches(7)
    assert await job.retry() == (0, 1)
    await done.reaches(8)
    assert queue.jobs == {}


@pytest.mark.usefixtures("sweep_often")
async def test_jobs_that_end_on_a_worker_without_events_are_let_go(make_queue: MakeQueue) -> None:
    """PS-02, QK-40: Although nobody awaits them. Their listeners hear how they ended."""
    queue = make_queue(is_worker=False)
    told = Seen()
    for number in range(250):
        job = queue.create_job(number)
        for event in ("succeeded", "failed", "unknown"):
            job.on(event, lambda outcome, number=number, event=event: told(number, event))
        await job.save()
    del job
    make_queue(send_events=False).process(even_or_fail, 10)
    await told.reaches(250)
    assert sorted(told.calls) == [(number, "failed" if number % 2 else "unknown") for number in range(250)]
    assert queue.jobs == {}
    assert queue.unknown_outcomes == 125


@pytest.mark.usefixtures("sweep_often")
async def test_a_job_that_ended_behind_many_that_wait_is_let_go(make_queue: MakeQueue) -> None:
    queue = make_queue(is_worker=False)
    waiting = [queue.create_job(number).delay_until(FAR) for number in range(2 * tracker.JOBS_A_LOOK_UP)]
    assert await queue.save_all(waiting) == {}
    await queue.create_job(0).save()
    make_queue(send_events=False).process(echo)
    await until(lambda: len(queue.jobs) == len(waiting))
    assert {*queue.jobs.values()} == {*waiting}


@pytest.mark.usefixtures("sweep_often")
async def test_a_job_that_has_not_ended_is_kept(make_queue: MakeQueue, url: str) -> None:
    """SJ-01: A sweep asks about it, and its own event ends it, even if only its listener refers to it."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        heard = Seen()
        spoken = Spoken(relay)
        job = queue.create_job("x")
        job.on("succeeded", heard)
        await job.save()
        del job
        await until(lambda: spoken.names.count(("event", "ended")) == 3)
        gc.collect()
        assert [*queue.jobs] == ["1"]
        assert ("event", "look_up") not in spoken.names
        make_queue(get_events=False).process(echo)
        assert await heard.reaches(1) == [("x",)]
        assert queue.unknown_outcomes == 0
        await until(lambda: "beequeue sweep" not in tasks())  # with nothing left to ask about
        await queue.create_job("y").save()
        assert "beequeue sweep" in tasks()
        await queue.close()


@pytest.mark.usefixtures("sweep_often")
async def test_an_end_that_was_read_comes_before_what_a_sweep_finds(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """QK-39: The event and the answers come in one read."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        worker, done, heard = make_queue(get_events=False), Seen(), Seen()
        worker.on("succeeded", done)
        job = queue.create_job("x")
        for event in ("succeeded", "unknown"):
            job.on(event, heard)
        spoken = Spoken(relay)
        await job.save()
        relay.hold("event")
        worker.process(echo)
        await done.reaches(1)
        await until(lambda: ("event", "ended") in spoken.names)
        await redis.ping()
        relay.release("event")
        assert await heard.reaches(1) == [("x",)]
        assert queue.unknown_outcomes == 0
        await queue.close()


@pytest.mark.usefixtures("sweep_often")
async def test_on_two_sockets_what_is_lost_stays(make_queue: MakeQueue) -> None:
    """As in bee-queue 2.0.0: this is the growth that the harness shows."""
    queue = make_queue(is_worker=False, ordered_events=False)
    worker, done = make_queue(send_events=False), Seen()
    worker.on("succeeded", done)
    await queue.create_job("x").save()
    worker.process(echo)
    await done.reaches(1)
    assert "beequeue sweep" not in tasks()
    assert [*queue.jobs] == ["1"]


@pytest.mark.usefixtures("sweep_often")
async def test_a_sweep_that_redis_refuses_goes_on(make_queue: MakeQueue, redis: Any) -> None:
    queue = make_queue(is_worker=False)
    await queue.create_job("x").save()
    await redis.rename(queue.to_key("jobs"), queue.to_key("id"))
    await redis.set(queue.to_key("jobs"), "no hash")
    await until(lambda: make_queue.errors)
    await redis.delete(queue.to_key("jobs"))
    await until(lambda: not queue.jobs)
    assert {error.code for error in make_queue.claim(CommandError)} == {"WRONGTYPE"}  # type: ignore[attr-defined]


@pytest.mark.usefixtures("sweep_often")
async def test_closing_while_a_sweep_is_under_way(make_queue: MakeQueue, url: str) -> None:
    """ER-07: It reports no `error`, and leaves no task."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        await queue.create_job({}).save()
        spoken = Spoken(relay)
        relay.hold("event")
        await until(lambda: ("event", "ended") in spoken.names)
        async with asyncio.timeout(3):
            await queue.close()


async def test_a_job_that_is_bound_while_its_queue_closes_starts_no_sweep(make_queue: MakeQueue) -> None:
    """A reply may bind a job after the look-ups have been stopped."""
    queue = await make_queue(is_worker=False).ready()
    await queue.close()
    queue._tracker.bind(queue.create_job({}).set_id("1"))
    assert "beequeue sweep" not in tasks()


async def test_a_get_job_that_is_cancelled_keeps_nothing(make_queue: MakeQueue, url: str) -> None:
    """QK-40: Although it was sent, and its reply comes."""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        job = await make_queue(is_worker=False, get_events=False).create_job({}).save()
        spoken = Spoken(relay)
        relay.hold("event")
        fetching = asyncio.create_task(queue.get_job("1"))
        await until(lambda: spoken.names == [("event", "get_job")])
        fetching.cancel()
        behind = asyncio.create_task(queue.create_job({}).set_id(job.id or "").is_in_set("waiting"))
        await until(lambda: len(spoken.names) == 2)
        relay.release("event")
        assert await behind is True
        assert queue.jobs == {}
        await queue.close()


# --- what nobody expects, in each task -----------------------------------------------------------------------------------


class Fails:
    """Replaces a look-up: raises an unexpected error once, and is the look-up from then on."""

    def __init__(self, look_up: Callable[..., Any]) -> None:
        self._look_up = look_up
        self.failed = False

    async def __call__(self, *args: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("by the test")
        return await self._look_up(*args)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.tasks, "FIRST_PAUSE_S", 0.001)


def assert_reported(make_queue: MakeQueue, task: str) -> None:
    (failure,) = make_queue.claim(TaskFailed)
    assert str(failure) == f"{task}: RuntimeError: by the test; starting again in 0.001 s"


@pytest.mark.usefixtures("sweep_often", "hurried")
async def test_a_sweep_that_fails_begins_anew(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = make_queue(is_worker=False)
    monkeypatch.setattr(queue._store, "ended", Fails(queue._store.ended))
    await queue.create_job("x").save()
    make_queue(send_events=False).process(echo)
    await until(lambda: not queue.jobs)
    assert_reported(make_queue, "sweep")


@both_orderings
@pytest.mark.usefixtures("hurried")
async def test_a_look_for_results_that_fails_begins_anew(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.02)
    queue = make_queue(is_worker=False, ordered_events=ordered)
    monkeypatch.setattr(queue._store, "look_up", Fails(queue._store.look_up))
    job = await queue.create_job("x").save()
    make_queue(send_events=False).process(echo)
    with pytest.raises(beequeue.OutcomeUnknown):
        await job.result()
    assert_reported(make_queue, "results")


@both_orderings
@pytest.mark.usefixtures("hurried")
async def test_a_look_for_large_results_that_fails_begins_anew(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    """The next message that is too large is looked up."""
    queue = await make_queue(is_worker=False, ordered_events=ordered, max_event_bytes=1_000).ready()
    monkeypatch.setattr(queue._store, "look_up", Fails(queue._store.look_up))
    job = await queue.create_job("x").save()
    await redis.lrem(queue.to_key("waiting"), 0, "1")
    await redis.sadd(queue.to_key("succeeded"), "1")
    too_large = encode_event("1", "succeeded", "x" * 100_000)
    await redis.publish(queue.to_key("events"), too_large)
    await until(lambda: any(isinstance(error, TaskFailed) for error in make_queue.errors))
    assert job.last_event is None
    await redis.publish(queue.to_key("events"), too_large)
    await until(lambda: job.last_event is not None)
    assert_reported(make_queue, "large results")
    assert len(make_queue.claim(beequeue.UnreadableData)) == 2


def tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks()]


@pytest.mark.usefixtures("sweep_often")
async def test_another_job_under_the_same_id_is_not_taken_for_it(make_queue: MakeQueue, redis: Any) -> None:
    """No listener receives the result of a job that was saved later under the same id."""
    queue, other = make_queue(is_worker=False), make_queue(is_worker=False)
    told = Seen()
    job = queue.create_job("mine").set_id("x")
    for name in ("succeeded", "unknown"):
        job.on(name, lambda data, name=name: told(name))
    await job.save()
    await other.remove_job("x")
    stranger = other.create_job("another's").set_id("x")
    stranger.options["timestamp"] += 1
    await stranger.save()
    assert await told.reaches(1) == [("unknown",)]
    make_queue(get_events=False).process(echo)
    assert await stranger.result() == "another's"
    assert told.calls == [("unknown",)]
    assert queue.jobs == {}


@pytest.mark.usefixtures("sweep_often")
@pytest.mark.parametrize("wait", [False, True], ids=["a sweep asks", "somebody waits for the result"])
async def test_what_a_look_up_found_before_a_retry_is_not_its_end(
    make_queue: MakeQueue, url: str, redis: Any, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """QK-39: Both answers come in one read; the job receives the events of the next attempt."""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.02 if wait else 60)
    monkeypatch.setattr(tracker, "SWEEP_EVERY_S", 60 if wait else 0.02)
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False).ready()
        heard, ended = Seen(), Seen()
        job = await queue.create_job(1).save()
        for event in ("succeeded", "failed", "unknown"):
            job.on(event, lambda outcome, event=event: heard(event, outcome))
        result = asyncio.ensure_future(job.result()) if wait else None
        spoken = Spoken(relay)
        hear = relay.said_on

        def hold_the_look_up(line: Any, data: bytes) -> None:
            hear(line, data)
            if spoken.names[-1] == ("event", "look_up"):
                relay.said_on = hear
                relay.hold("event")

        relay.said_on = hold_the_look_up
        await redis.lrem(queue.to_key("waiting"), 0, "1")
        await redis.sadd(queue.to_key("failed"), "1")  # on a worker that tells nobody
        await until(lambda: relay.said_on == hear)
        retrying = asyncio.ensure_future(job.retry())
        await until(lambda: redis.llen(queue.to_key("waiting")))
        relay.release("event")
        assert await retrying == (1, 1)
        worker = make_queue(get_events=False)
        worker.on("succeeded", ended)
        worker.process(echo)
        await ended.reaches(1)
        assert await (result or job.result(5000)) == 1
        assert heard.calls == [("succeeded", 1)]
        await queue.close()
