"""Signals of a program: they cancel its work, and leave its clean-up alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from beequeue.signals import SIGNALS, until_signalled
from tests import ROOT


async def test_work_that_ends() -> None:
    assert await until_signalled(asyncio.sleep(0)) is False


async def test_work_that_raises() -> None:
    async def work() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="^mine$"):
        await until_signalled(work())


@pytest.mark.parametrize("number", SIGNALS)
async def test_signals_cancel_the_work_and_not_the_clean_up(number: signal.Signals) -> None:
    """The first signal cancels the work, the second its winding down; a third, during the clean-up, does nothing."""
    steps = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(10)
        finally:
            steps.append("winding down")
            os.kill(os.getpid(), number)
            await asyncio.sleep(10)

    assert await until_signalled(work()) is True
    os.kill(os.getpid(), number)
    for _ in range(3):  # The loop reads it from a pipe.
        await asyncio.sleep(0)
    assert steps == ["winding down"]


async def test_what_winding_down_raises() -> None:
    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(10)
        finally:
            raise LookupError("late")

    with pytest.raises(LookupError, match="^late$"):
        await until_signalled(work())


async def test_a_caller_that_is_cancelled_takes_the_work_with_it() -> None:
    steps = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            steps.append("cancelled")

    caller = asyncio.create_task(until_signalled(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert steps == ["cancelled"]


def test_a_second_signal_kills() -> None:
    """even while the event loop is blocked and has not noticed the first"""
    program = """
import asyncio, os, signal
from beequeue.signals import until_signalled

async def work():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive")

asyncio.run(until_signalled(work(), second_kills=True))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGINT, "", "")
