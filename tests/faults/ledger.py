"""The books of a run under faults: what was saved, what was run, what was told. Pure bookkeeping, no I/O.

`Ledger` has what the producer did and heard. `Notes` has what the workers wrote down, and `Stored` what Redis holds when all is
at rest. `discrepancies` holds the three against each other; an empty list means that they add up.

Jobs are known by a number of the test's own, since ids may start anew. What a job does follows from its number alone, unless it
is one of the `killers`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from beequeue import ConnectionLost, JobFailed, OutcomeUnknown

ENDS = ("succeeded", "failed")


def end_of(number: int) -> str:
    """How the job with this number is to end."""
    return "failed" if number % 10 == 3 else "succeeded"


def retries_of(number: int) -> int:
    """How many attempts of it fail before the one that counts."""
    return 1 if number % 10 == 7 else 0


def is_delayed(number: int) -> bool:
    """Whether it becomes due only after a while."""
    return number % 10 == 5


@dataclass
class Ledger:
    """The producer's side, by number."""

    issued: int = 0
    """Numbers below this one have been given out."""
    saved: dict[int, str] = field(default_factory=dict)
    """Redis has confirmed them, with this id."""
    uncertain: set[int] = field(default_factory=set)
    """The save failed, and may have happened."""
    refused: set[int] = field(default_factory=set)
    """The save failed, and certainly did not happen."""
    removed: set[int] = field(default_factory=set)
    """The test has removed them."""
    at_risk: set[int] = field(default_factory=set)
    """Issued before Redis lost its memory, without an end by then."""
    forgotten: set[int] = field(default_factory=set)
    """All that were issued before Redis lost its memory."""
    told: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The ends that the job's own listeners heard; `unknown` for one that nobody can tell."""
    published: Counter[int] = field(default_factory=Counter)
    """How often the queue's own listeners heard of its end."""
    killers: set[int] = field(default_factory=set)
    """They kill their workers until they have stalled too often."""
    wrong: list[str] = field(default_factory=list)
    """Ends that are not what the job's handler came to."""

    def issue(self) -> int:
        """The next number."""
        self.issued += 1
        return self.issued - 1

    def end_of(self, number: int) -> str:
        """How the job with this number is to end."""
        return "failed" if number in self.killers else end_of(number)

    def save_failed(self, number: int, error: Exception) -> None:
        """A save has raised."""
        may_have_happened = isinstance(error, ConnectionLost) and error.maybe_applied
        (self.uncertain if may_have_happened else self.refused).add(number)

    def tell(self, number: int, event: str, value: Any) -> None:
        """A job's own listener was called."""
        self.told[number].append(event)
        if event == "unknown":
            right = isinstance(value, OutcomeUnknown)
        elif number in self.killers:
            right = isinstance(value, JobFailed) and "stalled more than" in str(value)
        elif event == "failed":
            # after a reconnect the message comes from the stored stack trace
            right = isinstance(value, JobFailed) and str(value) in (f"bad {number}", f"ValueError: bad {number}")
        else:
            right = value == {"number": number}
        if not right or event not in (self.end_of(number), "unknown"):
            self.wrong.append(f"job {number} was told {event} {value!r}")

    def redis_is_wiped(self) -> None:
        """From now on Redis knows nothing; what has been told stays told."""
        self.forgotten |= set(range(self.issued))
        self.at_risk |= self.forgotten - self.told.keys()

    @property
    def unsettled(self) -> set[int]:
        """Saved jobs whose end has not been told."""
        return self.saved.keys() - self.told.keys()

    @property
    def unknown(self) -> int:
        """How many ended as `OutcomeUnknown`."""
        return sum(ends.count("unknown") for ends in self.told.values())


