"""Many jobs end at once: each runs once, and no command holds up another."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from beequeue import Job, OperationTimedOut, OutcomeNotRecorded, Queue
from beequeue.worker.exchange import MOST_LOT, MOST_UNANSWERED, SETTLED_AT_ONCE
from beequeue.worker.heartbeat import REPORTED_AT_ONCE
from tests.conftest import MakeQueue, Seen, until
from tests.observe import Spoken
from tests.relay import Relay


class Crowd:
    """A worker that holds `count` jobs until `gate` is set; counts the calls of its handler for each."""

    def __init__(self, queue: Queue, count: int) -> None:
        self.gate = asyncio.Event()
        self.calls = Counter[Any]()
        self.ended = Seen()
        self._queue, self._count = queue, count

    async def gather(self) -> None:
        """Waits until all of them run."""
        assert await self._queue.save_all(self._queue.create_job(number) for number in range(self._count)) == {}
        self._queue.on("succeeded", lambda job, result: self.ended(job.data))
        self._queue.process(self._handle, self._count)
        await until(lambda: self.calls.total() == self._count, 60)

    async def _handle(self, job: Job) -> None:
        self.calls[job.data] += 1
        await self.gate.wait()


async def test_jobs_that_end_together_run_once_each(make_queue: MakeQueue, redis: Any) -> None:
    """more jobs than Redis settles within a stall interval; another process's checks find none of them stalled"""
    queue = make_queue(get_events=False, stall_interval=1_000, stalled_check_interval=0)
    checker = make_queue(get_events=False, is_worker=False, stall_interval=1_000)
    stalled = Seen()
    checker.on("stalled", stalled)
    crowd = Crowd(queue, count := 20_000)
    await crowd.gather()
    await checker.check_stalled_jobs(20)
    crowd.gate.set()
    await crowd.ended.reaches(count, 120)
    assert crowd.calls == Counter(range(count))
    assert (stalled.calls, queue.late_finishes, queue.reconnects) == ([], 0, 0)
    assert await queue.check_health() == (0, 0, count, 0, 0, count)


async def test_few_settlements_are_under_way_at_once(make_queue: MakeQueue, url: str) -> None:
    """the others wait for answers, on either connection; in the end all are settled"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, get_events=False, stall_interval=60_000)
        crowd = Crowd(queue, count := 3 * MOST_UNANSWERED * SETTLED_AT_ONCE)
        await crowd.gather()
        spoken = Spoken(relay)
        relay.hold("command")
        crowd.gate.set()
        await until(lambda: len(queue._consumer._exchange._settling) == count - MOST_UNANSWERED * MOST_LOT)  # type: ignore[union-attr]
        await until(lambda: len(spoken.commands) == MOST_UNANSWERED)
        beyond = asyncio.ensure_future(until(lambda: len(spoken.commands) > MOST_UNANSWERED, 0.3))
        assert isinstance((await asyncio.gather(beyond, return_exceptions=True))[0], TimeoutError)
        assert [name for _, name in spoken.names] == ["finish"] * MOST_UNANSWERED
        relay.release("command")
        await crowd.ended.reaches(count, 30)
        assert [name for _, name in spoken.names].count("finish") >= count / SETTLED_AT_ONCE
        assert crowd.calls == Counter(range(count))
        await queue.close()


async def test_attempts_that_wait_for_their_settlement_are_reported(make_queue: MakeQueue, url: str) -> None:
    """a thousand in each command, and all of them each time"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, get_events=False, stall_interval=400, stalled_check_interval=0)
        crowd = Crowd(queue, count := 2_500)
        await crowd.gather()
        spoken = Spoken(relay)
        relay.hold("command")
        crowd.gate.set()

        def beats() -> list[list[bytes]]:
            return [command[2:] for _, command in spoken.commands if command[0] == b"SREM"]

        await until(lambda: len(beats()) >= 3)
        assert sorted(len(ids) for ids in beats()[:3]) == [count % REPORTED_AT_ONCE, REPORTED_AT_ONCE, REPORTED_AT_ONCE]
        assert sorted(int(one) for ids in beats()[:3] for one in ids) == [*range(1, count + 1)]
        relay.release("command")
        await crowd.ended.reaches(count, 30)
        await queue.close()


async def test_a_close_reports_each_job_that_could_not_be_settled(make_queue: MakeQueue, url: str) -> None:
    """also those whose settlement was not sent"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, get_events=False, stall_interval=60_000)
        crowd = Crowd(queue, count := 2 * MOST_UNANSWERED * SETTLED_AT_ONCE)
        await crowd.gather()
        relay.hold("command")
        crowd.gate.set()
        await until(lambda: len(queue._consumer._exchange._settling) == count - MOST_UNANSWERED * MOST_LOT)  # type: ignore[union-attr]
        with pytest.raises(OperationTimedOut):
            await queue.close(100)
        make_queue.queues.remove(queue)
        assert len(make_queue.claim(OutcomeNotRecorded)) == count
        relay.release("command")
