"""A queue looked over for damage, and repaired: `check`, `repair`, and `python -m beequeue check NAME [--repair]`.

A queue is read key by key while others work on it. What looks wrong in that picture (`suspects`, a plain function) is looked at
again, at one moment, and only what is wrong both times is named. `check` changes nothing; `repair` looks a third time, in
the step that repairs. What can be wrong, and what becomes of it:

ghost       An id in a list or a set has no data in `jobs`. It is taken out of all of them.

orphan      Data in `jobs`, and the id is in no state. A job whose stored status is `succeeded` or `failed` goes to that set: it
            has ended, and does not run again. (One that was retried by hand still says `failed`; it can be retried once more.)
            Any other goes to `waiting`, and runs at least once; or to `delayed`, if it was never tried and its time is to come.

two-states  An id in two states, or twice in one list. If its stored status says that it has ended, and it is in `succeeded` or
            `failed`, it stays there alone, and does not run again. Else it stays where it is furthest along: in `active`, else
            in `waiting`, else in `delayed`. It runs, and not beside itself. In a list, the one that is taken first stays.

too-old     An id in `active` that no worker reports: it is in `stalling`, and the stall check that put it there was more than
            its interval ago (`stallBlock` has expired). It goes to `waiting`, as by the next stall check. While such checks go
            on they see to it, and nothing is named. What has been taken since the last one (or there was none) is in `active`
            alone, and tells nothing: when a job was taken is not stored. With `older_than` it is named too, once no check is in
            force, if its job was created that long ago; choose longer than any job waits and runs.

unreadable  An entry of `jobs` is not JSON, or no object whose options are one too. It is left alone: the worker that takes it
            moves it to `failed`, where it is named no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from beequeue.errors import UnreadableData
from beequeue.fsck.store import FsckStore, Verdict
from beequeue.job import now_ms
from beequeue.queue import Queue
from beequeue.settings import Duration, milliseconds
from beequeue.wire.node_json import load_json

KINDS = ("ghost", "orphan", "two-states", "too-old", "unreadable")
"""The kinds of findings, in the order in which they are looked for and repaired; one id can be of several."""

STATES = ("succeeded", "failed", "delayed", "active", "waiting")
"""Read in this order, against the current: a job that moves on meanwhile is not met twice."""

MOST_AT_ONCE = 10_000
"""How many ids a script is given at most; it may have to walk all of `waiting` for them."""
LEAST_AT_ONCE = 100
BYTES_AT_ONCE = 4_000_000
"""How much data, about, the jobs of those ids may have: a script may have to read it."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    kind: str
    """One of `KINDS`."""
    id: str
    """The job's id."""
    where: tuple[str, ...]
    """The keys where the id stands; a list once for each time."""
    remedy: tuple[str, ...]
    """What `repair` does, or did: the keys that a ghost is taken out of; else the one key where the job will be."""


@dataclass(frozen=True)
class Report:
    """What was found in a queue, or repaired."""

    exists: bool
    """Whether the queue has any key."""
    jobs: int = 0
    """How many entries `jobs` has, about, when others work on it."""
    findings: Sequence[Finding] = ()
    """What is wrong; of `repair`, what was done."""
    created_until: int | None = None
    """With `older_than`: the time, in epoch ms, until which a job must have been created to be too old."""
    at_once: int = MOST_AT_ONCE
    """How many ids a script is to be given."""


