"""A queue's settings: one frozen, validated value.

This module holds every check of a setting. Each message names the setting, the value and what is allowed; no wrong value is
silently replaced. It knows nothing about Redis except names and numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypedDict

Duration = int | timedelta
"""Milliseconds, or a `timedelta`."""

PointInTime = int | float | datetime
"""Milliseconds since the epoch, or an aware `datetime`."""

MAX_EVENT_BYTES = 16_000_000
"""Half of the 32 MB that may wait for a subscriber before Redis, by default, cuts its connection."""

Backoff = Callable[[int], int]
"""A function from the number of the attempt (1, 2, …) to the milliseconds to wait before it."""


def linear_backoff(attempt: int) -> int:
    """Milliseconds to wait before reconnection attempt `attempt`: 250 more each time, at most 15 s."""
    return min(250 * attempt, 15_000)


def milliseconds(name: str, value: Duration, *, at_least: int = 0) -> int:
    """`value` as an int of milliseconds; raises `TypeError` or `ValueError` naming `name`."""
    if isinstance(value, timedelta):
        value = -(-value // timedelta(milliseconds=1))  # rounded up: a short duration must not become 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of milliseconds or a timedelta, not {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least} ms, not {shown(value)}")
    if value >= 2**53:
        raise ValueError(f"{name} must be less than 2**53 ms, the limit of JavaScript's integers, not {shown(value)}")
    return value


def whole_number(name: str, value: int, *, at_least: int | None = None) -> int:
    """Returns `value` if it is an int within bounds; raises `TypeError` or `ValueError` naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {shown(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """`value` for a message; of a huge int only its size, since Python refuses to print one of thousands of digits."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)


def text(name: str, value: str) -> str:
    """Returns `value` if it can be part of a key; raises `ValueError` naming `name`."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text that UTF-8 can carry, not {value!r}") from None
    return value


class QueueOptions(TypedDict, total=False):
    """The keyword arguments of `Queue`; `QueueSettings` says what each means."""

    prefix: str
    is_worker: bool
    get_events: bool
    send_events: bool
    store_jobs: bool
    ensure_scripts: bool
    activate_delayed_jobs: bool
    stall_interval: Duration
    near_term_window: Duration
    delayed_debounce: Duration
    remove_on_success: bool
    remove_on_failure: bool
    quit_command_client: bool
    redis_scan_count: int
    auto_connect: bool
    initial_redis_failure_retry_delay: Duration
    ordered_events: bool
    stalled_check_interval: Duration | None
    max_stalls: int | None
    reconnect: Backoff
    max_event_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """bee-queue 2.0.0's settings under Python names, and five more at the end."""

    prefix: str = "bq"
    """The first part of every key and channel."""
    is_worker: bool = True
    """Open a connection for takes, and allow `process`."""
    get_events: bool = True
    """Subscribe to `<prefix>:<name>:events`."""
    send_events: bool = True
    """Publish `succeeded`, `failed` and `retrying` when a job is settled."""
    store_jobs: bool = True
    """Keep saved and fetched jobs in `queue.jobs`, so that they receive their own events."""
    ensure_scripts: bool = True
    """Load the scripts while connecting instead of loading each at its first use."""
    activate_delayed_jobs: bool = False
    """Move delayed jobs to `waiting` when they are due."""
    stall_interval: int = 5_000
    """ms within which a worker must report a running job. All processes on one queue must use the same value."""
    near_term_window: int = 1_200_000
    """The longest time in ms for which the delayed timer waits before it looks again."""
    delayed_debounce: int = 1_000
    """ms within which delayed jobs that are due one after another are moved together."""
    remove_on_success: bool = False
    """Delete a succeeded job's data instead of recording it in `succeeded`."""
    remove_on_failure: bool = False
    """Delete a finally failed job's data instead of recording it in `failed`."""
    quit_command_client: bool | None = None
    """Close the command connection with the queue. None means: unless it is shared."""
    redis_scan_count: int = 100
    """The upper bound of COUNT in each SSCAN."""
    auto_connect: bool = True
    """Connect when the queue is made (inside a running loop) or first used. If False, call `connect()`."""
    initial_redis_failure_retry_delay: int = 1_000
    """ms before a refused take is tried again; doubles with each refusal in a row, up to 15 s."""
    ordered_events: bool = True
    """Send saves on the event connection (RESP3), so that no job misses its own events."""
    stalled_check_interval: int | None = None
    """ms between a worker's own stall checks. None means `stall_interval`; 0 means one check only."""
    max_stalls: int | None = None
    """How often this queue's stall checks bring a job back; the next time the job fails. None means no limit."""
    reconnect: Backoff = linear_backoff
    """A function from the number of the reconnection attempt to the ms to wait before it."""
    max_event_bytes: int = MAX_EVENT_BYTES
    """Events above this size in bytes are not decoded, which can take thirty times their size in memory. If such an event
    ends a job, the job is looked up instead."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _checked(field.name, field.default, value))

    @property
    def ordered(self) -> bool:
        """Whether commands that name one job use the event connection."""
        return self.ordered_events and self.get_events


def _checked(name: str, default: Any, value: Any) -> Any:
    """`value` in the setting's own type; raises `TypeError` or `ValueError` naming the setting and the value."""
    if default is None and value is None:
        return None
    check = _CHECKS.get(name) or (_flag if isinstance(default, bool) else partial(milliseconds, at_least=1))
    return check(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _prefix(name: str, value: Any) -> str:
    """As in bee-queue, nothing and the empty string mean the default."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    return text(name, value or "bq")


def _backoff(name: str, value: Any) -> Any:
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise TypeError(f"{name} must be a function from attempt to milliseconds, not {value!r}")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prefix": _prefix,
    "quit_command_client": _flag,
    "delayed_debounce": milliseconds,
    "stalled_check_interval": milliseconds,
    "redis_scan_count": partial(whole_number, at_least=1),
    "max_event_bytes": partial(whole_number, at_least=1),
    "max_stalls": partial(whole_number, at_least=0),
    "reconnect": _backoff,
}
"""The settings whose check does not follow from their default: a bool is a flag, an int is milliseconds, at least 1."""
