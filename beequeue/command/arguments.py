"""The arguments of the command line. A wrong one ends the process with exit code 2 and one line, which shows no password."""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from beequeue.escape import one_line
from beequeue.parse import text, whole_number
from beequeue.settings import QueueSettings
from beequeue.wire.address import check_redis_url

STANDARD_LIBRARY = os.path.dirname(os.__file__)
MOST_SECONDS = (2**53 - 1) // 1000
"""The most seconds whose milliseconds Node can hold exactly."""
_OPTION = re.compile("--?[a-z]+(-[a-z]+)*")
_HANDLER = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")

Value = TypeVar("Value")


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """`parse` as the `type` of an argument: argparse then shows the text of the `ValueError` that it raises."""

    def parse_argument(value: str) -> Value:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments, with its name in `command`; by default those of the process."""
    parser = Parser(prog="python -m beequeue", description="Process the jobs of a queue, or check it.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_worker_arguments(commands.add_parser("worker", help="process the jobs of a queue", allow_abbrev=False))
    _add_check_arguments(commands.add_parser("check", help="look for damage in a queue, or repair it", allow_abbrev=False))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # Only the names of options are shown: the rest may be a URL, or half of a password.
        names = [name for each in unknown if _OPTION.fullmatch(name := each.partition("=")[0])]
        parser.error(f"unrecognized arguments: {' '.join(names) or f'{len(unknown)} without an option'}")
    return options


def _add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = QueueSettings()
    add, count = parser.add_argument, argument(whole_number)
    handler_help = "the function that processes a job, async or plain; a plain one runs in a thread"
    add("handler", metavar="module:handler", type=argument(load_handler), help=handler_help)
    add("--queue", metavar="NAME", type=argument(text), required=True, help="the queue (required)")
    add("--concurrency", metavar="N", type=count, default=1, help="how many jobs run at once (default: 1)")
    _add_connection_arguments(parser)
    interval = defaults.stall_interval
    interval_help = f"the same for all workers of the queue (default: {interval})"
    add("--stall-interval", metavar="MS", type=count, default=interval, help=interval_help)
    add("--max-stalls", metavar="N", type=count, help="fail a job that has lost its worker more than N times (default: never)")
    add("--remove-on-success", action="store_true", help="delete jobs that succeeded")
    add("--remove-on-failure", action="store_true", help="delete jobs that failed")
    add("--no-delayed", dest="activate_delayed_jobs", action="store_false", help="leave delayed jobs to other workers")
    timeout_help = "how long jobs may run on after SIGTERM or SIGINT (default: 5000)"
    add("--timeout", metavar="MS", type=count, default=5_000, help=timeout_help)
    add("-v", "--verbose", action="store_true", help="log a line for each attempt at a job")


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", type=argument(text), help="the queue")
    _add_connection_arguments(parser)
    add("--json", action="store_true", help="print one JSON object, with every finding")
    add("--repair", action="store_true", help="repair the damage; without this, nothing is changed")
    older_help = "also report active jobs that were created at least this long ago, unless workers repeat their stall checks"
    add("--older-than", metavar="SECONDS", type=argument(_seconds), help=older_help)


def _add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    url, prefix = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379", QueueSettings().prefix
    url_help = "default: the environment variable REDIS_URL, or else redis://127.0.0.1:6379"
    parser.add_argument("--redis", metavar="URL", type=argument(_url), default=url, help=url_help)
    parser.add_argument("--prefix", type=argument(text), default=prefix, help=f"the prefix of all keys (default: {prefix})")


def _seconds(value: str) -> int:
    seconds = whole_number(value)
    if seconds > MOST_SECONDS:
        raise ValueError(f"must be at most {MOST_SECONDS}, not {value!r}")
    return seconds


def _url(value: str) -> str:
    try:
        check_redis_url(value)
    except ValueError as error:
        raise ValueError(f"(or REDIS_URL) {error}") from None
    return value


def load_handler(target: str) -> Any:
    """Imports the function that `module:name` names; either may be dotted. Raises `ValueError`."""
    module, _, path = target.partition(":")
    if not _HANDLER.fullmatch(target):
        given = "a URL" if "://" in target or "@" in target else repr(target)
        raise ValueError(f"must be a module and a function, as in shop.mail:send, not {given}")
    sys.path.insert(0, os.getcwd())
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raised = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}{_place(error)}"
        raise ValueError(f"must name a function, but {target!r} raises {raised}") from None
    if not callable(found):
        raise ValueError(f"must name a function, but {target!r} is of type {type(found).__name__}")  # noqa: TRY004  # the one error of an argument
    return found


def _place(error: BaseException) -> str:
    """The last line of code outside the standard library that an exception passed through."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[1:]]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "<unknown>", error.lineno))
    for file, line in reversed(places):
        if not file.startswith("<") and (not file.startswith(STANDARD_LIBRARY) or "-packages" in file):
            return f" ({file}, line {line})"
    return ""