@dataclass
class Notes:
    """What all workers have written down."""

    started: Counter[int] = field(default_factory=Counter)
    finished: Counter[int] = field(default_factory=Counter)
    stalled: Counter[str] = field(default_factory=Counter)
    """Ids that a stall check brought back."""
    blocked: Counter[str] = field(default_factory=Counter)
    """Ids whose handler was said to block the event loop."""
    errors: Counter[str] = field(default_factory=Counter)
    """By class and, for what Redis said, its first word."""
    ids: dict[int, str] = field(default_factory=dict)
    killed: int = 0
    """How many workers were killed."""

    def read(self, line: str) -> None:
        """Takes a line from a worker's file."""
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
        """How often a reply to a worker may have been lost: a stall check's, a take's or a settlement's."""
        lost = sum(count for error, count in self.errors.items() if error.startswith(("ConnectionLost", "OutcomeNotRecorded")))
        return lost + self.killed

    def again(self) -> dict[int, int]:
        """Of the jobs that ran more often than they had to: how often more."""
        extra = {number: count - 1 - retries_of(number) for number, count in self.started.items()}
        return {number: count for number, count in extra.items() if count > 0}


@dataclass
class Stored:
    """What Redis holds, by id."""

    jobs: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Number and status of each entry."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """The ids in each list or set."""


def discrepancies(ledger: Ledger, notes: Notes, stored: Stored, *, tracked: int, reconnects: int) -> list[str]:
    """What does not add up, a line each; `tracked` bindings are left, and the producer has reconnected so often."""
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
            yield f"job {number}, id {ledger.saved.get(number)}, was told {ends}"
        may_vanish = number in ledger.at_risk or number in ledger.removed
        if "unknown" in ends and not (may_vanish or reconnects):
            yield f"job {number} ended as unknown, though no connection was lost"
        never_ends = number in ledger.killers
        if not never_ends and not notes.finished[number] and ("succeeded" in ends or "failed" in ends or not may_vanish):
            yield f"job {number}, told {ends}, was saved and never run to its end"
    for number, count in ledger.published.items():
        if count > 1:
            yield f"job {number} was settled {count} times"
        if number not in ledger.killers and not notes.finished[number]:
            yield f"the end of job {number} was published, and it was not run"


def _of_storage(ledger: Ledger, stored: Stored) -> Iterable[str]:
    held = {number: (job_id, status) for job_id, (number, status) in stored.jobs.items()}
    if len(held) != len(stored.jobs):
        yield "two entries have the same job"
    for number in sorted(ledger.saved.keys() - held.keys() - ledger.removed - ledger.forgotten):
        yield f"job {number} was saved and is gone"
    places: defaultdict[str, list[str]] = defaultdict(list)
    for key, ids in stored.places.items():
        for job_id in ids:
            places[job_id].append(key)
    for number, (job_id, status) in held.items():
        where = places[job_id]
        if number not in ledger.saved and number not in ledger.uncertain:
            yield f"job {number} is stored, and its save failed"
        if number in ledger.removed:
            yield f"job {number} was removed and is back"
        if status != ledger.end_of(number) or where != [status]:
            yield f"job {number} is in {where} as {status}"
    for key, ids in stored.places.items():
        for job_id in set(ids) - stored.jobs.keys():
            yield f"id {job_id} in {key} has no entry"


def _of_runs(ledger: Ledger, notes: Notes) -> Iterable[str]:
    for number in sorted(notes.started.keys() - ledger.saved.keys() - ledger.uncertain):
        yield f"job {number} was run, and its save failed"
    if not notes.cuts:
        for number, extra in notes.again().items():
            # what comes late from a stalled run may settle the run that took its place: a retry is then one attempt more
            if extra > notes.stalled[notes.ids[number]] * (1 + retries_of(number)):
                yield f"job {number} ran {extra} times more than it had to, and no stall check brought it back"


def summary(ledger: Ledger, notes: Notes) -> str:
    """One line of counts."""
    told = f"{len(ledger.told)} settled, {ledger.unknown} as unknown"
    saves = f"{len(ledger.saved)} saved, {len(ledger.uncertain)} uncertain, {len(ledger.refused)} refused"
    stalled, lost = sum(notes.stalled.values()), notes.cuts - notes.killed
    runs = f"{sum(notes.again().values())} runs more than needed, explained by {stalled} stalled, {notes.killed} killed workers"
    return f"{saves}; {told}; {runs}, {lost} lost replies; errors {dict(notes.errors)}"
