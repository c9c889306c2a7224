"""The jobs that wait for their own events: bindings and look-ups. No Redis: each test gives the answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from beequeue import CommandError, Job, QueueClosed, QueueSettings, UnreadableData
from beequeue.events import Event, encode_event
from beequeue.producer import tracker
from beequeue.producer.guard import LARGE_BYTES
from beequeue.producer.tracker import SWEEP_PAUSE_S, Tracker
from beequeue.store.store import Found
from tests.conftest import until


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
    """Answers the tracker's questions: the jobs in `states` have ended, each as told there."""

    def __init__(self, *ended: str, **states: Found) -> None:
        self.states = {job_id: Found("gone", "", "") for job_id in ended} | states
        self.looked_up: list[list[str]] = []
        self.asked: list[list[tuple[str, str]]] = []
        self.before_answer: Callable[[], None] = lambda: None

    async def look_up(self, job_ids: Any) -> list[Found]:
        self.looked_up.append(list(job_ids))
        self.before_answer()
        return [self.states.get(job_id, Found("open", "", "")) for job_id in job_ids]

    async def ended(self, jobs: Any) -> set[str]:
        self.asked.append(list(jobs))
        return {job_id for job_id, _ in jobs} & {*self.states}


def make_tracker(host: Host | None = None, *ended: str, store: Store | None = None, **settings: Any) -> Tracker:
    return Tracker(cast(Any, host or Host(**settings)), cast(Any, store or Store(*ended)))


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


async def test_an_end_that_was_read_before_a_retry_does_not_end_the_job() -> None:
    """Its listeners hear it."""
    subject = make_tracker()
    [job] = bound(subject, "1")
    heard = Heard(job)
    subject.read(encode_event("1", "failed"))
    subject.bind(job)
    await deliver(subject)
    assert (heard, subject.jobs, job.last_event) == (["failed"], {"1": job}, None)
    await deliver(subject, "succeeded")
    assert (heard, subject.jobs) == (["failed", "succeeded"], {})
    await subject.stop_looking()


async def test_a_message_that_cannot_be_read_is_reported() -> None:
    host = Host()
    subject = make_tracker(host)
    subject.read(b"{")
    await deliver(subject, "progress")
    (error,) = host.errors
    assert isinstance(error, UnreadableData)
    assert error.__traceback__ is None
    assert [event[0] for event in host.emitted] == ["job progress"]
    period = subject._guard.complaints._period
    assert period is not None
    await subject.stop_looking()
    assert period.cancelled()


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
    assert [*itertools.chain(*cast(Any, subject._store).looked_up)] == looked_up
    assert [type(error) for error in host.errors] == [UnreadableData]
    await subject.stop_looking()


@pytest.mark.parametrize(("size", "decoded"), [(LARGE_BYTES - 1, True), (LARGE_BYTES, False)])
async def test_the_guard_sees_large_messages(size: int, decoded: bool) -> None:
    """It keeps those that concern nobody from being decoded."""
    subject = make_tracker()
    message = encode_event("1", "progress", "x" * (size - len(encode_event("1", "progress", ""))))
    assert len(message) == size
    subject.read(message)
    assert bool(subject._read) is decoded


async def test_a_retry_is_told_to_every_look_up_under_way() -> None:
    """One ends before the other; what each was asked is kept as long as it lasts."""
    store = Store("1", "2")
    subject = make_tracker(store=store, ordered_events=False)
    first, second = bound(subject, "1", "2")
    answered = asyncio.Event()
    look_up = store.look_up

    async def late(job_ids: Any) -> list[Found]:
        await answered.wait()
        return await look_up(job_ids)

    slow = asyncio.create_task(subject.end_unseen(late))
    await asyncio.sleep(0)
    store.states.pop("2")
    await subject.end_unseen(store.look_up)
    assert (first.last_event is None, second.last_event) == (False, None)
    store.states["2"] = Found("gone", "", "")
    subject.retried("2")
    answered.set()
    await slow
    assert (second.last_event, subject.jobs, subject._asked) == (None, {"2": second}, [])


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


