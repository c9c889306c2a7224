"""The common part of `client.py` and `worker.py`: configuration, logging, the event loop, signals, and the exit.

Everything but the stats lines goes to stderr. A program exits with 0 after SIGTERM or SIGINT, and with 1 and one line when
Redis refuses it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

import config
from beequeue import BeeQueueError, OperationTimedOut, Queue
from beequeue.escape import OneLine
from beequeue.signals import until_signalled

log = logging.getLogger("harness")


def start(name: str, main: Callable[[config.Config], Coroutine[Any, Any, None]]) -> None:
    """Runs `main` with the configuration of this process, to its end."""
    settings = config.load()
    log_to_stderr()
    try:
        uvloop.run(main(settings))
        log.info("%s: stopped", name)
    except BeeQueueError as error:
        config.fail(f"{name}: {error}")
    except BrokenPipeError:  # the reader of the stats lines has gone; the interpreter's last flush must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def log_to_stderr() -> None:
    """Sends all logging to stderr, one line a message."""
    out = logging.StreamHandler()
    out.addFilter(OneLine())
    logging.basicConfig(handlers=[out], level=logging.INFO, format="%(message)s")


async def run_until_signal(queue: Queue, work: Coroutine[Any, Any, object]) -> None:
    """Runs `work` until it ends or a signal cancels it, then closes the queue; raises what `work` raised."""
    try:
        await until_signalled(work)
    finally:
        try:
            await queue.close()
        except OperationTimedOut as late:
            cancelled = f"{late.abandoned} handlers had not ended and had to be cancelled"
            log.warning("time-out: %s", cancelled if late.abandoned else "Redis does not answer")
