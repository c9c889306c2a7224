"""The command line: `python -m beequeue worker module:handler --queue NAME` runs a worker until it is signalled;
`python -m beequeue check NAME [--repair]` looks a queue over for damage.

Owns what a library must not touch: arguments, REDIS_URL, the import of the handler, signals, logging, and the exit code. A
worker's is 0 after SIGTERM or SIGINT, 1 when Redis says no, and 128 + signal after a second signal. A check's is 0 when nothing
is wrong (any more), 1 when something is, 3 when Redis cannot be reached or says no, and 128 + signal after the first one. 2:
an argument is wrong (one line tells which).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import json
import logging
import operator
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

import uvloop

from beequeue.errors import BeeQueueError, ConnectionLost, OperationTimedOut, said
from beequeue.escape import OneLine, escape
from beequeue.fsck.findings import Finding, Report, check, counts, repair
from beequeue.job import Job
from beequeue.queue import Queue
from beequeue.settings import QueueOptions, QueueSettings, linear_backoff
from beequeue.wire.address import Address, check_redis_url
from beequeue.wire.link import complete
from beequeue.worker.attempt import Handler, is_async

log = logging.getLogger("beequeue")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STANDARD_LIBRARY = os.path.dirname(os.__file__)
SHOWN = 20
"""How many findings of a kind are printed, unless as JSON."""
WOULD = {
    "ghost": "would be taken out of {}",
    "orphan": "would go to {}",
    "two-states": "would stay in {} alone",
    "too-old": "would go to {}",
    "unreadable": "is left to a worker, which moves it to failed",
}
"""What `--repair` would do, by the kind of finding."""
DID = {"ghost": "taken out of {}", "orphan": "moved to {}", "two-states": "left in {} alone", "too-old": "moved to {}"}
SPANS_KEPT = 10_000
"""How many jobs' times are kept until their end is known; that of a job which could not be settled never is."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code; `arguments` are those of the process by default."""
    _on_signals(_end_at_once)
    parser = _Parser(prog="python -m beequeue", description="bee-queue's command line", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="process a queue's jobs", allow_abbrev=False)
    worker.set_defaults(run=_worker)
    checker = commands.add_parser("check", help="look a queue over for damage", allow_abbrev=False)
    checker.set_defaults(run=_check)
    _add_worker_arguments(worker)
    _add_check_arguments(checker)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # by name only: what follows one may be a URL, or half of a password
        names = [name for each in unknown if _OPTION.fullmatch(name := each.partition("=")[0])]
        parser.error(f"unrecognized arguments: {' '.join(names) or f'{len(unknown)} without an option'}")
    return int(options.run(options))


def _add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    url, prefix = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379", QueueSettings().prefix
    add = parser.add_argument
    add("--redis", metavar="URL", type=_url, default=url, help="default: the variable REDIS_URL, else redis://127.0.0.1:6379")
    add("--prefix", type=_text, default=prefix, help=f"first part of the keys (default: {prefix})")


def _add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = QueueSettings()
    add = parser.add_argument
    add("handler", metavar="module:handler", type=load_handler, help="an async or plain function, from a job to its result")
    add("--queue", metavar="NAME", type=_text, required=True)
    add("--concurrency", metavar="N", type=_at_least_one, default=1, help="jobs at once (default: 1)")
    _add_connection_arguments(parser)
    add("--stall-interval", metavar="MS", type=_at_least_one, default=defaults.stall_interval, help="the same across a fleet")
    add("--max-stalls", metavar="N", type=_at_least_one, help="fail a job that loses its worker more often than N times")
    add("--remove-on-success", action="store_true", help="delete succeeded jobs")
    add("--remove-on-failure", action="store_true", help="delete failed jobs")
    add("--no-delayed", dest="activate_delayed_jobs", action="store_false", help="leave delayed jobs to others")
    add("--timeout", metavar="MS", type=_at_least_one, default=5_000, help="how long jobs may go on after SIGTERM or SIGINT")
    add("-v", "--verbose", action="store_true", help="one line a job")


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", type=_text, help="the queue")
    _add_connection_arguments(parser)
    add("--json", action="store_true", help="one JSON object, with every finding")
    add("--repair", action="store_true", help="repair what is found; without it nothing is changed")
    old = "also name active jobs that were created this long ago, when no stall check is in force"
    add("--older-than", metavar="SECONDS", type=_seconds, help=old)


# --- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")


MOST_SECONDS = (2**53 - 1) // 1000
"""So many are a number of ms that Node can tell, too."""
_OPTION = re.compile("--?[a-z]+(-[a-z]+)*")


def _at_least_one(value: str) -> int:
    if not (value.isascii() and value.isdigit() and value.strip("0")):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {value!r}")
    if len(value) > 15:
        raise argparse.ArgumentTypeError(f"must have at most 15 digits, not {value!r}")
    return int(value)


def _seconds(value: str) -> int:
    seconds = _at_least_one(value)
    if seconds > MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_SECONDS}, not {value!r}")
    return seconds


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text that UTF-8 can carry, not {value!r}") from None
    return value


def _url(value: str) -> str:
    try:
        check_redis_url(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"(or REDIS_URL) {error}") from None
    return value


