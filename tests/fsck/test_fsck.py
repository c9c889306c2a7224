"""`fsck`: each kind of damage, made by hand, is found and repaired; a healthy queue in use raises no false alarm."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import BeeQueueError, Job, Queue, fsck
from beequeue.command.check import DID, WOULD
from beequeue.fsck import findings
from beequeue.fsck.findings import KINDS, MOST_AT_ONCE, Finding, Report, Snapshot, _read, check, repair, suspects
from beequeue.fsck.store import SCRIPTS, FsckStore
from harness.server import Server, find_server, running_server
from tests import ROOT
from tests.conftest import MakeQueue, Seen, echo, until
from tests.relay import Line, Relay

LATER = 4_000_000_000_000


def entry(status: str = "created", timestamp: int = 1_700_000_000_000, **options: Any) -> str:
    job = {"data": {}, "options": {"timestamp": timestamp, "stacktraces": [], **options}, "status": status, "progress": 0}
    return json.dumps(job, separators=(",", ":"))


async def put(redis: Any, queue: Queue, places: Iterable[str], job_id: str) -> None:
    """Adds `job_id` to some keys; in a list on the left, where ids are pushed."""
    for place in places:
        key = queue.to_key(place)
        if place in ("waiting", "active"):
            await redis.lpush(key, job_id)
        elif place == "delayed":
            await redis.zadd(key, {job_id: LATER})
        else:
            await redis.sadd(key, job_id)


async def stored(redis: Any, queue: Queue) -> dict[str, Any]:
    """Everything that Redis holds of the queue, except expiry times."""
    held: dict[str, Any] = {"jobs": await redis.hgetall(queue.to_key("jobs"))}
    for place in ("waiting", "active"):
        held[place] = await redis.lrange(queue.to_key(place), 0, -1)
    held["delayed"] = await redis.zrange(queue.to_key("delayed"), 0, -1, withscores=True)
    for place in ("succeeded", "failed", "stalling"):
        held[place] = await redis.smembers(queue.to_key(place))
    for place in ("id", "stallBlock"):
        held[place] = await redis.get(queue.to_key(place))
    return held


async def places_of(redis: Any, queue: Queue, job_id: str) -> list[str]:
    """The keys that hold an id; a list once for each copy."""
    found = []
    for place in ("waiting", "active"):
        found += [place] * (await redis.lrange(queue.to_key(place), 0, -1)).count(job_id)
    found += ["delayed"] if await redis.zscore(queue.to_key("delayed"), job_id) is not None else []
    return found + [
        place for place in ("succeeded", "failed", "stalling") if await redis.sismember(queue.to_key(place), job_id)
    ]


async def repaired(redis: Any, queue: Queue, expected: list[Finding], **options: Any) -> None:
    """The check reports `expected` and changes nothing; one repair mends exactly that, and a second one does nothing."""
    before = await stored(redis, queue)
    report = await check(queue, **options)
    assert sorted(report.findings) == sorted(expected)
    assert await stored(redis, queue) == before
    assert sorted((await repair(queue, report)).findings) == sorted(expected)
    after = await stored(redis, queue)
    assert (await check(queue, **options)).findings == []
    assert (await repair(queue, report)).findings == []
    assert await stored(redis, queue) == after


@pytest.fixture
async def redis(url: str) -> Any:
    """A plain client that can decode any id."""
    from redis.asyncio import Redis

    async with Redis.from_url(url, decode_responses=True, encoding_errors="surrogateescape") as client:
        yield client


@pytest.fixture
def queue(make_queue: MakeQueue) -> Queue:
    return make_queue(is_worker=False, get_events=False)


# --- the kinds -------------------------------------------------------------------------------------------------------

GHOSTS = [
    ("waiting",),
    ("waiting", "waiting"),
    ("active",),
    ("delayed",),
    ("succeeded",),
    ("failed",),
    ("stalling",),
    ("waiting", "active", "delayed", "succeeded", "failed", "stalling"),
]


@pytest.mark.parametrize("places", GHOSTS, ids=" ".join)
async def test_ghosts(queue: Queue, redis: Any, places: tuple[str, ...]) -> None:
    await queue.create_job().set_id("good").save()
    await put(redis, queue, places, "ghost")
    await queue.create_job().set_id("better").save()
    await repaired(redis, queue, [Finding("ghost", "ghost", places, places)])
    assert await places_of(redis, queue, "ghost") == []
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["better", "good"]


ORPHANS = [
    (entry("created"), "waiting"),
    (entry("retrying"), "waiting"),
    (entry("succeeded"), "succeeded"),
    (entry("failed"), "failed"),
    (entry("created", delay=LATER), "delayed"),
    (entry("created", delay=1), "waiting"),
    (entry("retrying", delay=LATER), "waiting"),
    ('{"data":"\\ud800","options":{},"status":"failed","progress":0}', "failed"),
    ('{"data":"\\ud800","options":{},"status":"created","progress":0}', "waiting"),
]


@pytest.mark.parametrize(("data", "place"), ORPHANS, ids=range(len(ORPHANS)))
async def test_orphans(queue: Queue, redis: Any, data: str, place: str) -> None:
    await queue.create_job().set_id("good").save()
    await redis.hset(queue.to_key("jobs"), "orphan", data)
    await repaired(redis, queue, [Finding("orphan", "orphan", (), (place,))])
    assert await places_of(redis, queue, "orphan") == [place]
    assert await redis.hget(queue.to_key("jobs"), "orphan") == data
    if place == "waiting":  # on the left: jobs that waited before it go first
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["orphan", "good"]


async def test_a_delayed_orphan_wakes_the_worker_that_raises_jobs(make_queue: MakeQueue, queue: Queue, redis: Any) -> None:
    seconds, microseconds = await redis.time()
    due = seconds * 1000 + microseconds // 1000 + 2_000
    await redis.hset(queue.to_key("jobs"), "orphan", entry(delay=due))
    raiser = make_queue(activate_delayed_jobs=True)
    raiser.on("raised jobs", raised := Seen())
    await raiser.ready()
    report = await check(queue)
    assert report.findings == [Finding("orphan", "orphan", (), ("delayed",))]
    await repair(queue, report)
    assert await raised.reaches(1) == [(1,)]
    assert await places_of(redis, queue, "orphan") == ["waiting"]


TWO_STATES = [
    (("waiting", "waiting"), "created", "waiting"),
    (("active", "active"), "created", "active"),
    (("waiting", "active"), "created", "active"),
    (("waiting", "delayed"), "retrying", "waiting"),
    (("active", "delayed"), "retrying", "active"),
    (("waiting", "succeeded"), "succeeded", "succeeded"),
    (("waiting", "active", "delayed", "failed"), "failed", "failed"),
    (("active", "failed"), "failed", "failed"),
    (("waiting", "succeeded"), "created", "waiting"),  # the id was used again
    (("active", "failed"), "retrying", "active"),
    (("delayed", "failed"), "created", "delayed"),
    (("waiting", "active"), "failed", "active"),  # retried by hand: it has not ended
    (("succeeded", "failed"), "succeeded", "succeeded"),
    (("succeeded", "failed"), "failed", "failed"),
    (("succeeded", "failed"), "created", "failed"),
    (("waiting", "failed"), "succeeded", "failed"),
    (("waiting", "succeeded"), "failed", "succeeded"),
]


@pytest.mark.parametrize(
    ("places", "status", "kept"), TWO_STATES, ids=[f"{' '.join(case[0])}, {case[1]}" for case in TWO_STATES]
)
async def test_two_states(queue: Queue, redis: Any, places: tuple[str, ...], status: str, kept: str) -> None:
    await redis.hset(queue.to_key("jobs"), "two", entry(status))
    await put(redis, queue, places[:1], "two")
    await queue.create_job().set_id("good").save()
    await put(redis, queue, places[1:], "two")
    await repaired(redis, queue, [Finding("two-states", "two", places, (kept,))])
    assert await places_of(redis, queue, "two") == [kept]
    assert await places_of(redis, queue, "good") == ["waiting"]
    if places == ("waiting", "waiting"):  # the one that is taken first
        assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["good", "two"]


async def test_an_id_removed_from_active_is_removed_from_stalling(queue: Queue, redis: Any) -> None:
    await redis.hset(queue.to_key("jobs"), "two", entry("succeeded"))
    await put(redis, queue, ("active", "succeeded", "stalling"), "two")
    await redis.set(queue.to_key("stallBlock"), "1")
    await repaired(redis, queue, [Finding("two-states", "two", ("active", "succeeded"), ("succeeded",))])
    assert await places_of(redis, queue, "two") == ["succeeded"]


async def test_too_old(queue: Queue, redis: Any) -> None:
    """A job in `stalling` after the last check's interval; a job that is reported, or not copied yet, is left alone."""
    queue.on("stalled", stalled := Seen())
    for job_id in ("old", "reported"):
        await redis.hset(queue.to_key("jobs"), job_id, entry())
        await put(redis, queue, ["active"], job_id)
    await queue.create_job().set_id("good").save()
    await put(redis, queue, ["stalling"], "old")
    await redis.set(queue.to_key("stallBlock"), "1")
    assert (await check(queue)).findings == []
    await redis.delete(queue.to_key("stallBlock"))
    await repaired(redis, queue, [Finding("too-old", "old", ("active", "stalling"), ("waiting",))])
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["old", "good"]  # runs last, as after a stall check
    assert await places_of(redis, queue, "reported") == ["active"]
    assert stalled.calls == [("old",)]


