"""The jobs that wait for their own events: bindings and look-ups. No Redis: each test gives the answers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from beequeue import Job, QueueSettings, UnreadableData
from beequeue.events import encode_event
from beequeue.producer.guard import LARGE_BYTES
from beequeue.producer.tracker import SWEEP_PAUSE_S, Tracker
from beequeue.store.store import Found


class Host:
    """The inside of a queue that nobody listens to, except for one event."""

    def __init__(self, listens_to: str = "", **settings: Any) -> None:
        self.settings = QueueSettings(**settings)
        self.errors: list[Exception] = []
        self.emitted: list[tuple[Any, ...]] = []
        self._listened_to = listens_to

    def emit(self, *event: Any) -> bool:
        self.emitted.append(event)
        return True

    def listens_to(self, event: str) -> bool:
        return event == self._listened_to

    def report(self, error: Exception) -> None:
        self.errors.append(error)


class Store:
    """Answers the tracker's questions: only the jobs `ended` have ended."""

    def __init__(self, *ended: str) -> None:
        self.looked_up: list[str] = []
        self._ended = {*ended}

    async def look_up(self, job_ids: Any) -> list[Found]:
        self.looked_up += job_ids
        return [Found("gone" if job_id in self._ended else "open", "", "") for job_id in job_ids]

    async def ended(self, jobs: Any) -> set[str]:
        return {job_id for job_id, _ in jobs} & self._ended


def make_tracker(host: Host | None = None, *ended: str, **settings: Any) -> Tracker:
    return Tracker(cast(Any, host or Host(**settings)), cast(Any, Store(*ended)))


def bound(tracker: Tracker, *job_ids: str) -> list[Job]:
    jobs = [Job(cast(Any, None), job_id=job_id) for job_id in job_ids]
    for job in jobs:
        tracker.bind(job)
    return jobs


class Heard(list[str]):
    """The names of a job's own events."""

    def __init__(self, job: Job) -> None:
        for name in ("progress", "retrying", "succeeded", "failed", "unknown"):
            job.on(name, lambda data, name=name: self.append(name))


async def deliver(tracker: Tracker, *names: str) -> None:
    """Lets a tracker read events of the job 1, and deliver them."""
    for name in names:
        tracker.read(encode_event("1", name))
    tracker.hand_on()
    await asyncio.sleep(0)


# --- bindings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_bound_job_hears_its_events_until_it_has_ended(ordered: bool) -> None:
    subject = make_tracker(ordered_events=ordered)
    await deliver(subject, "succeeded")  # no job is bound: the event is lost
    [job] = bound(subject, "1")
    heard = Heard(job)
    subject.bind(job)
    await deliver(subject, "progress", "retrying", "succeeded")
    await deliver(subject, "succeeded")
    assert heard == ["progress", "retrying", "succeeded"]
    assert subject.jobs == {}
    await subject.stop_looking()


async def test_a_job_whose_id_is_given_to_another_job_ends() -> None:
    subject = make_tracker(ordered_events=False)
    [older] = bound(subject, "1")
    older_heard = Heard(older)
    [newer] = bound(subject, "1")
    newer_heard = Heard(newer)
    await deliver(subject, "failed")
    assert (older_heard, newer_heard) == (["unknown"], ["failed"])
    assert subject.unknown_outcomes == 1


async def test_an_event_that_was_read_before_a_binding_belongs_to_the_job_before() -> None:
    subject = make_tracker()
    [before] = bound(subject, "1")
    before_heard = Heard(before)
    subject.read(encode_event("1", "failed"))
    [after] = bound(subject, "1")
    after_heard = Heard(after)
    await deliver(subject)
    assert (before_heard, after_heard) == (["failed"], [])
    assert subject.jobs == {"1": after}
    await subject.stop_looking()


async def test_a_job_that_its_own_listener_binds_anew_stays() -> None:
    subject = make_tracker(ordered_events=False)
    [job] = bound(subject, "1")
    job.on("failed", lambda error: subject.bind(job))
    await deliver(subject, "failed")
    assert subject.jobs == {"1": job}


@pytest.mark.parametrize("settings", [{"store_jobs": False}, {"get_events": False}])
async def test_a_queue_that_hears_of_no_end_binds_nothing(settings: Any) -> None:
    subject = make_tracker(**settings)
    [job] = bound(subject, "1")
    assert subject.jobs == {}
    assert job.bound == 0


async def test_a_job_is_unbound_and_no_other() -> None:
    subject = make_tracker(ordered_events=False)
    older, newer = bound(subject, "1", "1")
    subject.unbind(older, "1")
    assert subject.jobs.get("1") is newer
    subject.unbind(newer, "1")
    assert "1" not in subject.jobs


# --- look-ups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_id", "event", "looked_up"), [("1", "succeeded", ["1"]), ("1", "progress", []), ("2", "succeeded", [])]
)
async def test_only_an_end_that_is_too_large_has_its_job_looked_up(job_id: str, event: str, looked_up: list[str]) -> None:
    host = Host("job " + event, ordered_events=False, max_event_bytes=LARGE_BYTES)
    subject = make_tracker(host)
    bound(subject, "1")
    subject.read(encode_event(job_id, event, "x" * LARGE_BYTES))
    if subject._looking_at_large is not None:
        await subject._looking_at_large
    assert cast(Any, subject._store).looked_up == looked_up
    assert [type(error) for error in host.errors] == [UnreadableData]
    await subject.stop_looking()


async def test_nothing_is_looked_up_after_stop_looking() -> None:
    """neither for a large message, nor for an awaited result, nor for a bound job"""
    subject = make_tracker(max_event_bytes=LARGE_BYTES)
    await subject.stop_looking()
    [job] = bound(subject, "1")
    subject.read(encode_event("1", "succeeded", "x" * LARGE_BYTES))
    awaiting = asyncio.ensure_future(subject.end_of(job))
    await asyncio.sleep(0)
    assert (subject._looking, subject._looking_at_large, subject._sweeping) == (None, None, None)
    subject.close()
    assert (await awaiting).name == "closed"
    subject._guard.complaints.close()


@pytest.mark.parametrize(("ended", "rests"), [((), True), (("1",), True), (("1", "2"), False), (("1", "2", "3"), False)])
async def test_a_sweep_rests_unless_most_of_its_jobs_have_ended(ended: tuple[str, ...], rests: bool) -> None:
    subject = make_tracker(None, *ended, ordered_events=False)
    bound(subject, "1", "2", "3")
    rest_s = await subject._let_go(["1", "2", "3", "4"])
    assert (SWEEP_PAUSE_S <= rest_s < 0.9) if rests else rest_s == 0
    assert {*subject.jobs} == {"1", "2", "3"} - {*ended}
    assert await subject._let_go([*ended, "4"]) == 0


async def test_a_half_is_not_most() -> None:
    subject = make_tracker(None, "1", ordered_events=False)
    bound(subject, "1", "2")
    assert await subject._let_go(["1", "2"]) >= SWEEP_PAUSE_S
