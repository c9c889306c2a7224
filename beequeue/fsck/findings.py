"""Checks a queue for damage, and repairs it: `check`, `repair`, and `python -m beequeue check NAME [--repair]`.

`check` reads the queue key by key while others work on it. It then looks again, at one moment, at each id that looks wrong in
that snapshot (`suspects`, a plain function), and reports only ids that are wrong both times. It changes nothing. `repair` looks
a third time, in the atomic step that repairs. The kinds of finding, and their repair:

- `ghost`: an id is in a list or a set, but `jobs` has no entry for it. The id is removed from every list and set.
- `orphan`: `jobs` has an entry, but its id is in no state. If the stored status is `succeeded` or `failed`, the id goes to
  that set: the job has ended and does not run again. (A job retried by hand still says `failed`; it can be retried again.)
  Any other job goes to `waiting` and runs at least once, or to `delayed` if it was never tried and is not yet due.
- `two-states`: an id is in two states, or twice in one list. If it is in `succeeded` or `failed`, and the stored status says
  that the job has ended, it stays in that set only, and does not run again. Otherwise it stays where it is furthest along: in
  `active`, else `waiting`, else `delayed`. It runs, but never twice at a time. In a list, the copy that would be taken first
  stays.
- `too-old`: an id is in `active`, but no worker reports it: it is in `stalling`, and the stall check that put it there was
  more than its interval ago (`stallBlock` has expired). It goes to `waiting`, as the next stall check would do. While stall
  checks go on, they take care of such jobs, and none is reported here. A job taken since the last stall check, or when there
  was none, is only in `active`, which proves nothing: Redis does not store when a job was taken. `older_than` reports it too,
  if no check is in force and the job was created that long ago; choose longer than any job waits and runs.
- `unreadable`: an entry of `jobs` is not a JSON object, or its options are not one. It is left alone: the worker that takes
  the job moves it to `failed`, where it is no longer reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

from beequeue.errors import UnreadableData
from beequeue.fsck.store import Damage, FsckStore
from beequeue.job import now_ms
from beequeue.queue import Queue
from beequeue.settings import Duration, milliseconds
from beequeue.wire.node_json import load_json

KINDS = ("ghost", "orphan", "two-states", "too-old", "unreadable")
"""The kinds of finding, in the order in which they are looked for and repaired. An id can have findings of several kinds."""

STATES = ("succeeded", "failed", "delayed", "active", "waiting")
"""Read in this order, against the flow of jobs, so that a job that moves on meanwhile is not read twice."""

MOST_AT_ONCE = 10_000
"""The most ids that a script is given. It may walk all of `waiting` to find them."""
LEAST_AT_ONCE = 100
BYTES_AT_ONCE = 4_000_000
"""About how many bytes the entries of those ids may have in total: a script may read them all."""


class Finding(NamedTuple):
    """One kind of damage to one id."""

    kind: str
    """One of `KINDS`."""
    id: str
    """The job's id."""
    where: tuple[str, ...]
    """The keys that hold the id; a list appears once for each copy."""
    remedy: tuple[str, ...]
    """The result of `repair`: the keys that a ghost is removed from; for other kinds, the one key that holds the job then."""


@dataclass(frozen=True)
class Report:
    """The findings of `check`, or those that `repair` has repaired."""

    exists: bool
    """Whether the queue has any key."""
    jobs: int = 0
    """How many entries `jobs` has; roughly, while others work on the queue."""
    findings: Sequence[Finding] = ()
    """In the order of `KINDS`."""
    created_until: int | None = None
    """With `older_than`: a job created after this time (epoch ms) is not too old."""
    at_once: int = MOST_AT_ONCE
    """How many ids a script is given."""