async def test_older_than(queue: Queue, redis: Any) -> None:
    """No stall check has been made since the job was taken, and none is in force."""
    now = int((await redis.time())[0]) * 1000
    for job_id, timestamp in (("old", now - 100_000), ("young", now)):
        await redis.hset(queue.to_key("jobs"), job_id, entry(timestamp=timestamp))
        await put(redis, queue, ["active"], job_id)
    await redis.hset(queue.to_key("jobs"), "no time", '{"data":{},"options":{}}')
    await put(redis, queue, ["active"], "no time")
    assert (await check(queue)).findings == []
    await redis.set(queue.to_key("stallBlock"), "1")
    assert (await check(queue, older_than=50_000)).findings == []
    await redis.delete(queue.to_key("stallBlock"))
    await repaired(redis, queue, [Finding("too-old", "old", ("active",), ("waiting",))], older_than=50_000)
    assert await redis.lrange(queue.to_key("active"), 0, -1) == ["no time", "young"]


async def test_ids_that_recovered_after_the_check_are_left_alone(queue: Queue, redis: Any) -> None:
    """Every id that the check found is healthy again before the repair."""
    jobs = queue.to_key("jobs")
    await put(redis, queue, ["waiting"], "ghost")
    for job_id in ("orphan", "two", "old"):
        await redis.hset(jobs, job_id, entry())
    await put(redis, queue, ["waiting", "failed"], "two")
    await put(redis, queue, ["active", "stalling"], "old")
    report = await check(queue)
    assert fsck.counts(report.findings) == {"ghost": 1, "orphan": 1, "two-states": 1, "too-old": 1}
    await redis.hset(jobs, "ghost", entry())
    await put(redis, queue, ["waiting"], "orphan")
    await redis.srem(queue.to_key("failed"), "two")
    await redis.srem(queue.to_key("stalling"), "old")  # its worker's heartbeat
    before = await stored(redis, queue)
    assert (await repair(queue, report)).findings == []
    assert await stored(redis, queue) == before