_HANDLER = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def load_handler(target: str) -> Any:
    """The function that `module:name` names, both of them dotted or not; raises `ArgumentTypeError`."""
    module, _, path = target.partition(":")
    if not _HANDLER.fullmatch(target):
        given = "a URL" if "://" in target or "@" in target else repr(target)
        raise argparse.ArgumentTypeError(f"must be a module and a function, as in shop.mail:send, not {given}")
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
    return escape(" ".join(str(what).split())) or type(what).__name__


# --- the worker ------------------------------------------------------------------------------------------------------


def _worker(options: argparse.Namespace) -> int:
    # behind the handler's import: a module that sets up logging has its way
    out = logging.StreamHandler()
    out.addFilter(OneLine())  # a handler may log what is in its jobs
    logging.basicConfig(handlers=[out], format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        uvloop.run(_work(options))
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
    queue.on("error", lambda error: log.warning("%s: %s", type(error).__name__, _one_line(said(error))))
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


# --- the check -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.CRITICAL)  # what is lost is told once, below
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # an id need not be of the terminal's letters
    try:
        done, left = asyncio.run(_look_over(options))
    except BeeQueueError as error:
        print(f"python -m beequeue check: {_one_line(error)}", file=sys.stderr)
        return 3
    try:
        if options.json:
            _print_json(options.name, done, left)
        else:
            for line in _lines(options.name, done, left):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if left.findings else 0


async def _look_over(options: argparse.Namespace) -> tuple[Report | None, Report]:
    """What was repaired (None: that was not asked for), and what is wrong now. Raises what Redis said, or that it was lost."""
    address = Address(options.redis)
    transport, _kept = await address.open(2)  # a queue would wait for a Redis that is not there
    transport.abort()
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def give_up(attempt: int) -> int:
        complete(lost, ConnectionLost(f"the connection to {address} was lost before it was ready", maybe_applied=False))
        return linear_backoff(attempt)

    settings = QueueOptions(prefix=options.prefix, is_worker=False, get_events=False, store_jobs=False, reconnect=give_up)
    queue = Queue(options.name, options.redis, **settings)
    queue.on("error", lambda error: complete(lost, error))
    looking = asyncio.create_task(_check_and_repair(queue, options))
    try:
        await asyncio.wait((looking, lost), return_when=asyncio.FIRST_COMPLETED)
        return looking.result() if looking.done() else lost.result()  # type: ignore[return-value]  # the latter raises
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await queue.close()


async def _check_and_repair(queue: Queue, options: argparse.Namespace) -> tuple[Report | None, Report]:
    older_than = None if options.older_than is None else options.older_than * 1000
    report = await check(queue, older_than=older_than)
    if not options.repair:
        return None, report
    done = await repair(queue, report)
    return done, await check(queue, older_than=older_than) if report.findings else report


def _print_json(name: str, done: Report | None, left: Report) -> None:
    repaired = [] if done is None else [finding._asdict() for finding in done.findings]
    findings = [finding._asdict() for finding in left.findings]
    told = {"queue": name, "exists": left.exists, "jobs": left.jobs, "findings": findings, "repaired": repaired}
    print(json.dumps(told))


def _lines(name: str, done: Report | None, left: Report) -> Iterator[str]:
    """What a person reads: of each kind the first findings, and a summary. Nothing in it can steer a terminal."""
    if not left.exists:
        yield f"queue {name!r} does not exist: it has no keys"
        return
    if done is None:
        yield from _listed(left.findings, WOULD)
        yield f"queue {name!r}: {_counted(left.findings)} in {left.jobs:,} jobs"
    else:
        yield from _listed(done.findings, DID)
        yield from _listed(left.findings, WOULD)
        yield f"queue {name!r}: {_counted(done.findings)} repaired; {_counted(left.findings)} left in {left.jobs:,} jobs"


def _listed(findings: Sequence[Finding], verbs: Mapping[str, str]) -> Iterator[str]:
    for kind, count in counts(findings).items():
        of_kind = (finding for finding in findings if finding.kind == kind)
        for finding in islice(of_kind, SHOWN):
            remedy = verbs[kind].format(", ".join(finding.remedy))
            yield f"{kind} {finding.id!r} in {', '.join(finding.where) or 'no state'}: {remedy}"
        if count > SHOWN:
            yield f"{kind}: and {count - SHOWN:,} more"


def _counted(findings: Sequence[Finding]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts(findings).items())
    return f"{len(findings):,} finding{'' if len(findings) == 1 else 's'}" + (f" ({kinds})" if kinds else "")


def _on_signals(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _end_at_once(number: int, frame: object) -> NoReturn:
    os._exit(128 + number)


def _told(queue: Queue, handler: Handler) -> Handler:
    """`handler`, of the same kind, for jobs of which one line tells what became of each and how long its handler took."""
    spans: dict[Job, list[float]] = {}

    @functools.wraps(handler)
    async def run_async(job: Job) -> Any:
        span = spans[job] = [time.perf_counter()]
        try:
            return await handler(job)
        finally:
            span.append(time.perf_counter())

    @functools.wraps(handler)
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
