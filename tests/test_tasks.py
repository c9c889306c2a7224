"""`supervised`: a long-lived task that never ends unnoticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

import beequeue.tasks
from beequeue import BeeQueueError, TaskFailed
from beequeue.tasks import supervised
from tests.conftest import Seen


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.tasks, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(beequeue.tasks, "LONGEST_PAUSE_S", 0.002)


def failing(calls: list[int], *raised: BaseException) -> Callable[[], asyncio.Future[None]]:
    """Work that raises one of these at each call, and then returns."""

    async def work() -> None:
        calls.append(len(calls))
        if len(calls) <= len(raised):
            raise raised[len(calls) - 1]

    return lambda: asyncio.ensure_future(work())


async def test_an_exception_is_reported_and_the_work_starts_again(seen: Callable[[], Seen]) -> None:
    calls: list[int] = []
    reported = seen()
    first, second = RuntimeError("token service down"), KeyError("x")
    await supervised(failing(calls, first, second), "keeper", reported)
    assert len(calls) == 3
    assert [type(error) for (error,) in reported.calls] == [TaskFailed, TaskFailed]
    assert [error.__cause__ for (error,) in reported.calls] == [first, second]
    assert str(reported.calls[0][0]) == "keeper: RuntimeError: token service down; starting again in 0.001 s"


async def test_a_cancelled_error_without_a_cancellation_is_a_failure(seen: Callable[[], Seen]) -> None:
    calls: list[int] = []
    reported = seen()
    await supervised(failing(calls, asyncio.CancelledError()), "keeper", reported)
    assert len(calls) == 2
    assert len(reported.calls) == 1


async def test_cancelling_the_task_ends_it(seen: Callable[[], Seen]) -> None:
    reported = seen()
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = supervised(work, "keeper", reported)
    await begun.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert reported.calls == []


async def test_a_report_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def report(error: BeeQueueError) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.ERROR, "beequeue"):
        await supervised(failing(calls, RuntimeError()), "keeper", report)
    assert len(calls) == 2
    assert "keeper: its failure could not be reported" in caplog.text