@dataclass
class Snapshot:
    """A queue's ids, with each key read at a different moment."""

    jobs: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    states: dict[str, Sequence[str]] = field(default_factory=dict)
    """The ids in each of `STATES`. A set lists each id once."""
    stalling: set[str] = field(default_factory=set)
    guarded: bool = False
    """Whether the last stall check was less than its interval ago."""
    entry_bytes: int = 0
    """The total size of all entries."""

    @property
    def at_once(self) -> int:
        """How many ids a script can be given, from the mean size of an entry."""
        mean = max(1, self.entry_bytes // max(1, len(self.jobs)))
        return min(MOST_AT_ONCE, max(LEAST_AT_ONCE, BYTES_AT_ONCE // mean))


def suspects(snapshot: Snapshot, *, old_too: bool = False) -> dict[str, list[str]]:
    """The ids that look wrong, by kind, in no particular order. With `old_too`, every active job is suspected of being too old.

    For a queue at rest these are exactly the damaged ids; for a queue in use, some of them are healthy.
    """
    standing = set().union(*snapshot.states.values())
    seen: set[str] = set()
    twice: set[str] = set()
    for job_id in chain.from_iterable(snapshot.states.values()):
        (twice if job_id in seen else seen).add(job_id)
    active = set(snapshot.states.get("active", ()))
    too_old = set() if snapshot.guarded else active if old_too else active & snapshot.stalling
    return {
        "ghost": list((standing | snapshot.stalling) - snapshot.jobs),
        "orphan": list(snapshot.jobs - standing),
        "two-states": list(twice & snapshot.jobs),
        "too-old": list(too_old & snapshot.jobs),
        "unreadable": list(snapshot.unreadable - set(snapshot.states.get("failed", ()))),
    }


def is_readable(entry: bytes) -> bool:
    """Whether a worker can read an entry of `jobs` as a job."""
    try:
        stored = load_json(entry, "stored job")
    except UnreadableData:
        return False
    return type(stored) is dict and type(stored.get("options", {})) is dict


async def check(queue: Queue, *, older_than: Duration | None = None) -> Report:
    """Reads the whole queue and reports its damage, as the module describes. Changes nothing.

    `older_than` (ms or a `timedelta`, at least 1 ms) reports more jobs as too old. Reads all keys except `id`, about a thousand
    ids per command, and holds all ids in memory, but not the entries. If anything looks wrong, each script that looks again (at
    up to 10,000 ids) walks through `active` and `waiting`. Raises `ValueError` or `TypeError` naming a wrong argument,
    `BeeQueueError` naming a key of the wrong type, `RedisFailure`, `QueueClosed`.
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
    """Repairs the findings of `check`, as the module describes, and returns those that it repaired.

    It skips ids that are no longer damaged, so a second call does nothing, and it is safe beside workers, including Node's.
    Writes all keys except `id`, `jobs` and `stallBlock`. Publishes to `earlierDelayed` when a job goes to `delayed`, and emits
    `stalled` (id) on the queue for a job that was too old. Raises `RedisFailure`, `QueueClosed`; repairs made before the error
    remain.
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
    """How many findings there are of each kind, in the order of `KINDS`, without kinds that have none."""
    counted = Counter(finding.kind for finding in findings)
    return {kind: counted[kind] for kind in KINDS if counted[kind]}


async def _store_of(queue: Queue) -> FsckStore:
    await queue._host.opened()
    store = FsckStore(queue.key_prefix, queue.client.connection)
    if queue.settings.ensure_scripts:
        await store.load_scripts()
    return store


async def _read(store: FsckStore) -> Snapshot:
    """The first look: key by key, and `jobs` before the keys that refer to it."""
    snapshot = Snapshot()
    async for job_id, entry in store.entries():
        if job_id not in snapshot.jobs:
            snapshot.jobs.add(job_id)
            snapshot.entry_bytes += len(entry)
        if not is_readable(entry):
            snapshot.unreadable.add(job_id)
    for kind in STATES:
        job_ids = [job_id async for job_id in store.ids_in(kind)]
        # A scan may return an id twice.
        snapshot.states[kind] = job_ids if kind in ("active", "waiting") else list(dict.fromkeys(job_ids))
    snapshot.stalling = {job_id async for job_id in store.ids_in("stalling")}
    snapshot.guarded = await store.is_guarded()
    return snapshot


Look = Callable[[Sequence[str]], Awaitable[dict[str, Damage]]]


def _looks(store: FsckStore, report: Report, *, repair: bool = False) -> dict[str, Look]:
    """For each kind, how to look again at some of its suspects."""
    return {
        "ghost": lambda job_ids: store.ghost(job_ids, repair=repair),
        "orphan": lambda job_ids: store.orphan(job_ids, repair=repair),
        "two-states": lambda job_ids: store.two_states(job_ids, repair=repair),
        "too-old": lambda job_ids: store.too_old(job_ids, report.created_until, repair=repair),
        "unreadable": lambda job_ids: _unreadable(store, job_ids),
    }


async def _unreadable(store: FsckStore, job_ids: Sequence[str]) -> dict[str, Damage]:
    entries = await store.entries_of(job_ids)
    failed = await store.failed_of(job_ids)  # After the entries: a worker may have moved one to `failed` in between.
    unreadable = [job_id for job_id, entry in entries.items() if job_id not in failed and not is_readable(entry)]
    return dict.fromkeys(unreadable, Damage(("jobs",), ()))


async def _examine(kind: str, job_ids: Sequence[str], look: Look, at_once: int) -> list[Finding]:
    """Looks again at some suspects, chunk by chunk, and returns a finding for each id that is still damaged."""
    findings = []
    for start in range(0, len(job_ids), at_once):
        damaged = await look(job_ids[start : start + at_once])
        findings += [Finding(kind, job_id, *damage) for job_id, damage in damaged.items()]
    return findings
