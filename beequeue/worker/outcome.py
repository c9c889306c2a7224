"""The outcome of an attempt: a worker's decisions, as plain functions over values. No I/O.

A failure goes in bee-queue's order: ask the strategy; change the status, the stack trace and the remaining retries; write the
entry.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping
from typing import Any

from beequeue.events import encode_event
from beequeue.job import Job, Strategy
from beequeue.settings import QueueSettings
from beequeue.store.store import Settlement

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def retry_delay(job: Job, strategies: Mapping[str, Strategy]) -> int | None:
    """Returns the ms before the failed `job` is tried again (0: at once), or None when it has failed for good.

    Calls the job's strategy, which may change the job's backoff; raises any error that the strategy raises.
    """
    retries = job.options.get("retries", 0)
    if not isinstance(retries, (int, float)) or retries <= 0:
        return None
    backoff = job.options.get("backoff")
    name = backoff.get("strategy") if isinstance(backoff, dict) else "immediate"
    strategy = strategies.get(str(name))
    if strategy is None:
        return None
    delay = strategy(job)
    if not isinstance(delay, (int, float)) or math.isnan(delay) or delay < 0:
        return None
    return math.ceil(delay)


def stack_trace(error: BaseException) -> str:
    """Returns the traceback as text, without the frames that led to the handler; leaves out what Python cannot format."""
    last_line = f"{type(error).__name__}: {message_of(error)}\n"
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            frames = frames.tb_next
        try:
            return "".join(traceback.format_exception(type(error), error, frames))
        except BaseException:  # a SyntaxError whose text is no text, say, or a property of the handler's own class that raises
            return "".join(["Traceback (most recent call last):\n", *traceback.format_tb(frames), last_line])
    except BaseException:
        return last_line


def message_of(error: BaseException) -> str:
    """Returns the text that a producer gets for an error; never empty."""
    try:
        return str(error) or type(error).__name__
    except BaseException:  # the handler's own class of error, whose `__str__` raises
        return type(error).__name__


def succeed(job: Job, result: Any, settings: QueueSettings) -> Settlement:
    """Settles a job whose handler returned `result`; raises `TypeError` when JSON cannot carry it."""
    assert job.id is not None
    message = encode_event(job.id, "succeeded", result) if settings.send_events else b""
    job.status = "succeeded"
    return Settlement("succeeded", None if settings.remove_on_success else job.encode(), message)


def fail(job: Job, error: BaseException, delay: int | None, now: int, settings: QueueSettings) -> Settlement:
    """Settles a job whose handler raised `error`: it is tried again after `delay` ms, or has failed when that is None.

    Raises `TypeError` when JSON cannot carry the job.
    """
    assert job.id is not None
    status = "failed" if delay is None else "retrying"
    job.status = status
    job.options["stacktraces"].insert(0, stack_trace(error))
    if delay is not None:
        job.options["retries"] -= 1
    message = encode_event(job.id, status, message_of(error)) if settings.send_events else b""
    entry = None if delay is None and settings.remove_on_failure else job.encode()
    return Settlement(status, entry, message, now + delay if delay else None)


def fail_for_good(job: Job, stored: bytes, error: BaseException, settings: QueueSettings) -> Settlement:
    """Settles a job that has failed and is not tried again; never raises.

    Keeps its entry as it is `stored` when it cannot be written, for example because it is nested too deeply.
    """
    try:
        return fail(job, error, None, 0, settings)
    except Exception:
        assert job.id is not None
        message = encode_event(job.id, "failed", message_of(error)) if settings.send_events else b""
        return Settlement("failed", None if settings.remove_on_failure else stored, message)


def fail_unread(stored: bytes) -> Settlement:
    """Settles a job whose entry cannot be read: keeps the entry, and publishes nothing."""
    return Settlement("failed", stored, b"")
