"""Calls stay short, however many jobs a queue has: the stall check, raising delayed jobs, and a finish."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis as sync_redis
from redis.asyncio import Redis

import beequeue.store.store
from beequeue import CommandError, ConnectionLost, Job, LateFinish, Queue
from beequeue.job import now_ms
from beequeue.store.scripts import SCRIPTS
from beequeue.store.store import Finished, Settlement
from harness.server import Server
from tests.conftest import MakeQueue, Seen, until
from tests.observe import soon
from tests.relay import Line, Relay

AT_ONCE = 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.store.store, "CHECKED_AT_ONCE", AT_ONCE)


def entry(job_id: str) -> str:
    return f'{{"data":"{job_id}","options":{{"timestamp":1,"stacktraces":[]}},"status":"created"}}'


async def lose(redis: Any, queue: Queue, ids: list[str]) -> None:
    """Makes jobs that a worker took, the first one first; a check has marked them, and no heartbeat has reported them."""
    async with redis.pipeline() as pipe:
        pipe.delete(queue.to_key("stallBlock"))
        for job_id in ids:
            pipe.hset(queue.to_key("jobs"), job_id, entry(job_id))
            pipe.lpush(queue.to_key("active"), job_id)
            pipe.sadd(queue.to_key("stalling"), job_id)
        await pipe.execute()


def slices(queue: Queue, interval: int = 60_000, limit: int | None = None) -> AsyncIterator[Any]:
    return queue._store.check_stalled(interval, limit)


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def look(redis: Any, queue: Queue) -> tuple[list[str], list[str], set[str]]:
    """Returns `waiting` and `active`, each with the id that is next to be taken last; and `stalling`."""
    waiting, active = [await redis.lrange(queue.to_key(key), 0, -1) for key in ("waiting", "active")]
    return waiting, active, await redis.smembers(queue.to_key("stalling"))


# --- the stall check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 5, 0])
async def test_each_slice_is_small(make_queue: MakeQueue, redis: Any, limit: int | None) -> None:
    """ST-02, ST-14: together they do what one script would; the job that stalled first runs first"""
    queue = await make_queue().ready()
    ids = numbers(95)
    await lose(redis, queue, ids)
    told = [(stalled, [taken.id for taken in often]) async for stalled, often in slices(queue, limit=limit)]
    most = max(len(stalled) + len(often) for stalled, often in told)
    assert most == AT_ONCE if limit is None else 0 < most <= AT_ONCE / 3
    assert len(told) <= 2 * (len(ids) / most + 2)
    assert [job_id for slice in told for job_id in slice[limit == 0]] == ids
    assert [job_id for slice in told for job_id in slice[limit != 0]] == []
    moved = ids[::-1]
    assert await look(redis, queue) == (([], moved, {*ids}) if limit == 0 else (moved, [], set()))
    assert await redis.get(queue.to_key("stallBlock")) == "1"
    assert 50_000 < await redis.pttl(queue.to_key("stallBlock")) <= 60_000


async def test_the_work_grows_with_the_number_of_jobs_and_not_faster(own_server: Server, make_queue: MakeQueue) -> None:
    """counted in commands; none of them walks through a list"""
    async with Redis.from_url(own_server.url, decode_responses=True) as redis:
        queue = await make_queue(redis=own_server.url).ready()
        calls = []
        for count in (200, 400):
            await lose(redis, queue, numbers(count))
            await redis.config_resetstat()
            assert await queue.check_stalled_jobs() == count
            statistics = await redis.info("commandstats")
            assert "cmdstat_lrem" not in statistics
            calls.append(sum(command["calls"] for command in statistics.values()))
            await redis.delete(queue.to_key("waiting"))
        assert calls[1] < 2.1 * calls[0]
        await queue.destroy()


async def test_all_stalled_jobs_are_reported(make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ST-15: even 50,000"""
    monkeypatch.undo()
    queue = await make_queue().ready()
    ids = numbers(50_000)
    for start in range(0, len(ids), 10_000):
        await lose(redis, queue, ids[start : start + 10_000])
    stalled = Seen()
    queue.on("stalled", stalled)
    assert await queue.check_stalled_jobs() == len(ids)
    assert [job_id for (job_id,) in stalled.calls] == ids
    assert await redis.llen(queue.to_key("waiting")) == len(ids)
    await queue.destroy()