@dataclass
class Snapshot:
    """A queue's ids as they were read, each key at another moment."""

    jobs: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    states: dict[str, Sequence[str]] = field(default_factory=dict)
    """By the names in `STATES`. A set has each id once."""
    stalling: set[str] = field(default_factory=set)
    guarded: bool = False
    """Whether a stall check was made less than its interval ago."""
    entry_bytes: int = 0
    """The size of all entries."""

    @property
    def at_once(self) -> int:
        """How many ids a script can be given, by the mean size of an entry."""
        mean = max(1, self.entry_bytes // max(1, len(self.jobs)))
        return min(MOST_AT_ONCE, max(LEAST_AT_ONCE, BYTES_AT_ONCE // mean))


def suspects(snapshot: Snapshot, *, old_too: bool = False) -> dict[str, list[str]]:
    """What looks wrong, by kind; ids in no particular order. `old_too`: suspect every active job of being too old.

    Of a queue that is at rest that is all that is wrong; of one that is worked on, more.
    """
    standing = set().union(*snapshot.states.values())
    seen: set[str] = set()
    twice: set[str] = set()
    for job_id in chain.from_iterable(snapshot.states.values()):
        (twice if job_id in seen else seen).add(job_id)
    active = set(snapshot.states.get("active", ()))
    silent = set() if snapshot.guarded else active if old_too else active & snapshot.stalling
    return {
        "ghost": list((standing | snapshot.stalling) - snapshot.jobs),
        "orphan": list(snapshot.jobs - standing),
        "two-states": list(twice & snapshot.jobs),
        "too-old": list(silent & snapshot.jobs),
        "unreadable": list(snapshot.unreadable - set(snapshot.states.get("failed", ()))),
    }


def is_readable(entry: bytes) -> bool:
    """Whether a worker can make a job of an entry in `jobs`."""
    try:
        stored = load_json(entry, "stored job")
    except UnreadableData:
        return False
    return type(stored) is dict and type(stored.get("options", {})) is dict


async def check(queue: Queue, *, older_than: Duration | None = None) -> Report:
    """Reads the whole queue and returns what is wrong with it, as the module tells. Changes nothing.

    `older_than` (ms or a `timedelta`, at least 1 ms) finds more of what is too old. Reads all keys but `id`, about a thousand
    ids in a command; the ids stay in memory meanwhile, the data does not. If anything looks wrong, each script that looks again
    (at up to 10,000 ids) walks through `active` and `waiting`. Raises `ValueError` or `TypeError` naming a wrong argument,
    `BeeQueueError` naming a key that is of another type than it must be, `RedisFailure`, `QueueClosed`.
    """
    created_until = None if older_than is None else now_ms() - milliseconds("older_than", older_than, at_least=1)
    store = await _store_of(queue)
    if not await store.exists():
        return Report(exists=False)
    snapshot = await _read(store)
    found = suspects(snapshot, old_too=created_until is not None)
    report = Report(True, len(snapshot.jobs), (), created_until, snapshot.at_once)
    findings: list[Finding] = []
    for kind, look in _looks(store, report).items():
        findings += await _examine(kind, found[kind], look, snapshot.at_once)
    return replace(report, findings=findings)


async def repair(queue: Queue, report: Report) -> Report:
    """Repairs what `check` has found, as the module tells, and returns what was done.

    What is well by now is left out, so a second call does nothing, and it can run beside workers, those of Node too. Writes all
    keys but `id`, `jobs` and `stallBlock`; tells `earlierDelayed` of a job that comes to `delayed`, and emits `stalled` (id) on
    the queue for one that was too old. Raises `RedisFailure`, `QueueClosed`; what was repaired by then stays.
    """
    store = await _store_of(queue)
    done: list[Finding] = []
    for kind, look in _looks(store, report, repair=True).items():
        if kind != "unreadable":
            job_ids = [finding.id for finding in report.findings if finding.kind == kind]
            done += await _examine(kind, job_ids, look, report.at_once)
    for finding in done:
        if finding.kind == "too-old":
            queue.emit("stalled", finding.id)
    return replace(report, findings=done)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each kind that has any, in the order of `KINDS`."""
    counted = Counter(finding.kind for finding in findings)
    return {kind: counted[kind] for kind in KINDS if counted[kind]}


async def _store_of(queue: Queue) -> FsckStore:
    await queue._host.opened()
    store = FsckStore(queue.key_prefix, queue.client.connection)
    if queue.settings.ensure_scripts:
        await store.load_scripts()
    return store


async def _read(store: FsckStore) -> Snapshot:
    """The first look: key by key, `jobs` before all that refers to it."""
    snapshot = Snapshot()
    async for job_id, entry in store.entries():
        if job_id not in snapshot.jobs:
            snapshot.jobs.add(job_id)
            snapshot.entry_bytes += len(entry)
        if not is_readable(entry):
            snapshot.unreadable.add(job_id)
    for kind in STATES:
        job_ids = [job_id async for job_id in store.ids_in(kind)]
        # a scan may give an id twice
        snapshot.states[kind] = job_ids if kind in ("active", "waiting") else list(dict.fromkeys(job_ids))
    snapshot.stalling = {job_id async for job_id in store.ids_in("stalling")}
    snapshot.guarded = await store.is_guarded()
    return snapshot


Look = Callable[[Sequence[str]], Awaitable[list[Verdict]]]


def _looks(store: FsckStore, report: Report, *, repair: bool = False) -> dict[str, Look]:
    """The second look at some ids, by kind."""
    return {
        "ghost": lambda job_ids: store.ghosts(job_ids, repair=repair),
        "orphan": lambda job_ids: store.orphans(job_ids, repair=repair),
        "two-states": lambda job_ids: store.doubles(job_ids, repair=repair),
        "too-old": lambda job_ids: store.silent(job_ids, report.created_until, repair=repair),
        "unreadable": lambda job_ids: _unreadable(store, job_ids),
    }


async def _unreadable(store: FsckStore, job_ids: Sequence[str]) -> list[Verdict]:
    entries = await store.entries_of(job_ids)
    set_aside = await store.failed_of(job_ids)  # behind the entries: a worker may have come to one meanwhile
    well = Verdict("", "")
    return [
        well if entry is None or is_set_aside or is_readable(entry) else Verdict("jobs", "")
        for entry, is_set_aside in zip(entries, set_aside, strict=True)
    ]


async def _examine(kind: str, job_ids: Sequence[str], look: Look, at_once: int) -> list[Finding]:
    """Those of the ids that a second look finds wrong, chunk by chunk."""
    findings = []
    for start in range(0, len(job_ids), at_once):
        some = job_ids[start : start + at_once]
        for job_id, (where, remedy) in zip(some, await look(some), strict=True):
            if where or remedy:
                findings.append(Finding(kind, job_id, tuple(where.split()), tuple(remedy.split())))
    return findings