# --- ends without an event -----------------------------------------------------------------------------------------------


def ends(job: Job) -> str:
    """How a job has ended, in one line."""
    assert job.last_event is not None
    assert job.last_event.id == "1"
    return f"{job.last_event.name}: {job.last_event.data!r}"


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (Found("failed", "7", "Error: why\n    at there"), "failed: JobFailed('Error: why')"),
        (Found("failed", "7", "Traceback (most recent call last):\n  File\nError: why\n"), "failed: JobFailed('Error: why')"),
        (Found("failed", "", ""), "failed: JobFailed('')"),
        (
            Found("succeeded", "7", ""),
            "unknown: OutcomeUnknown('job 1: it succeeded, but no event brought its result, and results are not stored')",
        ),
        (Found("gone", "", ""), "unknown: OutcomeUnknown('job 1: it is gone, and no event reported its end')"),
        # another job has the id by now
        (Found("open", "8", ""), "unknown: OutcomeUnknown('job 1: it is gone, and no event reported its end')"),
        (Found("failed", "8", "Error"), "unknown: OutcomeUnknown('job 1: it is gone, and no event reported its end')"),
        (Found("succeeded", "8", ""), "unknown: OutcomeUnknown('job 1: it is gone, and no event reported its end')"),
    ],
)
async def test_after_a_reconnect_a_job_ends_as_redis_tells(found: Found, end: str) -> None:
    store = Store()
    subject = make_tracker(store=store, ordered_events=False)
    store.states["1"] = found
    job, other = Job(cast(Any, None), job_id="1", options={"timestamp": 7}), Job(cast(Any, None), job_id="2")
    subject.bind(job)
    subject.bind(other)
    await subject.end_unseen(store.look_up)
    assert ends(job) == end
    assert subject.jobs == {"2": other}
    assert subject.unknown_outcomes == end.startswith("unknown")


@pytest.mark.parametrize("found", [Found("open", "7", ""), Found("open", "", "")])
async def test_a_job_that_has_not_ended_stays_bound(found: Found) -> None:
    store = Store()
    subject = make_tracker(store=store, ordered_events=False)
    store.states["1"] = found
    job = Job(cast(Any, None), job_id="1", options={"timestamp": 7})
    subject.bind(job)
    await subject.end_unseen(store.look_up)
    assert (subject.jobs, job.last_event) == ({"1": job}, None)


@pytest.mark.parametrize(("count", "calls"), [(100, [100]), (101, [100, 1]), (250, [100, 100, 50])])
async def test_one_call_asks_about_a_hundred_jobs(count: int, calls: list[int]) -> None:
    job_ids = [*map(str, range(count))]
    store = Store(*job_ids)
    subject = make_tracker(store=store, ordered_events=False)
    bound(subject, *job_ids)
    await subject.end_unseen(store.look_up)
    assert [len(ids) for ids in store.looked_up] == calls
    assert [*itertools.chain(*store.looked_up)] == job_ids
    assert subject.jobs == {}
    assert subject.unknown_outcomes == count


async def test_an_answer_ends_no_job_that_has_gone_on_meanwhile() -> None:
    """One was retried, the end of one was read, and one has ended; progress alone is no end."""
    store = Store("retried", "read", "ended", "told")
    subject = make_tracker(store=store, ordered_events=False)
    retried, read, ended, told = bound(subject, "retried", "read", "ended", "told")

    def meanwhile() -> None:
        subject.retried("retried")
        subject.read(encode_event("read", "failed"))
        subject.read(encode_event("told", "progress"))
        ended.end(Event("ended", "succeeded", None))

    store.before_answer = meanwhile
    await subject.end_unseen(store.look_up)
    assert [job.last_event is None for job in (retried, read, ended, told)] == [True, True, False, False]
    assert told.last_event is not None
    assert told.last_event.name == "unknown"
    assert {*subject.jobs} == {"retried", "read", "ended"}
    assert subject._asked == []
    # a later look-up believes what it finds again
    store.before_answer = lambda: None
    await subject.end_unseen(store.look_up)
    assert {*subject.jobs} == {"read", "ended"}


