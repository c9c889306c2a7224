"""`python -m beequeue check`: checks a queue once, or repairs it, and prints the findings."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from beequeue.command.wording import counted
from beequeue.errors import BeeQueueError, ConnectionLost
from beequeue.escape import one_line
from beequeue.fsck.findings import Finding, Report, check, counts, repair
from beequeue.queue import Queue
from beequeue.settings import QueueOptions, linear_backoff
from beequeue.wire.address import Address
from beequeue.wire.link import complete

SHOWN = 20
"""How many findings of each kind are printed; `--json` prints all."""
WOULD = {
    "ghost": "would be removed from {}",
    "orphan": "would be moved to {}",
    "two-states": "would stay in {} only",
    "too-old": "would be moved to {}",
    "unreadable": "a worker that takes it moves it to failed",
}
"""The effect that `--repair` would have on a finding, by kind."""
DID = {
    "ghost": "removed from {}",
    "orphan": "moved to {}",
    "two-states": "stays in {} only",
    "too-old": "moved to {}",
}


def run(options: argparse.Namespace) -> int:
    """Checks the queue, prints the findings, and returns the exit code."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.CRITICAL)  # A lost connection is reported below.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # The terminal may lack an id's characters.
    try:
        done, left = asyncio.run(_check(options))
    except BeeQueueError as error:
        print(f"python -m beequeue check: {one_line(error)}", file=sys.stderr)
        return 3
    try:
        if options.json:
            print(as_json(options.name, done, left))
        else:
            for line in as_lines(options.name, done, left):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # The reader, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if left.findings else 0


async def _check(options: argparse.Namespace) -> tuple[Report | None, Report]:
    """Returns what was repaired (None without `--repair`) and what is still wrong. Raises when Redis refuses or is lost."""
    address = Address(options.redis)
    transport, _kept = await address.open(2)  # Fails at once, where a queue would wait for Redis to come back.
    transport.abort()
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def give_up(attempt: int) -> int:
        complete(lost, ConnectionLost(f"the connection to {address} was lost before it was ready", maybe_applied=False))
        return linear_backoff(attempt)

    settings = QueueOptions(prefix=options.prefix, is_worker=False, get_events=False, store_jobs=False, reconnect=give_up)
    queue = Queue(options.name, options.redis, **settings)
    queue.on("error", lambda error: complete(lost, error))
    checking = asyncio.create_task(_check_and_repair(queue, options))
    try:
        await asyncio.wait((checking, lost), return_when=asyncio.FIRST_COMPLETED)
        return checking.result() if checking.done() else lost.result()  # type: ignore[return-value]  # the latter raises
    finally:
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        await queue.close()


async def _check_and_repair(queue: Queue, options: argparse.Namespace) -> tuple[Report | None, Report]:
    older_than = None if options.older_than is None else options.older_than * 1000
    report = await check(queue, older_than=older_than)
    if not options.repair:
        return None, report
    done = await repair(queue, report)
    return done, await check(queue, older_than=older_than) if report.findings else report


def as_json(name: str, done: Report | None, left: Report) -> str:
    """One JSON object with every finding."""
    repaired = [] if done is None else [finding._asdict() for finding in done.findings]
    findings = [finding._asdict() for finding in left.findings]
    return json.dumps({"queue": name, "exists": left.exists, "jobs": left.jobs, "findings": findings, "repaired": repaired})


def as_lines(name: str, done: Report | None, left: Report) -> Iterator[str]:
    """The first findings of each kind and a summary, for a person to read. Nothing in them can steer a terminal."""
    if not left.exists:
        yield f"queue {name!r} does not exist: it has no keys"
        return
    if done is not None:
        yield from _listed(done.findings, DID)
    yield from _listed(left.findings, WOULD)
    repaired = "" if done is None else f"{_counted(done.findings)} repaired; "
    yield f"queue {name!r}: {repaired}{_counted(left.findings)}{' left' * (done is not None)} in {counted(left.jobs, 'job')}"


def _listed(findings: Sequence[Finding], remedies: Mapping[str, str]) -> Iterator[str]:
    for kind, count in counts(findings).items():
        of_kind = (finding for finding in findings if finding.kind == kind)
        for finding in islice(of_kind, SHOWN):
            remedy = remedies[kind].format(", ".join(finding.remedy))
            yield f"{kind} {finding.id!r} in {', '.join(finding.where) or 'no state'}: {remedy}"
        if count > SHOWN:
            yield f"{kind}: and {count - SHOWN:,} more"


def _counted(findings: Sequence[Finding]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts(findings).items())
    return counted(len(findings), "finding") + (f" ({kinds})" if kinds else "")