async def test_reported_jobs_stay_in_their_order(make_queue: MakeQueue, redis: Any) -> None:
    queue = await make_queue().ready()
    ids = numbers(95)
    await lose(redis, queue, ids)
    lost = ids[::7]
    await redis.srem(queue.to_key("stalling"), *({*ids} - {*lost}))
    assert await queue.check_stalled_jobs() == len(lost)
    kept = [job_id for job_id in ids[::-1] if job_id not in lost]
    assert await look(redis, queue) == (lost[::-1], kept, {*kept})


@pytest.mark.parametrize("seed", range(12))
async def test_random_events_between_two_slices(make_queue: MakeQueue, redis: Any, seed: int) -> None:
    """takes, reports, ends and removals; a crash of the checker; another check, here or in Node, that finds the block expired

    Each job stays in one place. A job that was taken or reported in the last interval does not count as stalled.
    """
    chance = random.Random(seed)
    queue = await make_queue().ready()
    waiting, active, stalling, jobs, block = map(queue.to_key, ("waiting", "active", "stalling", "jobs", "stallBlock"))
    ids = numbers(95)
    await lose(redis, queue, ids)
    live: set[str] = set()
    left = {*ids}

    async def something() -> None:
        match chance.choice(("take", "take", "finish", "report", "remove", "return")):
            case "take":
                if (job_id := await redis.lmove(waiting, active, "RIGHT", "LEFT")) is not None:
                    live.add(job_id)
            case "finish" | "remove" if left:
                job_id = chance.choice(sorted(left))
                await redis.lrem(active, 0, job_id)
                await redis.lrem(waiting, 0, job_id)
                await redis.srem(stalling, job_id)
                await redis.hdel(jobs, job_id)
                left.discard(job_id)
                live.discard(job_id)
            case "report" if held := sorted(await redis.lrange(active, 0, -1)):
                job_id = chance.choice(held)
                live.add(job_id)
                await redis.srem(stalling, job_id)
            case "return" if live:
                job_id = chance.choice(sorted(live))
                await redis.lrem(active, 0, job_id)
                await redis.srem(stalling, job_id)
                await redis.lpush(waiting, job_id)
                live.discard(job_id)

    async def as_node_checks() -> list[str]:
        found = [job_id for job_id in await redis.smembers(stalling) if await redis.lrem(active, 0, job_id)]
        for job_id in found:
            await redis.lpush(waiting, job_id)
        await redis.delete(stalling)
        if held := await redis.lrange(active, 0, -1):
            await redis.sadd(stalling, *held)
        await redis.set(block, "1", px=60_000)
        return found

    for _ in range(6):
        await redis.delete(block)
        await redis.srem(stalling, "", *live)  # each worker reports in each interval
        interrupted = False
        async for stalled, _ in slices(queue):
            assert not live & {*stalled}
            for _ in range(chance.randrange(6)):
                await something()
            assert Counter(await redis.lrange(active, 0, -1)) + Counter(await redis.lrange(waiting, 0, -1)) == Counter(left)
            if not interrupted and chance.random() < 0.05:
                interrupted = True
                if chance.random() < 0.5:
                    break  # the checker has crashed
                await redis.srem(stalling, "", *live)
                assert not live & {*await as_node_checks()}
    await redis.delete(block)
    await redis.srem(stalling, "", *live)
    async for _ in slices(queue):
        pass
    await redis.delete(block)
    await redis.srem(stalling, "", *live)
    async for _ in slices(queue):
        pass
    assert {*await redis.lrange(active, 0, -1)} == live
    assert {*await redis.lrange(waiting, 0, -1)} == left - live


async def test_two_checks_do_not_mix(make_queue: MakeQueue, redis: Any) -> None:
    """ST-12: a second one does nothing during the first; one that has lost the block stops, and marks nothing"""
    queue = await make_queue().ready()
    await lose(redis, queue, numbers(50))
    checking = slices(queue)
    await anext(checking)
    assert [told async for told in slices(queue)] == [([], [])]
    assert 5_000 < await redis.pttl(queue.to_key("stallBlock")) <= 60_000
    await redis.set(queue.to_key("stallBlock"), "1")  # it has expired, and Node checks
    before = await look(redis, queue)
    assert [told async for told in checking] == [([], [])]
    assert await look(redis, queue) == before