async def test_a_job_is_forgotten_in_a_later_step_unless_its_end_was_read() -> None:
    subject = make_tracker(ordered_events=False)
    removed, ending = bound(subject, "1", "2")
    subject.read(encode_event("2", "succeeded", 5))
    for job_id in ("1", "2", "3"):
        subject.forget(job_id, "it was removed")
    assert subject.jobs == {"2": ending}
    assert removed.last_event is None
    await deliver(subject)
    assert ends(removed) == "unknown: OutcomeUnknown('job 1: it was removed')"
    assert ending.last_event == Event("2", "succeeded", 5)
    assert subject.jobs == {}


async def test_a_listener_that_ends_the_program_takes_no_event_from_the_others() -> None:
    host = Host(ordered_events=False)
    subject = make_tracker(host)
    [job] = bound(subject, "1")
    heard = Heard(job)

    class Stop(BaseException):
        pass

    def stop(*event: Any) -> bool:
        host.emit = heard_of  # type: ignore[method-assign]
        subject.read(encode_event("2", "progress"))
        subject.read(encode_event("2", "retrying"))
        raise Stop

    heard_of, host.emit = host.emit, stop  # type: ignore[method-assign]
    for name in ("progress", "retrying", "succeeded"):
        subject.read(encode_event("1", name))
    with pytest.raises(Stop):
        subject._deliver()
    await asyncio.sleep(0)
    assert heard == ["retrying", "succeeded"]
    emitted = [("job retrying", "1"), ("job succeeded", "1"), ("job progress", "2"), ("job retrying", "2")]
    assert [event[:2] for event in host.emitted] == emitted
    assert subject._read == []


# --- results -------------------------------------------------------------------------------------------------------------


async def test_several_await_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one that gives up ends the looks; a job that has ended is not asked about."""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.001)
    store = Store()
    subject = make_tracker(store=store, ordered_events=False)
    [job] = bound(subject, "1")
    first, second = (asyncio.create_task(subject.end_of(job)) for _ in range(2))
    await until(lambda: len(store.asked) > 2)
    first.cancel()
    await asyncio.wait((first,))
    assert job.ended is not None
    await deliver(subject, "succeeded")
    assert (await second).name == "succeeded"
    assert (await subject.end_of(job)).name == "succeeded"
    assert job.ended is None
    assert subject._awaited == {}
    assert subject._looking is not None
    await asyncio.wait_for(subject._looking, 5)
    assert [[job_id for job_id, _ in asked] for asked in store.asked] == [["1"]] * len(store.asked)
    assert store.looked_up == []


@pytest.mark.parametrize("ordered", [True, False])
async def test_on_two_sockets_only_the_second_look_is_believed(monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.001)
    store = Store("1")
    subject = make_tracker(store=store, ordered_events=ordered)
    [job] = bound(subject, "1")
    assert (await subject.end_of(job)).name == "unknown"
    assert len(store.looked_up) == (1 if ordered else 2)
    await subject.stop_looking()


async def test_a_look_that_fails_is_reported_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """for results and for messages that are too large"""
    monkeypatch.setattr(tracker, "LOOK_EVERY_S", 0.001)
    host, store = Host(ordered_events=False, max_event_bytes=LARGE_BYTES), Store("1", "2")
    subject = make_tracker(host, store=store)
    failures: list[Exception] = [CommandError("BUSY now")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    store.before_answer = fail
    [job, large] = bound(subject, "1", "2")
    assert (await subject.end_of(job)).name == "unknown"
    assert [str(error) for error in host.errors] == ["BUSY now"]
    failures.append(CommandError("BUSY again"))
    too_large = encode_event("2", "succeeded", "x" * LARGE_BYTES)
    subject.read(too_large)
    await until(lambda: not failures)
    assert large.last_event is None
    subject.read(too_large)
    await until(lambda: large.last_event)
    assert [str(error) for error in host.errors if not isinstance(error, UnreadableData)] == ["BUSY now", "BUSY again"]
    await subject.stop_looking()


def test_redis_is_asked_as_often_as_the_documentation_promises() -> None:
    """Each call of a sweep is followed by a rest, so that sweeps take no more than a tenth of Redis's time."""
    assert (tracker.LOOK_EVERY_S, tracker.SWEEP_EVERY_S, tracker.SWEEP_PAUSE_S) == (5, 5, 0.02)


