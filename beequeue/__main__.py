"""The command line: `python -m beequeue worker module:handler --queue NAME` runs a worker until it is signalled.

Owns what a library must not touch: arguments, REDIS_URL, the import of the handler, signals, logging, and the exit code. That
is 0 after SIGTERM or SIGINT, 1 when Redis says no, 2 when an argument is wrong (one line tells which), and 128 + signal after a
second signal.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import operator
import os
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

from beequeue.connection import Address, check_redis_url
from beequeue.consumer import Handler, is_async
from beequeue.errors import BeeQueueError, OperationTimedOut
from beequeue.job import Job
from beequeue.queue import Queue
from beequeue.settings import QueueOptions, QueueSettings

log = logging.getLogger("beequeue")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STANDARD_LIBRARY = os.path.dirname(os.__file__)
SPANS_KEPT = 10_000
"""How many jobs' times are kept until their end is known; that of a job which could not be settled never is."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code; `arguments` are those of the process by default."""
    _on_signals(_end_at_once)
    parser = _Parser(prog="python -m beequeue", description="bee-queue's command line", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="process a queue's jobs", allow_abbrev=False)
    worker.set_defaults(run=_worker)
    url, defaults = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379", QueueSettings()
    add = worker.add_argument
    add("handler", metavar="module:handler", type=load_handler, help="an async or plain function, from a job to its result")
    add("--queue", metavar="NAME", type=_text, required=True)
    add("--concurrency", metavar="N", type=_at_least_one, default=1, help="jobs at once (default: 1)")
    add("--redis", metavar="URL", type=_url, default=url, help="default: the variable REDIS_URL, else redis://127.0.0.1:6379")
    add("--prefix", type=_text, default=defaults.prefix, help=f"first part of the keys (default: {defaults.prefix})")
    add("--stall-interval", metavar="MS", type=_at_least_one, default=defaults.stall_interval, help="the same across a fleet")
    add("--remove-on-success", action="store_true", help="delete succeeded jobs")
    add("--remove-on-failure", action="store_true", help="delete failed jobs")
    add("--no-delayed", dest="activate_delayed_jobs", action="store_false", help="leave delayed jobs to others")
    add("--timeout", metavar="MS", type=_at_least_one, default=5_000, help="how long jobs may go on after SIGTERM or SIGINT")
    add("-v", "--verbose", action="store_true", help="one line a job")
    options = parser.parse_args(arguments)
    return int(options.run(options))


# --- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")


def _at_least_one(value: str) -> int:
    if not (value.isascii() and value.isdigit() and 1 <= int(value) < 2**53):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {value!r}")
    return int(value)


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _url(value: str) -> str:
    try:
        check_redis_url(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"(or REDIS_URL) {error}") from None
    return value


def load_handler(target: str) -> Any:
    """The function that `module:name` names, both of them dotted or not; raises `ArgumentTypeError`."""
    module, _, path = target.partition(":")
    if not module or not path or module.startswith("."):
        raise argparse.ArgumentTypeError(f"must be a module and a function, as in shop.mail:send, not {target!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}{_place(error)}"
        raise argparse.ArgumentTypeError(f"must name a function, and {target!r} gives {what}") from None
    if not callable(found):
        raise argparse.ArgumentTypeError(f"must name a function, and {target!r} is of type {type(found).__name__}")
    return found


def _place(error: BaseException) -> str:
    """Where in somebody's module an import failed: the last line that is not Python's own."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[1:]]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "<unknown>", error.lineno))
    for file, line in reversed(places):
        if not file.startswith("<") and (not file.startswith(STANDARD_LIBRARY) or "-packages" in file):
            return f" ({file}, line {line})"
    return ""


def _one_line(what: object) -> str:
    return " ".join(str(what).split()) or type(what).__name__


# --- the worker ------------------------------------------------------------------------------------------------------


def _worker(options: argparse.Namespace) -> int:
    # behind the handler's import: a module that sets up logging has its way
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        asyncio.run(_work(options))
    except BeeQueueError as error:
        log.error("%s", _one_line(error))
        return 1
    _on_signals(_end_at_once)  # the end of the loop has put Python's own back
    return 0


async def _work(options: argparse.Namespace) -> None:
    """Returns when a signal has ended the worker; raises what Redis said when it said no."""
    settings: Any = {name: value for name, value in vars(options).items() if name in QueueOptions.__annotations__}
    queue = Queue(options.queue, options.redis, get_events=False, store_jobs=False, **settings)
    queue.on("ready", lambda: log.info("connected"))
    queue.on("error", lambda error: log.warning("%s: %s", type(error).__name__, _one_line(error)))
    handler = _told(queue, options.handler) if options.verbose else options.handler
    running = asyncio.create_task(queue.run(handler, options.concurrency))
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    # in place of asyncio's, which do nothing: also while a job blocks the loop, the first signal prepares for the second
    _on_signals(lambda number, frame: _on_signals(_end_at_once))
    log.info("starting: queue %s at %s, %d jobs at once", options.queue, Address(options.redis), options.concurrency)
    (outcome,) = await asyncio.gather(running, return_exceptions=True)
    if running.cancelled():
        log.info("closing; %d jobs under way have %d ms to end", queue.running, options.timeout)
    try:
        await queue.close(options.timeout)
    except OperationTimedOut:
        log.warning("handlers that had not ended were cancelled; what runs in a thread is left to the stall check")
        sys.stdout.flush()
        os._exit(0)  # a normal exit would wait for such threads
    if isinstance(outcome, Exception):
        raise outcome
    log.info("closed")


def _on_signals(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _end_at_once(number: int, frame: object) -> NoReturn:
    os._exit(128 + number)


def _told(queue: Queue, handler: Handler) -> Handler:
    """`handler`, of the same kind, for jobs of which one line tells what became of each and how long its handler took."""
    spans: dict[Job, list[float]] = {}

    async def run_async(job: Job) -> Any:
        span = spans[job] = [time.perf_counter()]
        try:
            return await handler(job)
        finally:
            span.append(time.perf_counter())

    def run_plain(job: Job) -> Any:
        span = spans[job] = [time.perf_counter()]
        try:
            return handler(job)
        finally:
            span.append(time.perf_counter())

    def say(what: str, job: Job, why: str = "") -> None:
        now = time.perf_counter()
        start, *end = spans.pop(job, [now])  # none: it timed out before it had a thread
        log.info("%s", _one_line(f"job {job.id} {what} after {((end or [now])[0] - start) * 1000:.1f} ms{why}"))
        for stale in list(spans)[:-SPANS_KEPT]:
            spans.pop(stale, None)

    queue.on("succeeded", lambda job, result: say("succeeded", job))
    queue.on("retrying", lambda job, error: say("retrying", job, f": {_one_line(error)}"))
    queue.on("failed:fatal", lambda job, error: say("failed", job, f": {_one_line(error)}"))
    return run_async if is_async(handler) else run_plain


if __name__ == "__main__":
    sys.exit(main())