async def test_copies_of_an_id_come_back_as_one(make_queue: MakeQueue, redis: Any) -> None:
    """ST-14: in one slice, and in two"""
    queue = await make_queue().ready()
    ids = numbers(45)
    await lose(redis, queue, ["twice", *ids, "twice", "thrice", "thrice", "thrice"])
    await redis.delete(queue.to_key("stalling"))
    assert await queue.check_stalled_jobs() == 0
    await redis.delete(queue.to_key("stallBlock"))
    assert await queue.check_stalled_jobs() == len(ids) + 2
    waiting, active, stalling = await look(redis, queue)
    assert Counter(waiting) == Counter([*ids, "twice", "thrice"])
    assert (active, stalling) == ([], set())


@pytest.mark.parametrize("refused", [False, True])
async def test_jobs_that_stalled_too_often_fail_slice_by_slice(
    make_queue: MakeQueue, redis: Any, url: str, refused: bool
) -> None:
    """ST-14: a check holds at most one slice of them; an error of Redis is raised when all others have been moved"""
    queue = await make_queue(max_stalls=1, is_worker=False).ready()
    ids = numbers(95)
    await lose(redis, queue, ids)
    often = ids[::5]
    stalls = {job_id: f"1 {hashlib.sha1(entry(job_id).encode()).hexdigest()}" for job_id in often}
    await redis.hset(queue.to_key("stalls"), mapping=stalls)
    if refused:
        with sync_redis.Redis.from_url(url) as other:
            queue.on("stalled", lambda job_id: other.set(queue.to_key("failed"), "no set"))
            with pytest.raises(CommandError, match="WRONGTYPE"):
                await queue.check_stalled_jobs()
        active = await redis.lrange(queue.to_key("active"), 0, -1)
        assert {*often} <= {*active}
        assert (
            len(active) <= len(often) + 1
        )  # the refused job is back at the right end, so the last one waits for the next check
        await redis.delete(queue.to_key("failed"))
    else:
        order = Seen()
        queue.on("failed", lambda job, error: order(job.id))
        queue.on("stalled", order)
        assert await queue.check_stalled_jobs() == len(ids) - len(often)
        said = [int(job_id) for (job_id,) in order.calls]
        assert sorted(said) == [*range(95)]
        assert all(abs(number - at) <= AT_ONCE for at, number in enumerate(said))
        assert await redis.smembers(queue.to_key("failed")) == {*often}
    await queue.destroy()


