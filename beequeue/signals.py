"""SIGTERM and SIGINT, for a program whose main work is one coroutine.

Changes the signal handlers of the whole process, which only a program may do: inside beequeue, nothing but the command line
imports this.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once() -> None:
    """From now on, a signal ends the process at once, with exit code 128 + its number and without any clean-up."""
    for number in SIGNALS:
        signal.signal(number, _exit)


async def until_signalled(work: Coroutine[Any, Any, object], *, second_kills: bool = False) -> bool:
    """Runs `work` until it ends, or until SIGTERM or SIGINT cancels it; returns whether it was cancelled.

    Raises the errors of `work`. Later signals cancel `work` again while it winds down, and do nothing once it has ended;
    with `second_kills`, the second signal ends the process at once, even if a blocked event loop has not noticed the first.
    The handlers stay installed until the loop is closed, so that the program can clean up undisturbed.
    """
    task = asyncio.create_task(work)
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if second_kills:
        # The loop receives a signal through a pipe; the handlers that asyncio has just installed do nothing.
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: end_at_once())
    await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()
    return task.cancelled()


def _exit(number: int, frame: object) -> NoReturn:
    os._exit(128 + number)
