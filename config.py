"""The harness's configuration, from the environment and `.env`; the only module that reads either.

A wrong value ends the program with one line on stderr and exit code 2.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from dotenv import dotenv_values

from beequeue import check_redis_url
from beequeue.escape import escape
from beequeue.parse import text, whole_number

MOST_CHAINS, MOST_WORKERS = 100_000, 1_000
"""A client with more jobs to start would not listen to a signal; more processes would exhaust the machine."""


@dataclass(frozen=True)
class Config:
    """One field for each variable; the names are the variables' in lower case."""

    queue_name: str = "issue-189"
    concurrency: int = 2
    """How many jobs one worker process runs at once."""
    num_chains: int = 7
    redis_url: str = "redis://127.0.0.1:6379"
    ordered_events: bool = False
    """True turns the cure on."""
    stats_interval: float = 3
    """Seconds between stats lines."""
    duration: float = 0
    """Seconds after which the client ends; 0: it runs until it is stopped."""
    extended_stats: bool = False
    workers: int = 6
    """Worker processes, without Docker."""


def _seconds(value: str, *, zero: bool = False) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        raise ValueError(f"must be a number of seconds, {'at least 0' if zero else 'greater than 0'}, not {value!r}")
    return seconds


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"must be true or false, not {value!r}")
    return value == "true"


def _url(value: str) -> str:
    check_redis_url(value)
    return value


_PARSERS: dict[str, Callable[[str], object]] = {
    "queue_name": text,
    "concurrency": whole_number,
    "num_chains": partial(whole_number, at_most=MOST_CHAINS),
    "redis_url": _url,
    "ordered_events": _truth,
    "stats_interval": _seconds,
    "duration": partial(_seconds, zero=True),
    "extended_stats": _truth,
    "workers": partial(whole_number, at_most=MOST_WORKERS),
}


def parse(variables: Mapping[str, str]) -> Config:
    """Reads the configuration; an empty variable counts as unset. Raises `ValueError` with the line to show."""
    given = {}
    for field, parser in _PARSERS.items():
        name = field.upper()
        if value := variables.get(name):
            try:
                given[field] = parser(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return Config(**given)  # type: ignore[arg-type]  # each parser returns its field's type


def variables() -> dict[str, str]:
    """The variables of `.env` and of the environment, which wins. Raises `ValueError` with the line to show."""
    file = Path(__file__).with_name(".env")
    try:
        written = dotenv_values(file)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None
    return {**{name: value for name, value in written.items() if value is not None}, **os.environ}


def load() -> Config:
    """Reads the configuration of this process; ends the program if it is wrong."""
    try:
        return parse(variables())
    except ValueError as error:
        fail(str(error), code=2)


def fail(line: str, code: int = 1) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(escape(line), file=sys.stderr)
    sys.exit(code)
