"""The client's chains: how many are alive, in whichever order a job's reply and end arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from beequeue import BeeQueueError, ConnectionLost
from client import Chains
from harness import alive
from tests.conftest import until

NEVER_S = 600
"""A wait that no test can wait out."""


class Job:
    def __init__(self, queue: Queue) -> None:
        self.id: str | None = None
        self.queue = queue
        self.listeners: dict[str, Callable[[Any], None]] = {}

    def on(self, event: str, listener: Callable[[Any], None]) -> None:
        self.listeners[event] = listener

    async def save(self) -> None:
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.queue.saving.append((self, reply))
        self.id = await reply


class Queue:
    """Decides when saves are answered and when jobs end. It replaces the queue, not Redis: only the order matters here."""

    def __init__(self) -> None:
        self.saving: list[tuple[Job, asyncio.Future[str]]] = []
        self.listeners: dict[str, Callable[[str, Any], None]] = {}

    def on(self, event: str, listener: Callable[[str, Any], None]) -> None:
        self.listeners[event] = listener

    def create_job(self, data: object) -> Job:
        return Job(self)

    async def answer(self, outcome: str | BaseException) -> Job:
        job, reply = self.saving.pop(0)
        if isinstance(outcome, str):
            reply.set_result(outcome)
        else:
            reply.set_exception(outcome)
        await settle()
        return job

    async def end(self, job_id: str) -> None:
        self.listeners["job succeeded"](job_id, None)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def queue() -> Queue:
    return Queue()


@pytest.fixture
async def chains(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Chains:
    monkeypatch.setattr(alive, "MAYBE_SAVED_S", 0.05)
    made = Chains(queue, 3)  # type: ignore[arg-type]
    made.alive.fill()
    await settle()
    return made


async def test_each_end_starts_the_next_job(queue: Queue, chains: Chains) -> None:
    assert (chains.alive.count, len(queue.saving)) == (3, 3)
    for job_id in ("1", "2", "3"):
        await queue.answer(job_id)
    assert (chains.alive.count, len(queue.saving)) == (3, 0)
    await queue.end("2")
    assert (chains.alive.count, len(queue.saving)) == (3, 1)
    assert list(chains.counts.values()) == [3, 0, 1, 0, 0]


async def test_an_end_may_come_before_the_reply(queue: Queue, chains: Chains) -> None:
    """the race itself: the chain goes on at once, and the late reply starts no second job"""
    await queue.end("1")
    assert (chains.alive.count, len(queue.saving)) == (3, 4)
    await queue.answer("1")
    assert (chains.alive.count, len(queue.saving)) == (3, 3)


async def test_a_save_that_failed_starts_its_chain_anew(queue: Queue, chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    """after the back-off, without the wait for a save that may have been applied"""
    monkeypatch.setattr(alive, "MAYBE_SAVED_S", NEVER_S)
    for error in (BeeQueueError("no"), ConnectionLost("down", maybe_applied=False)):
        await queue.answer(error)
        assert (chains.alive.count, len(queue.saving)) == (3, 2)
        await until(lambda: len(queue.saving) == 3)
    assert (chains.alive.count, chains.alive.restarted, chains.counts["numJobSaveError"]) == (3, 2, 2)


async def test_the_wait_grows_with_failures_in_a_row(queue: Queue, chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    """a save that worked ends the series"""
    attempts: list[int] = []

    def at_once(attempt: int) -> int:
        attempts.append(attempt)
        return 0

    monkeypatch.setattr(alive, "linear_backoff", at_once)
    for outcome in (BeeQueueError("no"), BeeQueueError("no"), "1", BeeQueueError("no")):
        await queue.answer(outcome)
    assert attempts == [1, 2, 1]


@pytest.mark.parametrize("applied", [True, False])
async def test_a_save_that_may_have_been_applied_waits_for_its_end(
    queue: Queue, chains: Chains, monkeypatch: pytest.MonkeyPatch, applied: bool
) -> None:
    monkeypatch.setattr(alive, "linear_backoff", lambda failures: 1000 * NEVER_S)
    await queue.answer("1")
    await queue.answer(ConnectionLost("lost", maybe_applied=True))
    assert (chains.alive.count, len(queue.saving)) == (3, 1)
    under_way = list(chains.alive._saving)
    assert len(under_way) == 2
    if applied:
        await queue.end("2")
        assert (chains.alive.count, len(queue.saving)) == (3, 2)
    # the other save has no answer yet
    ended, _ = await asyncio.wait(under_way, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert len(ended) == 1
    await settle()
    assert (chains.alive.count, len(queue.saving)) == (3, 2)
    assert chains.alive.restarted == (0 if applied else 1)


async def test_a_vanished_job_is_given_up(queue: Queue, chains: Chains, monkeypatch: pytest.MonkeyPatch) -> None:
    for job_id in ("1", "2", "3"):
        await queue.answer(job_id)
    chains.alive.give_up_vanished()
    assert chains.alive.restarted == 0
    monkeypatch.setattr(alive, "GIVE_UP_S", -1)
    chains.alive.give_up_vanished()
    await settle()
    assert (chains.alive.count, chains.alive.restarted, len(queue.saving)) == (3, 3, 3)
    await queue.end("1")  # it has ended after all: for a moment there is one chain too many
    for job_id in ("4", "5", "6", "7"):
        await queue.answer(job_id)
    assert chains.alive.count == 4
    await queue.end("4")
    assert (chains.alive.count, len(queue.saving)) == (3, 0)


async def test_an_unknown_outcome_starts_its_chain_anew(queue: Queue, chains: Chains) -> None:
    job = await queue.answer("1")
    job.listeners["unknown"](None)
    await settle()
    assert (chains.alive.count, chains.alive.restarted, len(queue.saving)) == (3, 1, 3)


async def test_winding_down_starts_no_more(queue: Queue, chains: Chains) -> None:
    winding = asyncio.create_task(chains.alive.wind_down())
    for job_id in ("1", "2", "3"):
        await queue.answer(job_id)
        await queue.end(job_id)
    await winding
    assert (chains.alive.count, len(queue.saving)) == (0, 0)
