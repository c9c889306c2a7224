"""The jobs that wait for their own events: what binds, what is looked at, what is counted. No Redis: what it says is given."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from beequeue import Job, UnreadableData
from beequeue.events import encode_event
from beequeue.producer import tracker
from beequeue.producer.tracker import LARGE_BYTES, SWEEP_PAUSE_S, Complaints, Tracker
from beequeue.store.store import Found


class Host:
    """A queue that nobody listens to, but for one event."""

    def __init__(self, listens_to: str = "") -> None:
        self.errors: list[Exception] = []
        self.emitted: list[tuple[Any, ...]] = []
        self._listened_to = listens_to

    def emit(self, *event: Any) -> bool:
        self.emitted.append(event)
        return True

    def _listens_to(self, event: str) -> bool:
        return event == self._listened_to

    def _report(self, error: Exception) -> None:
        self.errors.append(error)


class Redis:
    """What the tracker asks, and gets."""

    def __init__(self, tracker: Tracker, *ended: str) -> None:
        self.looked_up: list[str] = []
        self._ended = {*ended}
        tracker.look_up, tracker.which_ended = self.look_up, self.which_ended

    async def look_up(self, job_ids: Any) -> list[Found]:
        self.looked_up += job_ids
        return [Found("gone" if job_id in self._ended else "open", "", "") for job_id in job_ids]

    async def which_ended(self, jobs: Any) -> set[str]:
        return {job_id for job_id, _ in jobs} & self._ended


def bound(tracker: Tracker, *job_ids: str) -> list[Job]:
    jobs = [Job(cast(Any, None), job_id=job_id) for job_id in job_ids]
    for job in jobs:
        tracker.bind(job)
    return jobs


async def test_a_job_is_unbound_and_no_other() -> None:
    subject = Tracker(cast(Any, Host()), ordered=False)
    older, newer = bound(subject, "1", "1")
    subject.unbind(older, "1")
    assert subject.jobs.get("1") is newer
    subject.unbind(newer, "1")
    assert "1" not in subject.jobs


@pytest.mark.parametrize(("beyond", "reported"), [(0, 0), (1, 1)])
async def test_the_largest_message_that_is_read(beyond: int, reported: int) -> None:
    message = encode_event("1", "progress", "x" * LARGE_BYTES)
    host = Host()
    subject = Tracker(cast(Any, host), ordered=False, max_event_bytes=len(message) - beyond)
    bound(subject, "1")
    subject.read(message)
    assert len(host.errors) == reported
    assert len(subject._read) == 1 - reported
    subject._unread.close()


@pytest.mark.parametrize(
    ("job_id", "event", "looked_up"), [("1", "succeeded", ["1"]), ("1", "progress", []), ("2", "succeeded", [])]
)
async def test_only_an_end_that_is_too_large_has_its_job_looked_up(job_id: str, event: str, looked_up: list[str]) -> None:
    host = Host("job " + event)
    subject = Tracker(cast(Any, host), ordered=False, max_event_bytes=LARGE_BYTES)
    redis = Redis(subject)
    bound(subject, "1")
    subject.read(encode_event(job_id, event, "x" * LARGE_BYTES))
    if subject._looking_at_large is not None:
        await subject._looking_at_large
    assert redis.looked_up == looked_up
    assert [type(error) for error in host.errors] == [UnreadableData]
    await subject.stop_looking()


async def test_nothing_is_looked_up_any_more() -> None:
    """behind `stop_looking`, whatever is read or awaited"""
    subject = Tracker(cast(Any, Host()), ordered=True, max_event_bytes=LARGE_BYTES)
    Redis(subject)
    await subject.stop_looking()
    [job] = bound(subject, "1")
    subject.read(encode_event("1", "succeeded", "x" * LARGE_BYTES))
    awaiting = asyncio.ensure_future(subject.end_of(job))
    await asyncio.sleep(0)
    assert (subject._looking, subject._looking_at_large, subject._sweeping) == (None, None, None)
    subject.close()
    assert (await awaiting).name == "closed"
    subject._unread.close()


@pytest.mark.parametrize(("ended", "rests"), [((), True), (("1",), True), (("1", "2"), False), (("1", "2", "3"), False)])
async def test_a_sweep_rests_unless_most_of_what_it_found_has_ended(ended: tuple[str, ...], rests: bool) -> None:
    subject = Tracker(cast(Any, Host()), ordered=False)
    Redis(subject, *ended)
    bound(subject, "1", "2", "3")
    rest_s = await subject._let_go(["1", "2", "3", "4"])
    assert (SWEEP_PAUSE_S <= rest_s < 0.9) if rests else rest_s == 0
    assert {*subject.jobs} == {"1", "2", "3"} - {*ended}
    assert await subject._let_go([*ended, "4"]) == 0


async def test_a_half_is_not_most() -> None:
    subject = Tracker(cast(Any, Host()), ordered=False)
    Redis(subject, "1")
    bound(subject, "1", "2")
    assert await subject._let_go(["1", "2"]) >= SWEEP_PAUSE_S


async def test_complaints_are_counted_anew_in_each_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "REPORTS_AT_ONCE", 2)
    errors: list[Exception] = []
    complaints = Complaints(errors.append)

    def end_period() -> None:
        assert complaints._period is not None
        complaints._period.cancel()
        complaints._end_period()

    def complain(times: int) -> list[str]:
        errors.clear()
        for number in range(times):
            complaints.add(ValueError(str(number)))
        return [str(error) for error in errors]

    assert complain(5) == ["0", "1"]
    errors.clear()
    end_period()
    assert [str(error).split(" more")[0] for error in errors] == ["3"]
    assert complain(4) == ["0"]  # the count was the first of this period
    errors.clear()
    end_period()
    assert [str(error).split(" more")[0] for error in errors] == ["3"]
    end_period()
    assert complaints._period is None
    assert complain(1) == ["0"]
    complaints.close()