async def test_a_stall_check_between_check_and_repair(queue: Queue, redis: Any) -> None:
    """The stall check copies the job to `stalling` again, so its worker has another interval to report it."""
    await redis.hset(queue.to_key("jobs"), "old", entry())
    await put(redis, queue, ["active", "stalling"], "old")
    report = await check(queue)
    assert fsck.counts(report.findings) == {"too-old": 1}
    await redis.set(queue.to_key("stallBlock"), "1")
    assert (await repair(queue, report)).findings == []
    assert await places_of(redis, queue, "old") == ["active", "stalling"]


UNREADABLE = ["", "{", "3", "[]", "null", '{"data":1,"options":3}']


@pytest.mark.parametrize("data", UNREADABLE)
async def test_unreadable(make_queue: MakeQueue, queue: Queue, redis: Any, data: str) -> None:
    """The entry is left to a worker, which moves it to `failed`; there it is no longer reported."""
    await redis.hset(queue.to_key("jobs"), "bad", data)
    await put(redis, queue, ["waiting"], "bad")
    report = await check(queue)
    assert report.findings == [Finding("unreadable", "bad", ("jobs",), ())]
    before = await stored(redis, queue)
    assert (await repair(queue, report)).findings == []
    assert await stored(redis, queue) == before
    worker = make_queue().process(echo)
    await until(lambda: places_are(redis, queue, "bad", ["failed"]))
    await worker.close()
    assert [type(error).__name__ for error in make_queue.claim(BeeQueueError)] == ["UnreadableData"]
    assert (await check(queue)).findings == []


