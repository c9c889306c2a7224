"""The guard against floods of messages: which large messages are decoded, and how many errors are reported. No Redis."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from beequeue import Job, UnreadableData
from beequeue.events import encode_event
from beequeue.producer.guard import LARGE_BYTES, PERIOD_S, REPORTS_A_PERIOD, Complaints, Guard
from tests.producer.test_tracker import Host

LARGE = encode_event("1", "progress", "x" * LARGE_BYTES)


def make_guard(host: Host, *job_ids: str) -> tuple[Guard, list[tuple[Job, str]]]:
    """A guard of these tracked jobs, and the list of its look-ups."""
    jobs = {job_id: Job(cast(Any, None), job_id=job_id) for job_id in job_ids}
    looked_up: list[tuple[Job, str]] = []
    return Guard(cast(Any, host), jobs, lambda job, job_id: looked_up.append((job, job_id))), looked_up


@pytest.mark.parametrize(
    ("message", "tracked", "listens_to", "ordered", "admitted"),
    [
        (LARGE, "1", "", True, True),
        (LARGE, "1", "", False, True),
        (LARGE, "2", "", True, False),
        (LARGE, "2", "job succeeded", True, False),
        (LARGE, "2", "job progress", True, True),
        # with two sockets the job may still be bound
        (LARGE, "2", "", False, True),
        # its members are not in bee-queue's order: the guard cannot tell
        (b'{"event":"progress","id":"1"}', "2", "", True, True),
    ],
)
def test_a_large_message_is_decoded_for_somebody(
    message: bytes, tracked: str, listens_to: str, ordered: bool, admitted: bool
) -> None:
    host = Host(listens_to, ordered_events=ordered)
    guard, looked_up = make_guard(host, tracked)
    assert guard.admits(message) is admitted
    assert (host.errors, looked_up) == ([], [])


@pytest.mark.parametrize(("beyond", "admitted"), [(0, True), (1, False)])
async def test_the_largest_message_that_is_decoded(beyond: int, admitted: bool) -> None:
    host = Host(max_event_bytes=len(LARGE) - beyond)
    guard, looked_up = make_guard(host, "1")
    assert guard.admits(LARGE) is admitted
    assert [str(error) for error in host.errors] == (
        [] if admitted else [f"a message of 65,575 bytes is too large, max_event_bytes is {len(LARGE) - 1:,}: {LARGE[:200]!r}"]
    )
    assert [type(error) for error in host.errors] == [UnreadableData] * (not admitted)
    assert looked_up == []
    guard.complaints.close()


@pytest.mark.parametrize("event", ["succeeded", "failed"])
async def test_the_end_of_a_tracked_job_that_is_too_large_is_looked_up(event: str) -> None:
    host = Host("job " + event, max_event_bytes=1)
    guard, looked_up = make_guard(host, "1")
    assert not guard.admits(encode_event("1", event))
    assert not guard.admits(encode_event("2", event))
    assert not guard.admits(b"nothing that can be told")
    assert [(job.id, job_id) for job, job_id in looked_up] == [("1", "1")]
    assert len(host.errors) == 3
    guard.complaints.close()


# --- complaints ----------------------------------------------------------------------------------------------------------


async def test_complaints_are_counted_anew_in_each_period() -> None:
    errors: list[Exception] = []
    complaints = Complaints(errors.append)

    def end_period() -> list[str]:
        assert complaints._period is not None
        complaints._period.cancel()
        errors.clear()
        complaints._end_period()
        return [str(error) for error in errors]

    def complain(times: int) -> list[str]:
        errors.clear()
        for number in range(times):
            complaints.add(ValueError(str(number)))
        return [str(error) for error in errors]

    def more(count: str) -> list[str]:
        return [f"{count} more messages on the events channel within 10 s could not be read, and are not reported one by one"]

    numbers = [*map(str, range(20))]
    assert complain(1_023) == numbers
    assert end_period() == more("1,003")
    assert complain(21) == numbers[:19]  # the count was the first report of this period
    assert end_period() == more("2")
    assert end_period() == []
    assert complaints._period is None
    assert complain(1) == ["0"]
    complaints.close()


async def test_a_period_ends_by_the_clock() -> None:
    loop = asyncio.get_running_loop()
    complaints = Complaints(lambda error: None)
    before = loop.time()
    complaints.add(ValueError())
    period = complaints._period
    assert period is not None
    assert before + PERIOD_S <= period.when() <= loop.time() + PERIOD_S
    complaints.add(ValueError())
    assert complaints._period is period
    complaints.close()
    assert period.cancelled()
    assert (PERIOD_S, REPORTS_A_PERIOD) == (10, 20)
