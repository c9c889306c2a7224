"""How a run ends: the decisions of a worker as plain functions over values. No I/O.

The order within a failure is bee-queue's: the strategy is asked first, then the status, the stack trace and the remaining
retries change, then the entry is written.
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
    """ms before the failed `job` runs again (0: at once), or None when it has failed for good.

    Calls the job's strategy, which may change the job's backoff; raises what the strategy raises.
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
    """The traceback as text, without the frames that led to the handler."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def message_of(error: BaseException) -> str:
    """What a producer is told; never empty."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # a class of the handler's own, whose text cannot be had
        return type(error).__name__


def succeed(job: Job, result: Any, settings: QueueSettings) -> Settlement:
    """The settlement of a job whose handler returned `result`; raises `TypeError` when JSON cannot carry it."""
    assert job.id is not None
    message = encode_event(job.id, "succeeded", result) if settings.send_events else b""
    job.status = "succeeded"
    return Settlement("succeeded", None if settings.remove_on_success else job.encode(), message)


def fail(job: Job, error: BaseException, delay: int | None, now: int, settings: QueueSettings) -> Settlement:
    """The settlement of a job whose handler raised `error`: tried again after `delay` ms, or failed when that is None."""
    assert job.id is not None
    status = "failed" if delay is None else "retrying"
    job.status = status
    job.options["stacktraces"].insert(0, stack_trace(error))
    if delay is not None:
        job.options["retries"] -= 1
    message = encode_event(job.id, status, message_of(error)) if settings.send_events else b""
    entry = None if delay is None and settings.remove_on_failure else job.encode()
    return Settlement(status, entry, message, now + delay if delay else None)


def fail_as_stored(job_id: str, entry: bytes, error: BaseException, settings: QueueSettings) -> Settlement:
    """The settlement of a job that has failed and cannot be written anew, as when it is nested too deep: it stays as it is."""
    message = encode_event(job_id, "failed", message_of(error)) if settings.send_events else b""
    return Settlement("failed", None if settings.remove_on_failure else entry, message)