# --- sweeps --------------------------------------------------------------------------------------------------------------


async def test_a_sweep_lasts_as_long_as_any_job_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """and the next job that is bound starts another one; each asks by id and time of creation"""
    monkeypatch.setattr(tracker, "SWEEP_EVERY_S", 0.001)
    store = Store()
    subject = make_tracker(store=store)
    for job_id in ("1", "2"):
        assert subject._sweeping is None or subject._sweeping.done()
        job = Job(cast(Any, None), job_id=job_id, options={"timestamp": 1_700_000_000_000})
        subject.bind(job)
        sweeping = subject._sweeping
        assert sweeping is not None
        store.asked.clear()
        await until(lambda: len(store.asked) > 1)
        assert store.asked[0] == [(job_id, "1700000000000")]
        store.states[job_id] = Found("gone", "", "")
        await asyncio.wait_for(sweeping, 5)
        assert subject.jobs == {}
    await subject.stop_looking()


async def test_a_sweep_asks_about_a_hundred_jobs_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SWEEP_EVERY_S", 0.001)
    job_ids = [*map(str, range(101))]
    store = Store(*job_ids)
    subject = make_tracker(store=store)
    bound(subject, job_ids[0])
    sweeping = subject._sweeping
    assert sweeping is not None
    bound(subject, *job_ids[1:])
    assert subject._sweeping is sweeping
    await asyncio.wait_for(sweeping, 5)
    assert [len(jobs) for jobs in store.asked] == [100, 1]
    assert subject.jobs == {}


async def test_a_sweep_that_is_refused_is_reported_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SWEEP_EVERY_S", 0.001)
    host, store = Host(), Store("1")
    subject = make_tracker(host, store=store)
    failures = [CommandError("BUSY now")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    store.before_answer = fail
    bound(subject, "1")
    assert subject._sweeping is not None
    await asyncio.wait_for(subject._sweeping, 5)
    assert [str(error) for error in host.errors] == ["BUSY now"]
    assert subject.jobs == {}


async def test_a_sweep_leaves_a_job_that_was_bound_in_the_place_of_another() -> None:
    store = Store("1")
    subject = make_tracker(store=store, ordered_events=False)
    [older] = bound(subject, "1")
    newer = Job(cast(Any, None), job_id="1")

    def meanwhile() -> None:
        subject.unbind(older, "1")
        subject.bind(newer)

    store.before_answer = meanwhile
    await subject._let_go(["1"])
    assert (older.last_event, newer.last_event) == (None, None)
    assert subject.jobs == {"1": newer}


async def test_a_sweep_rests_nine_times_as_long_as_a_call_took() -> None:
    store = Store()
    subject = make_tracker(store=store, ordered_events=False)
    bound(subject, "1")
    loop = asyncio.get_running_loop()
    times = [10.0, 11.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", lambda: times.pop(0))
        assert await subject._let_go(["1"]) == 9


# --- closing -------------------------------------------------------------------------------------------------------------


async def test_closing_ends_every_wait() -> None:
    """of jobs that are bound, or awaited; an end that was heard stays"""
    subject = make_tracker(ordered_events=False)
    waiting, idle, ended = bound(subject, "1", "2", "3")
    unbound = Job(cast(Any, None))
    ended.end(Event("3", "failed", None))
    waits = [asyncio.create_task(subject.end_of(job)) for job in (waiting, unbound)]
    await asyncio.sleep(0)
    await subject.stop_looking()
    assert subject._looking is not None
    assert subject._looking.cancelled()
    subject.close()
    assert [((await wait).id, (await wait).name) for wait in waits] == [("1", "closed"), ("", "closed")]
    assert idle.last_event is not None
    assert isinstance(idle.last_event.data, QueueClosed)
    assert ended.last_event is not None
    assert ended.last_event.name == "failed"