async def places_are(redis: Any, queue: Queue, job_id: str, places: list[str]) -> bool:
    return await places_of(redis, queue, job_id) == places


async def test_an_unreadable_orphan_is_reported_as_both(queue: Queue, redis: Any) -> None:
    await redis.hset(queue.to_key("jobs"), "bad", "{")
    report = await check(queue)
    assert report.findings == [Finding("orphan", "bad", (), ("waiting",)), Finding("unreadable", "bad", ("jobs",), ())]
    assert (await repair(queue, report)).findings == report.findings[:1]
    assert (await check(queue)).findings == report.findings[1:]


async def test_half_a_settlement(make_queue: MakeQueue, redis: Any) -> None:
    """Redis refuses the command after LREM: the job stays in `active`, unchanged, and a stall check brings it back."""
    worker = make_queue()
    failed = worker.to_key("failed")
    await redis.set(failed, "not a set")
    job = await worker.create_job().save()

    def fail(job: Job) -> None:
        raise ValueError("no")

    worker.process(fail)
    await until(lambda: make_queue.errors)
    await worker.close()
    make_queue.claim(BeeQueueError)
    queue = make_queue(is_worker=False)
    with pytest.raises(BeeQueueError, match="failed' is not a set, as it must be$"):
        await check(queue)
    await redis.delete(failed)
    assert job.id is not None
    assert await places_of(redis, queue, job.id) == ["active"]
    assert '"status":"created"' in await redis.hget(queue.to_key("jobs"), job.id)


async def test_strange_ids(queue: Queue, redis: Any) -> None:
    """with spaces, with an escape sequence, and one that is not UTF-8"""
    ids = ["a b", "\x1b[2J", "\udcff", ""]
    for job_id in ids:
        await put(redis, queue, ["waiting", "succeeded"], job_id.encode(errors="surrogateescape"))  # type: ignore[arg-type]
    report = await check(queue)
    where = ("waiting", "succeeded")
    assert sorted(report.findings) == sorted(Finding("ghost", job_id, where, where) for job_id in ids)
    assert len((await repair(queue, report)).findings) == len(ids)
    assert await redis.exists(queue.to_key("waiting"), queue.to_key("succeeded")) == 0


