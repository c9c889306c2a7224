"""The ledger of a run under faults: which jobs were saved, run and reported as ended. Pure bookkeeping, no I/O.

`Ledger` records the producer's calls and events, `Notes` the workers' notes, and `Stored` the contents of Redis once all jobs
have ended. `discrepancies` compares the three; an empty list means that they add up.

The test numbers its jobs, since ids may start again at 1. A job's number determines its behaviour, unless it is one of the
`killers`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from beequeue import ConnectionLost, JobFailed, OutcomeUnknown

ENDS = ("succeeded", "failed")


def end_of(number: int) -> str:
    """How the job with this number must end."""
    return "failed" if number % 10 == 3 else "succeeded"


def retries_of(number: int) -> int:
    """How many of its attempts fail before the last one."""
    return 1 if number % 10 == 7 else 0


def is_delayed(number: int) -> bool:
    """Whether the job is delayed."""
    return number % 10 == 5


@dataclass
class Ledger:
    """The producer's side, by job number."""

    issued: int = 0
    """All numbers below this one have been issued."""
    first: int = 0
    """The first number of this page. A worker that was starved of time may start an attempt at a job of an earlier page, after
    a stall check gave the job to another worker: that page has counted the job already."""
    saved: dict[int, str] = field(default_factory=dict)
    """The ids of the jobs whose save Redis has confirmed."""
    uncertain: set[int] = field(default_factory=set)
    """The save failed, but may have been applied."""
    refused: set[int] = field(default_factory=set)
    """The save failed, and was certainly not applied."""
    removed: set[int] = field(default_factory=set)
    """The test has removed these jobs."""
    at_risk: set[int] = field(default_factory=set)
    """Jobs issued before Redis lost its data, whose end had not been reported by then."""
    forgotten: set[int] = field(default_factory=set)
    """All jobs issued before Redis lost its data."""
    told: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The ends that the job's own listeners received; `unknown` stands for `OutcomeUnknown`."""
    published: Counter[int] = field(default_factory=Counter)
    """How often the queue's own listeners received the job's end."""
    killers: set[int] = field(default_factory=set)
    """Jobs that kill their workers until they have stalled too often."""
    wrong: list[str] = field(default_factory=list)
    """Lines about ends that differ from the handler's."""

    def issue(self) -> int:
        """Returns the next number."""
        self.issued += 1
        return self.issued - 1

    def end_of(self, number: int) -> str:
        """How the job with this number must end."""
        return "failed" if number in self.killers else end_of(number)

    def save_failed(self, number: int, error: Exception) -> None:
        """Records a save that raised."""
        may_have_happened = isinstance(error, ConnectionLost) and error.maybe_applied
        (self.uncertain if may_have_happened else self.refused).add(number)

    def tell(self, number: int, event: str, value: Any) -> None:
        """Records a call of a job's own listener."""
        self.told[number].append(event)
        if event == "unknown":
            right = isinstance(value, OutcomeUnknown)
        elif number in self.killers:
            right = isinstance(value, JobFailed) and "stalled more than" in str(value)
        elif event == "failed":
            # After a reconnect the message comes from the stored stack trace.
            right = isinstance(value, JobFailed) and str(value) in (f"bad {number}", f"ValueError: bad {number}")
        else:
            right = value == {"number": number}
        if not right or event not in (self.end_of(number), "unknown"):
            self.wrong.append(f"job {number}: its reported end is {event} {value!r}")

    def redis_is_wiped(self) -> None:
        """Records that Redis has lost its data; reported ends stay reported."""
        self.forgotten |= set(range(self.issued))
        self.at_risk |= self.forgotten - self.told.keys()

    @property
    def unsettled(self) -> set[int]:
        """Saved jobs whose end has not been reported."""
        return self.saved.keys() - self.told.keys()

    @property
    def unknown(self) -> int:
        """How many jobs ended as `OutcomeUnknown`."""
        return sum(ends.count("unknown") for ends in self.told.values())


@dataclass
class Notes:
    """The notes of all workers."""

    started: Counter[int] = field(default_factory=Counter)
    finished: Counter[int] = field(default_factory=Counter)
    stalled: Counter[str] = field(default_factory=Counter)
    """How often a stall check brought back each id."""
    blocked: Counter[str] = field(default_factory=Counter)
    """How often a warning said that an id's handler blocks the event loop."""
    errors: Counter[str] = field(default_factory=Counter)
    """By class; for a `CommandError` also by its code."""
    ids: dict[int, str] = field(default_factory=dict)
    killed: int = 0
    """The number of workers that were killed."""

    def read(self, line: str) -> None:
        """Adds a line from a worker's file."""
        what, *rest = line.split()
        if what == "start":
            self.started[int(rest[1])] += 1
            self.ids[int(rest[1])] = rest[0]
        elif what == "finish":
            self.finished[int(rest[1])] += 1
        elif what == "stalled":
            self.stalled[rest[0]] += 1
        elif what == "blocked":
            self.blocked[rest[0]] += 1
        elif what == "error":
            self.errors[" ".join(rest)] += 1

    @property
    def cuts(self) -> int:
        """How often a worker may have lost a reply: to a stall check, a take or a settlement."""
        lost = sum(count for error, count in self.errors.items() if error.startswith(("ConnectionLost", "OutcomeNotRecorded")))
        return lost + self.killed

    def again(self) -> dict[int, int]:
        """How many extra attempts there were, for each job that had any."""
        extra = {number: count - 1 - retries_of(number) for number, count in self.started.items()}
        return {number: count for number, count in extra.items() if count > 0}


