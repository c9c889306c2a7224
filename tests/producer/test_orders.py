"""The rule of job events in every order. A job is bound in the step that reads the reply, or, with two sockets, in a later one.

No Redis here: the rule is pure. A plan is a sequence of replies and events as Redis wrote them, in the order in which a client
reads it, cut into reads.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beequeue.events import encode_event
from beequeue.job import Job
from beequeue.producer.tracker import Tracker
from beequeue.settings import QueueSettings

NEXT_READ = "next read"
FOREIGN = "foreign"
"""The id of a job that another producer has saved."""


@dataclass(frozen=True)
class Item:
    """One thing that Redis wrote: the reply to a save, or a message of the channel `events`."""

    job_id: str
    name: str


REPLY, REFUSED = "reply", "refused"
Plan = list[Item | str]


def written(job_id: str, *, saved: bool, events: list[str]) -> list[Item]:
    """All that Redis writes about one job, in order."""
    return [Item(job_id, name) for name in (REPLY, *events)] if saved else [Item(job_id, REFUSED)]


@st.composite
def jobs_written(draw: st.DrawFn) -> list[list[Item]]:
    """All that Redis writes about each of several jobs. Some saves are refused; some jobs belong to another producer."""
    before_the_end = st.lists(st.sampled_from(["progress", "retrying"]), max_size=3)
    jobs = []
    for number in range(draw(st.integers(1, 5))):
        events = [*draw(before_the_end), draw(st.sampled_from(["succeeded", "failed"]))]
        jobs.append(written(str(number), saved=draw(st.sampled_from([True, True, True, False])), events=events))
    foreign = [Item(FOREIGN, name) for name in draw(before_the_end)]
    return [*jobs, foreign]


def merged(draw: st.DrawFn, streams: list[list[Item]]) -> list[Item]:
    """Draws one interleaving of the streams; each keeps its order."""
    left = [list(stream) for stream in streams if stream]
    together = []
    while left:
        stream = draw(st.sampled_from(left))
        together.append(stream.pop(0))
        left = [stream for stream in left if stream]
    return together


def cut(draw: st.DrawFn, items: list[Item]) -> Plan:
    """Cuts the items into reads."""
    plan: Plan = []
    for item in items:
        plan.append(item)
        plan += [NEXT_READ] * draw(st.integers(0, 2))
    return [*plan, NEXT_READ]


@st.composite
def on_one_socket(draw: st.DrawFn) -> Plan:
    """A client reads replies and events in the order in which Redis wrote them."""
    return cut(draw, merged(draw, draw(jobs_written())))


@st.composite
def on_two_sockets(draw: st.DrawFn) -> Plan:
    """Replies keep their order, and events theirs; nothing orders the two."""
    wrote = merged(draw, draw(jobs_written()))
    replies = [item for item in wrote if item.name in (REPLY, REFUSED)]
    events = [item for item in wrote if item.name not in (REPLY, REFUSED)]
    return cut(draw, merged(draw, [replies, events]))


class Host:
    """The inside of a queue that only listens, and the queue itself."""

    backoff_strategies: dict[str, Any] = {}  # noqa: RUF012
    _saver: Any = None
    _producer: Any = None

    def __init__(self, *, ordered: bool) -> None:
        self.settings = QueueSettings(ordered_events=ordered)
        self.heard: list[str] = []

    def emit(self, event: str, *args: Any) -> bool:
        self.heard.append(event)
        return True

    def listens_to(self, event: str) -> bool:
        return True

    def report(self, error: Exception) -> None:
        raise error

    def _listener_failed(self, event: str, error: BaseException) -> None:
        raise error

    def _listener_awaits(self, event: str, result: Any) -> None:
        raise NotImplementedError


async def read(plan: Plan, *, ordered: bool) -> tuple[dict[str, list[str]], set[str]]:
    """Lets a tracker read a plan; returns the events that each job received, and the ids that stay bound."""
    host = Host(ordered=ordered)
    tracker = Tracker(cast(Any, host), cast(Any, None))
    jobs = {item.job_id: Job(host, job_id=item.job_id) for item in plan if isinstance(item, Item) and item.job_id != FOREIGN}
    heard: dict[str, list[str]] = {job_id: [] for job_id in jobs}
    for job_id, job in jobs.items():
        for event in ("progress", "retrying", "succeeded", "failed", "unknown"):
            job.on(event, lambda data, job_id=job_id, event=event: heard[job_id].append(event))
    for item in plan:
        if not isinstance(item, Item):
            tracker.hand_on()
            await asyncio.sleep(0)
        elif item.name == REPLY and ordered:
            tracker.bind(jobs[item.job_id])
        elif item.name == REPLY:  # as the code behind `await job.save()` runs: in the next step
            asyncio.get_running_loop().call_soon(tracker.bind, jobs[item.job_id])
        elif item.name != REFUSED:
            tracker.read(encode_event(item.job_id, item.name, 50 if item.name == "progress" else None))
    for _ in range(3):
        await asyncio.sleep(0)
    return heard, set(tracker.jobs)


def expected(plan: Plan) -> dict[str, list[str]]:
    """The events that each job should receive: all of its own, once, in order."""
    items = [item for item in plan if isinstance(item, Item) and item.job_id != FOREIGN]
    events: dict[str, list[str]] = {item.job_id: [] for item in items}
    for item in items:
        if item.name not in (REPLY, REFUSED):
            events[item.job_id].append(item.name)
    return events


@settings(max_examples=200, deadline=None)
@given(on_one_socket())
def test_on_one_socket_every_job_hears_all_of_its_events_once(plan: Plan) -> None:
    """EV-27, EV-30, QK-39: In order, for every order in which Redis can write, however the stream is cut.

    Nothing stays bound.
    """
    assert asyncio.run(read(plan, ordered=True)) == (expected(plan), set())


def test_on_two_sockets_the_same_finds_the_loss() -> None:
    """QK-39: A job whose end is read before the reply receives nothing and stays bound; one job is enough."""

    def loses(plan: Plan) -> bool:
        heard, bound = asyncio.run(read(plan, ordered=False))
        return heard != expected(plan) and bool(bound)

    hypothesis.find(
        on_two_sockets(), loses, settings=settings(deadline=None, database=None, phases=[hypothesis.Phase.generate])
    )
    least: Plan = [Item("0", "succeeded"), NEXT_READ, Item("0", REPLY), NEXT_READ]
    assert loses(least)
    assert asyncio.run(read(least, ordered=False)) == ({"0": []}, {"0"})


@pytest.mark.parametrize("binding", ["late", "never"])
def test_without_its_other_half_one_socket_loses_too(binding: str) -> None:
    """When the job is bound in a step after the one that reads the reply, an event in the same read finds no job."""
    plan: Plan = [Item("0", REPLY), Item("0", "succeeded"), NEXT_READ]

    async def read_and_bind_late() -> tuple[list[str], set[str]]:
        host, heard = Host(ordered=True), []
        tracker = Tracker(cast(Any, host), cast(Any, None))
        job = Job(host, job_id="0")
        job.on("succeeded", lambda data: heard.append("succeeded"))
        if binding == "late":
            asyncio.get_running_loop().call_soon(tracker.bind, job)
        tracker.read(encode_event("0", "succeeded"))
        tracker.hand_on()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return heard, set(tracker.jobs)

    assert asyncio.run(read(plan, ordered=True)) == ({"0": ["succeeded"]}, set())
    assert asyncio.run(read_and_bind_late()) == ([], {"0"} if binding == "late" else set())