@pytest.mark.parametrize("seed", range(5))
async def test_each_id_that_is_double_is_marked_and_stays_once(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """ST-14: in a long `active`; a copy removed from the part that is marked already hides no other id"""
    monkeypatch.setattr(beequeue.store.store, "CHECKED_AT_ONCE", 50)
    chance = random.Random(seed)
    queue = await make_queue().ready()
    ids = numbers(600)
    copies = [*chance.sample(ids, 60), *chance.choices(ids[:100], k=60), *ids[-20:]]
    await lose(redis, queue, ids)
    for job_id in copies:
        await redis.linsert(queue.to_key("active"), "BEFORE", chance.choice(ids), job_id)
    await redis.delete(queue.to_key("stalling"))
    assert await queue.check_stalled_jobs() == 0
    _, active, stalling = await look(redis, queue)
    assert sorted(active) == sorted(ids)
    assert stalling == {*ids}
    await queue.destroy()


async def test_a_slice_whose_answer_is_lost_is_done_once(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """the check goes on; only the events of the lost answer are missing"""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, get_events=False, reconnect=soon).ready()
        await lose(redis, queue, numbers(95))
        relay.cut_before("command", b"move 75")
        stalled = [job_id for told, _ in [told async for told in slices(queue)] for job_id in told]
        assert stalled == numbers(95)[:10] + numbers(95)[20:]
        waiting, active, stalling = await look(redis, queue)
        assert (waiting, active, stalling) == (numbers(95)[::-1], [], set())
        assert len(make_queue.claim(ConnectionLost)) == 1
        await queue.close()


async def test_counts_of_ended_jobs_are_dropped_in_slices(make_queue: MakeQueue, redis: Any) -> None:
    queue = await make_queue(max_stalls=3).ready()
    await redis.hset(queue.to_key("stalls"), mapping=dict.fromkeys(numbers(1_500), "1 0"))
    await redis.hset(queue.to_key("jobs"), "7", entry("7"))
    await redis.delete(queue.to_key("stallBlock"))
    told = [told async for told in slices(queue, limit=3)]
    assert len(told) > 1_500 / AT_ONCE / 3
    assert await redis.hkeys(queue.to_key("stalls")) == ["7"]


# --- delayed jobs ----------------------------------------------------------------------------------------------------


async def test_a_call_raises_a_bounded_number(make_queue: MakeQueue, redis: Any) -> None:
    """DL-08: the earliest jobs first; the next calls raise the others at once, in order"""
    queue = make_queue(get_events=False, activate_delayed_jobs=True, near_term_window=3_600_000, auto_connect=False)
    raised = Seen()
    queue.on("raised jobs", raised)
    delayed = {f"{number:05}": number + 1 for number in range(5_500)}
    await redis.zadd(queue.to_key("delayed"), delayed)
    await queue.connect()
    assert await raised.reaches(3) == [(2_000,), (2_000,), (1_500,)]
    assert (await redis.lrange(queue.to_key("waiting"), 0, -1))[::-1] == sorted(delayed)
    await redis.zadd(queue.to_key("delayed"), {"a": 5, "b": 6, "later": 4_000_000_000_000})
    assert await queue._store.raise_delayed(now_ms(), 0) == (2, 4_000_000_000_000)
    await queue.destroy()


# --- a finish --------------------------------------------------------------------------------------------------------


async def test_a_finish_walks_as_far_as_its_job(own_server: Server, make_queue: MakeQueue) -> None:
    """as MONITOR shows: LREM looks for one copy, and meets the newest job in `active` first"""
    async with Redis.from_url(own_server.url, decode_responses=True) as redis:
        queue = await make_queue(redis=own_server.url).ready()
        await redis.rpush(queue.to_key("active"), *numbers(1_000))
        async with redis.monitor() as monitor:
            queue.process(_echo)
            assert await (await queue.create_job("x").set_id("own").save()).result(10_000) == "x"
            async for command in monitor.listen():
                if command["command"].startswith("LREM"):
                    break
            assert command["command"].split()[2:] == ["1", "own"]
        await queue.close()
        await queue_is_gone(redis, queue)


async def queue_is_gone(redis: Any, queue: Queue) -> None:
    await redis.delete(*[key async for key in redis.scan_iter(f"{queue.key_prefix}*")])


async def _echo(job: Job) -> Any:
    return job.data


@pytest.mark.parametrize("first", ["succeeds", "fails", "is deleted"])
async def test_a_job_that_is_active_twice_ends_once(make_queue: MakeQueue, redis: Any, first: str) -> None:
    """QK-19: Node's retry makes a running job available again; the attempt that ends later is late"""
    gates = [asyncio.Event(), asyncio.Event()]
    started, ended = Seen(), Seen()

    def handler(number: int) -> Any:
        async def handle(job: Job) -> int:
            started()
            await gates[number].wait()
            if (first == "fails") == (number == 0):
                raise ValueError
            return number

        return handle

    producer = await make_queue(is_worker=False).ready()
    producer.on("job succeeded", ended)
    producer.on("job failed", ended)
    workers = [make_queue(get_events=False, remove_on_success=first == "is deleted") for _ in gates]
    workers[0].process(handler(0))
    await producer.create_job("x").save()
    await started.reaches(1)
    await redis.lpush(producer.to_key("waiting"), "1")
    workers[1].process(handler(1))
    await started.reaches(2)
    assert await redis.lrange(producer.to_key("active"), 0, -1) == ["1", "1"]
    gates[0].set()
    await ended.reaches(1)
    gates[1].set()
    await until(lambda: workers[1].late_finishes == 1)
    await producer.get_job("1")  # its answer comes after every message that was published before
    health = (await producer.check_health())[1:4]
    assert health == {"succeeds": (0, 1, 0), "fails": (0, 0, 1), "is deleted": (0, 0, 0)}[first]
    assert len(ended.calls) == 1
    assert len(make_queue.claim(LateFinish)) == 1


@pytest.mark.parametrize("place", ["waiting", "active", "delayed", None])
async def test_an_attempt_whose_job_was_retried_meanwhile_settles_nothing(
    make_queue: MakeQueue, redis: Any, place: str | None
) -> None:
    """QK-19: there is no second copy anywhere. The only one in `active` belongs to another attempt or a new job, and stays."""
    queue = await make_queue().ready()
    await redis.hset(queue.to_key("jobs"), "1", entry("1") + " ")
    await redis.lpush(queue.to_key("active"), "1", "other")
    await redis.lmove(queue.to_key("active"), queue.to_key("active"), "RIGHT", "LEFT")
    await redis.sadd(queue.to_key("stalling"), "1")
    if place == "delayed":
        await redis.zadd(queue.to_key(place), {"1": 4_000_000_000_000})
    elif place is not None:
        await redis.lpush(queue.to_key(place), "1")
    replies = Seen()
    settlement = Settlement("succeeded", entry("1").encode(), b"")
    finish = queue._store.build_finish([("1", entry("1").encode(), settlement)], take=0, on_end=replies)
    queue._store.send_finishes([finish])
    assert await replies.reaches(1) == [(Finished([False], [], None),)]
    waiting, active, stalling = await look(redis, queue)
    assert waiting == (["1"] if place == "waiting" else [])
    assert active == (["1", "other"] if place in ("active", None) else ["other"])
    assert stalling == (set() if place else {"1"})
    assert await redis.zscore(queue.to_key("delayed"), "1") == (4_000_000_000_000 if place == "delayed" else None)
    assert await redis.hget(queue.to_key("jobs"), "1") == entry("1") + " "
    assert await redis.exists(queue.to_key("succeeded")) == 0
    await queue.destroy()


async def test_an_old_attempt_leaves_a_new_job_with_its_own_id_alone(make_queue: MakeQueue, redis: Any) -> None:
    """QK-19: the old job was removed while it ran"""
    queue = await make_queue().ready()
    gates = {"old": asyncio.Event(), "newer": asyncio.Event()}
    started = Seen()

    async def handler(job: Job) -> Any:
        started()
        await gates[job.data].wait()
        return job.data

    queue.process(handler, 2)
    await queue.create_job("old").set_id("daily").save()
    await started.reaches(1)
    await queue.remove_job("daily")
    new = await queue.create_job("newer").set_id("daily").save()
    await started.reaches(2)
    gates["old"].set()
    await until(lambda: queue.late_finishes == 1)
    assert (await queue.check_health())[:4] == (0, 1, 0, 0)
    gates["newer"].set()
    assert await new.result(8_000) == "newer"
    assert len(make_queue.claim(LateFinish)) == 1


@pytest.mark.parametrize("later", [False, True], ids=["retry now", "retry later"])
async def test_a_repeated_finish_leaves_the_next_attempt_alone(
    make_queue: MakeQueue, redis: Any, url: str, later: bool
) -> None:
    """QK-22: its reply was lost, and another worker has the job by now: one failure makes two attempts, not three"""
    async with Relay(url) as relay:
        first = make_queue(redis=relay.url, get_events=False, reconnect=soon)
        second = make_queue(get_events=False, activate_delayed_jobs=True)
        second_gate, runs = asyncio.Event(), Seen()
        retrying = Seen()
        first.on("retrying", lambda job, error: retrying(job.uncertain))

        async def fail(job: Job) -> None:
            runs("first")
            raise ValueError("once")

        async def succeed(job: Job) -> str:
            runs("second")
            await second_gate.wait()
            return "done"

        def hold(line: Line, data: bytes) -> None:
            if SCRIPTS["finish"].sha.encode() in data and not first.reconnects:
                relay.hold("command")

        producer = await make_queue(is_worker=False).ready()
        job = producer.create_job("x").retries(3)
        await (job.backoff("fixed", 1) if later else job).save()
        relay.said_on = hold
        first.process(fail)
        await until(lambda: redis.exists(producer.to_key("delayed"), producer.to_key("waiting")))
        second.process(succeed)
        await runs.reaches(2)
        for line in relay.lines:
            line.cut()
        relay.release("command")
        assert await retrying.reaches(1) == [(True,)]
        assert await producer.check_health() == (0, 1, 0, 0, 0, 1)
        second_gate.set()
        assert await job.result(8_000) == "done"
        assert [who for (who,) in runs.calls] == ["first", "second"]
        assert (first.late_finishes, second.late_finishes) == (0, 0)
        make_queue.claim(ConnectionLost)
        await first.close()