@dataclass
class Stored:
    """The contents of Redis, by id."""

    jobs: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The number and status of each entry."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """The ids in each list or set."""


def discrepancies(ledger: Ledger, notes: Notes, stored: Stored, *, tracked: int, reconnects: int) -> list[str]:
    """One line for each discrepancy. `tracked` bindings are left; the producer has reconnected `reconnects` times."""
    found = [*ledger.wrong]
    if tracked:
        found.append(f"{tracked} bindings are left")
    found += [f"{key} still holds {ids}" for key, ids in stored.places.items() if key not in ENDS and ids]
    found += _of_ends(ledger, notes, reconnects)
    found += _of_storage(ledger, stored)
    found += _of_runs(ledger, notes)
    return found


def _of_ends(ledger: Ledger, notes: Notes, reconnects: int) -> Iterable[str]:
    for number in sorted(ledger.saved.keys() | ledger.told.keys()):
        ends = ledger.told.get(number, [])
        if len(ends) != 1 or number not in ledger.saved:
            yield f"job {number}, id {ledger.saved.get(number)}: its reported ends are {ends}"
        may_vanish = number in ledger.at_risk or number in ledger.removed
        if "unknown" in ends and not (may_vanish or reconnects):
            yield f"job {number} ended as unknown, although no connection was lost"
        never_ends = number in ledger.killers
        if not never_ends and not notes.finished[number] and ("succeeded" in ends or "failed" in ends or not may_vanish):
            yield f"job {number} was saved but no attempt at it ended; its reported ends are {ends}"
    for number, count in ledger.published.items():
        if count > 1:
            yield f"job {number} was settled {count} times"
        if number not in ledger.killers and not notes.finished[number]:
            yield f"the end of job {number} was published, but no attempt at it ended"


def _of_storage(ledger: Ledger, stored: Stored) -> Iterable[str]:
    held = {number: (job_id, status) for job_id, (number, status) in stored.jobs.items()}
    if len(held) != len(stored.jobs):
        yield "two entries have the same job"
    for number in sorted(ledger.saved.keys() - held.keys() - ledger.removed - ledger.forgotten):
        yield f"job {number} was saved but is gone"
    places: defaultdict[str, list[str]] = defaultdict(list)
    for key, ids in stored.places.items():
        for job_id in ids:
            places[job_id].append(key)
    for number, (job_id, status) in held.items():
        where = places[job_id]
        if number not in ledger.saved and number not in ledger.uncertain:
            yield f"job {number} is stored, although its save failed"
        if number in ledger.removed:
            yield f"job {number} was removed but is back"
        if status != ledger.end_of(number) or where != [status]:
            yield f"job {number} is in {where} as {status}"
    for key, ids in stored.places.items():
        for job_id in set(ids) - stored.jobs.keys():
            yield f"id {job_id} in {key} has no entry"


def _of_runs(ledger: Ledger, notes: Notes) -> Iterable[str]:
    for number in sorted(notes.started.keys() - ledger.saved.keys() - ledger.uncertain - set(range(ledger.first))):
        yield f"job {number} was run, although its save failed"
    if not notes.cuts:
        for number, extra in notes.again().items():
            # The late settlement of a stalled attempt may settle the attempt that replaced it. A retry then adds one more.
            if extra > notes.stalled[notes.ids[number]] * (1 + retries_of(number)):
                yield f"job {number} ran {extra} times too often, and no stall check brought it back"


def summary(ledger: Ledger, notes: Notes) -> str:
    """The counts in one line."""
    told = f"{len(ledger.told)} ended, {ledger.unknown} as unknown"
    saves = f"{len(ledger.saved)} saved, {len(ledger.uncertain)} uncertain, {len(ledger.refused)} refused"
    stalled, lost = sum(notes.stalled.values()), notes.cuts - notes.killed
    runs = f"{sum(notes.again().values())} extra attempts, explained by {stalled} stalled, {notes.killed} killed workers"
    return f"{saves}; {told}; {runs}, {lost} lost replies; errors {dict(notes.errors)}"