async def test_many(queue: Queue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """more ids than a page, or a script, takes; in lists that a script reads in pieces"""
    monkeypatch.setattr(findings, "MOST_AT_ONCE", 1_500)
    jobs = queue.to_key("jobs")
    ids = [str(number) for number in range(6_500)]
    good, ghosts, orphans, twice = (ids[start::4] for start in range(4))
    await redis.hset(jobs, mapping={job_id: entry() for job_id in good + orphans + twice})
    await redis.rpush(queue.to_key("waiting"), *(job_id for job_id in ids if int(job_id) % 4 != 2), *ghosts, *twice)
    report = await check(queue)
    assert fsck.counts(report.findings) == {"ghost": len(ghosts), "orphan": len(orphans), "two-states": len(twice)}
    assert fsck.counts((await repair(queue, report)).findings) == fsck.counts(report.findings)
    waiting = await redis.lrange(queue.to_key("waiting"), 0, -1)
    assert sorted(waiting[: len(orphans)]) == sorted(orphans)
    assert waiting[len(orphans) :] == good + twice  # the others keep their order
    assert (await check(queue)).findings == []


async def test_a_queue_that_does_not_exist(queue: Queue) -> None:
    assert await check(queue) == Report(exists=False)


async def test_a_wrong_age(queue: Queue) -> None:
    with pytest.raises(ValueError, match="older_than must be at least 1 ms"):
        await check(queue, older_than=0)
    with pytest.raises(TypeError, match="older_than"):
        await check(queue, older_than=1.5)  # type: ignore[arg-type]


# --- the decision ----------------------------------------------------------------------------------------------------


def test_suspects() -> None:
    states: dict[str, Sequence[str]] = {
        "succeeded": ["s", "b"],
        "failed": ["u"],
        "delayed": ["d"],
        "active": ["a", "q"],
        "waiting": ["w", "w", "b", "g"],
    }
    snapshot = Snapshot({*"sbudaqwo"}, {*"uw"}, states, {*"aw"})
    found = {kind: sorted(job_ids) for kind, job_ids in suspects(snapshot).items()}
    assert found == {"ghost": ["g"], "orphan": ["o"], "two-states": ["b", "w"], "too-old": ["a"], "unreadable": ["w"]}
    assert tuple(found) == KINDS
    assert sorted(suspects(snapshot, old_too=True)["too-old"]) == ["a", "q"]
    snapshot.guarded = True
    assert suspects(snapshot, old_too=True)["too-old"] == []
    assert [*suspects(Snapshot()).values()] == [[]] * 5


@pytest.mark.parametrize(("size", "count"), [(0, MOST_AT_ONCE), (100, MOST_AT_ONCE), (4_000, 1_000), (10**7, 100)])
def test_how_many_at_once(size: int, count: int) -> None:
    """fewer when the entries are large"""
    assert Snapshot({"1", "2"}, entry_bytes=2 * size).at_once == count


def test_the_bounds_of_a_look() -> None:
    """A queue of which nothing was read has no jobs; entries of 401 bytes are the first to make a difference."""
    assert (MOST_AT_ONCE, findings.LEAST_AT_ONCE, findings.BYTES_AT_ONCE) == (10_000, 100, 4_000_000)
    assert (Report(False).jobs, Snapshot().entry_bytes) == (0, 0)
    assert Snapshot({"1"}, entry_bytes=400).at_once == 10_000
    assert Snapshot({"1"}, entry_bytes=401).at_once == 9_975
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report(False).jobs = 1  # type: ignore[misc]


@pytest.mark.parametrize("guarded", [True, False])
async def test_the_first_look_sees_whether_a_stall_check_was_just_made(queue: Queue, redis: Any, guarded: bool) -> None:
    """Then no job is suspected to be too old."""
    await redis.lpush(queue.to_key("active"), "1")
    await redis.sadd(queue.to_key("stalling"), "1")
    await redis.hset(queue.to_key("jobs"), "1", "{}")
    if guarded:
        await redis.set(queue.to_key("stallBlock"), "1")
    snapshot = await _read(await findings._store_of(queue))
    assert (snapshot.guarded, snapshot.entry_bytes) == (guarded, 2)
    assert suspects(snapshot)["too-old"] == ["1"] * (not guarded)


def test_each_kind_has_one_name() -> None:
    """in code, scripts, output and the pages"""
    assert {kind.replace("-", "_") for kind in KINDS} - {"unreadable"} == SCRIPTS.keys()
    assert tuple(WOULD) == KINDS
    assert set(DID) == {*KINDS} - {"unreadable"}
    pages = [page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    (described,) = [page for page in pages if "| ghost |" in page]
    assert [kind for kind in re.findall(r"^\| ([\w-]+) \|", described, re.MULTILINE) if kind in KINDS] == [*KINDS]


# --- a live queue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", [True, False], ids=["removed", "kept"])
async def test_no_false_alarm_under_load(make_queue: MakeQueue, remove: bool) -> None:
    """While jobs are saved, retried at once or later, and settled, three checks report nothing and the repairs do nothing."""
    settings: Any = {"remove_on_success": remove, "remove_on_failure": remove, "send_events": False, "get_events": False}

    async def handler(job: Job) -> None:
        number = job.data
        await asyncio.sleep(0)
        if number % 3 == 0:
            raise ValueError

    workers = [make_queue(activate_delayed_jobs=True, delayed_debounce=1, **settings) for _ in range(2)]
    for worker in workers:
        worker.process(handler, 5)
    producer = make_queue(is_worker=False, get_events=False)
    suspected: list[int] = []
    saved = 0
    stopped = asyncio.Event()

    async def produce() -> None:
        nonlocal saved
        while not stopped.is_set():
            jobs = [producer.create_job(number).retries(number % 2) for number in range(200)]
            for job in jobs[::4]:
                job.backoff("fixed", 1)
            assert await producer.save_all(jobs) == {}
            saved += len(jobs)
            await until(lambda: is_shorter(producer, 1_000))

    producing = asyncio.create_task(produce())
    checker = make_queue(is_worker=False, get_events=False)
    await until(lambda: saved > 1_000)
    looks = 0
    while looks < 3 or saved < 4_000:
        report = await check(checker)
        assert report.findings == []
        assert (await repair(checker, report)).findings == []
        suspected.append(await first_look(checker))
        looks += 1
    stopped.set()
    await producing
    assert max(suspected) > 0  # the second look was needed
    await until(lambda: is_empty(producer), deadline_s=30)
    assert (await check(checker)).findings == []


async def first_look(queue: Queue) -> int:
    snapshot = await findings._read(await findings._store_of(queue))
    return sum(len(job_ids) for job_ids in suspects(snapshot).values())


async def is_shorter(queue: Queue, length: int) -> bool:
    return (await queue.check_health()).waiting < length


async def is_empty(queue: Queue) -> bool:
    health = await queue.check_health()
    return health.waiting + health.active + health.delayed == 0


async def test_repairs_beside_workers_lose_no_job_and_repeat_none(make_queue: MakeQueue, redis: Any) -> None:
    """A repaired queue drains: each job that had not ended runs once, and no job that had ended runs again."""
    queue = make_queue(is_worker=False)
    jobs = queue.to_key("jobs")
    ran: list[str | None] = []
    damaged = []
    for number in range(300):
        job_id = f"d{number}"
        kind = number % 6
        if kind != 0:
            await redis.hset(jobs, job_id, entry("succeeded" if kind == 5 else "created", timestamp=1))
        places = [
            ["waiting"],
            [],
            ["waiting", "waiting"],
            ["active", "delayed"],
            ["waiting", "failed"],
            ["waiting", "succeeded"],
        ]
        await put(redis, queue, places[kind], job_id)
        if kind == 3:
            await put(redis, queue, ["stalling"], job_id)
        if kind not in (0, 5):
            damaged.append(job_id)

    report = await check(queue)
    assert len(report.findings) == 350  # the ids in active are also too old
    await repair(queue, report)
    assert (await check(queue)).findings == []
    assert (await queue.check_health())[:5] == (200, 0, 50, 0, 0)
    workers = [make_queue() for _ in range(2)]
    for worker in workers:
        worker.process(lambda job: ran.append(job.id), 3)
    await until(lambda: is_empty(queue))
    assert sorted(map(str, ran)) == sorted(damaged)
    assert (await queue.check_health())[:5] == (0, 0, 250, 0, 0)
    assert (await check(queue)).findings == []


# --- the command line ------------------------------------------------------------------------------------------------


class Ended:
    def __init__(self, code: int | None, out: bytes, err: bytes) -> None:
        self.code = code
        self.lines = out.decode().splitlines()
        self.errors = err.decode().splitlines()


async def command(url: str, *arguments: str, **environment: str) -> Ended:
    """Runs `python -m beequeue check …`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "beequeue", "check", *arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT), "REDIS_URL": url, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return Ended(process.returncode, out, err)


async def test_the_command(queue: Queue, redis: Any, url: str, name: str) -> None:
    """It reports and changes nothing; with `--repair` it repairs, and reports what is left."""
    jobs = queue.to_key("jobs")
    ended = await command(url, name)
    assert (ended.code, ended.lines) == (0, [f"queue {name!r} does not exist: it has no keys"])
    await queue.create_job().set_id("good").save()
    ended = await command(url, name)
    assert (ended.code, ended.lines) == (0, [f"queue {name!r}: 0 findings in 1 job"])
    await put(redis, queue, ["waiting", "failed"], "\x1b[2J")
    for job_id, data in (("orphan", entry()), ("two", entry("failed")), ("old", entry()), ("bad", "{")):
        await redis.hset(jobs, job_id, data)
    await put(redis, queue, ["waiting", "failed"], "two")
    await put(redis, queue, ["active"], "old")
    await put(redis, queue, ["delayed"], "bad")
    before = await stored(redis, queue)
    ended = await command(url, name, "--older-than", "60")
    assert (ended.code, ended.errors) == (1, [])
    assert ended.lines == [
        "ghost '\\x1b[2J' in waiting, failed: would be removed from waiting, failed",
        "orphan 'orphan' in no state: would be moved to waiting",
        "two-states 'two' in waiting, failed: would stay in failed only",
        "too-old 'old' in active: would be moved to waiting",
        "unreadable 'bad' in jobs: a worker that takes it moves it to failed",
        f"queue {name!r}: 5 findings (1 ghost, 1 orphan, 1 two-states, 1 too-old, 1 unreadable) in 5 jobs",
    ]
    assert await stored(redis, queue) == before
    ended = await command(url, name, "--repair", "--older-than", "60")
    assert (ended.code, ended.errors) == (1, [])
    assert ended.lines == [
        "ghost '\\x1b[2J' in waiting, failed: removed from waiting, failed",
        "orphan 'orphan' in no state: moved to waiting",
        "two-states 'two' in waiting, failed: stays in failed only",
        "too-old 'old' in active: moved to waiting",
        "unreadable 'bad' in jobs: a worker that takes it moves it to failed",
        f"queue {name!r}: 4 findings (1 ghost, 1 orphan, 1 two-states, 1 too-old) repaired; "
        "1 finding (1 unreadable) left in 5 jobs",
    ]
    await redis.hdel(jobs, "bad")
    ended = await command(url, name, "--repair")
    assert (ended.code, ended.lines[-1]) == (0, f"queue {name!r}: 1 finding (1 ghost) repaired; 0 findings left in 4 jobs")


async def test_the_command_in_json(queue: Queue, redis: Any, url: str, name: str) -> None:
    """JSON has every finding; text has the first of each kind."""
    ids = [f"{number}\x1b" for number in range(1_234)]
    await redis.sadd(queue.to_key("succeeded"), *ids)
    ended = await command(url, name)
    assert (ended.code, len(ended.lines)) == (1, 22)
    assert ended.lines[-2:] == ["ghost: and 1,214 more", f"queue {name!r}: 1,234 findings (1,234 ghost) in 0 jobs"]
    ended = await command(url, name, "--json")
    (line,) = ended.lines
    assert line.isprintable()
    told = json.loads(line)
    findings = told.pop("findings")
    assert told == {"queue": name, "exists": True, "jobs": 0, "repaired": []}
    assert sorted(finding["id"] for finding in findings) == sorted(ids)
    assert findings[0] == {"kind": "ghost", "id": findings[0]["id"], "where": ["succeeded"], "remedy": ["succeeded"]}
    ended = await command(url, name, "--json", "--repair")
    told = json.loads(ended.lines[0])
    assert (ended.code, told["findings"], len(told["repaired"])) == (0, [], 1_234)


async def test_the_command_with_another_prefix_and_address(make_queue: MakeQueue, redis: Any, url: str, name: str) -> None:
    queue = make_queue(is_worker=False, prefix="mine")
    await put(redis, queue, ["delayed"], "ghost")
    ended = await command("redis://127.0.0.1:1", name, "--prefix", "mine", "--redis", url)
    assert (ended.code, len(ended.lines)) == (1, 2)
    assert (await command(url, name)).code == 0


async def test_the_command_needs_redis(own_server: Server, url: str, name: str) -> None:
    """one line, without the password"""
    unreachable = await command("redis://user:secret@127.0.0.1:1", name)
    own_server.stop()
    gone = await command(own_server.url, name)
    for ended in (unreachable, gone):
        assert (ended.code, ended.lines, len(ended.errors)) == (3, [], 1)
        assert ended.errors[0].startswith("python -m beequeue check: ")
        assert "secret" not in ended.errors[0]


async def test_the_command_and_a_wrong_password(name: str) -> None:
    with running_server(find_server(os.environ), "--requirepass", "right") as server:
        url = f"unix://:{{}}@{server.socket}"
        wrong = await command(url.format("secret"), name, "--repair")
        none = await command(server.url, name)
        right = await command(url.format("right"), name)
    assert (wrong.code, wrong.lines) == (3, [])
    (line,) = wrong.errors
    assert line.startswith(f"python -m beequeue check: {server.socket}/0: ")
    assert "invalid" in line
    assert "secret" not in line
    assert (none.code, none.lines, len(none.errors)) == (3, [], 1)
    assert "Authentication required" in none.errors[0]
    assert (right.code, right.errors) == (0, [])


@pytest.mark.parametrize("word", ["SCRIPT", "EXISTS", "HSCAN", "LRANGE", "look", "repair"])
async def test_redis_goes_away_in_the_middle_of_a_check(own_server: Server, word: str) -> None:
    """Also while the check connects: one line, and the exit code for a Redis that cannot be reached."""
    async with Relay(own_server.url) as relay:
        queue = Queue("q", own_server.url, is_worker=False)
        await queue.create_job().save()
        async with Redis.from_url(own_server.url, decode_responses=True) as redis:
            await put(redis, queue, ["waiting", "failed"], "ghost")
        await queue.close()

        def hear(line: Line, data: bytes) -> None:
            if b"\r\n%s\r\n" % word.encode() in data:
                own_server.stop()

        relay.said_on = hear
        ended = await command(relay.url, "q", "--repair")
    assert own_server._process is None
    assert (ended.code, ended.lines) == (3, [])
    (line,) = ended.errors
    assert re.fullmatch(r"python -m beequeue check: .*connection.* lost.*", line)


async def test_the_command_and_a_key_of_another_type(queue: Queue, redis: Any, url: str, name: str) -> None:
    await redis.set(queue.to_key("delayed"), "text")
    ended = await command(url, name)
    line = f"python -m beequeue check: the key {queue.to_key('delayed')!r} is not a sorted set, as it must be"
    assert (ended.code, ended.lines, ended.errors) == (3, [], [line])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: NAME"),
        ([""], "argument NAME: must not be empty"),
        (["q", "--older-than", "0"], "argument --older-than: must be a whole number of at least 1, not '0'"),
        (["q", "--rep"], "unrecognized arguments: --rep"),
    ],
)
async def test_a_wrong_argument(arguments: list[str], line: str) -> None:
    ended = await command("redis://127.0.0.1:1", *arguments)
    assert (ended.code, ended.lines) == (2, [])
    assert ended.errors in ([f"python -m beequeue check: {line}"], [f"python -m beequeue: {line}"])


class Repeating(FsckStore):
    """Returns the last id of each page again in the next page, as a scan may do while a set shrinks."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue.key_prefix, queue.client.connection)
        self.named: list[str] = []

    async def _read(self, kind: str, command: bytes, *args: Any) -> Any:
        reply = await super()._read(kind, command, *args)
        if kind == "succeeded":
            if self.named:
                reply[1].append(self.named[-1].encode())
            self.named += [job_id.decode() for job_id in reply[1]]
        return reply


async def test_an_id_that_a_scan_returns_twice_is_read_once(queue: Queue, redis: Any) -> None:
    """otherwise it would be suspected of being in two states"""
    await queue.ready()
    await redis.sadd(queue.to_key("succeeded"), *range(40_000))
    store = Repeating(queue)
    snapshot = await _read(store)
    assert len(store.named) > len({*store.named}) == 40_000
    assert sorted(snapshot.states["succeeded"]) == sorted({*store.named})
