"""Redis's ACL: the users that the page names can do everything that their role needs, and need every one of their rights."""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis

import beequeue.store.store
import beequeue.wire.link
from beequeue import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused, Job, OperationTimedOut, Queue
from beequeue.fsck.findings import KINDS, check, repair
from beequeue.job import now_ms
from harness.server import Server, find_server, running_server
from tests.conftest import Seen, echo, until
from tests.fsck.test_fsck import command, entry, put
from tests.observe import soon, takes_no_more
from tests.pages import PAGES

PAGE = PAGES["docs/operations.md"]
LINES = re.findall(r"^    ACL SETUSER (\w+) (.*)$", PAGE, re.MULTILINE)
ROLES = ("worker", "producer", "checker")
RIGHTS = {role: " ".join(rights for name, rights in LINES if name == role).split() for role in ROLES}
"""The words of all the page's lines about each user."""
OPTIONAL = {"+ping", "+role", "+client|id", "+client|unblock"}
REFUSED = re.compile("(?i)NOPERM|no permissions to run|can't run this command|can't access|can't publish")


class Access:
    """A server with the users of one test, and queues made as one of these users or as the default user."""

    def __init__(self, server: Server, redis: Any) -> None:
        self.server = server
        self.redis = redis
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.user = f"user-{uuid.uuid4().hex[:12]}"
        self.errors: list[Exception] = []
        self.reported = asyncio.Event()
        self._queues: list[Queue] = []

    async def allow(self, role: str, without: str | None = None) -> None:
        """Makes the user as the page does, for this test's queue, without one of its rights."""
        rights = [right.replace("bq:add:", f"bq:{self.name}:") for right in RIGHTS[role] if right != without]
        assert len(rights) == len(RIGHTS[role]) - (without is not None)
        await self.redis.execute_command("ACL SETUSER", self.user, *rights)
        await self.redis.execute_command("ACL LOG", "RESET")

    @property
    def url(self) -> str:
        return f"unix://{self.user}:PASSWORD@{self.server.socket}"

    def queue(self, name: str | None = None, **settings: Any) -> Queue:
        """A queue made as the user."""
        queue = Queue(name or self.name, self.url, reconnect=soon, **settings)
        queue.on("error", self._error)
        self._queues.append(queue)
        return queue

    def other_side(self, **settings: Any) -> Queue:
        """A queue made as a user that may do everything."""
        queue = Queue(self.name, self.server.url, **settings)
        self._queues.append(queue)
        return queue

    def _error(self, error: Exception) -> None:
        self.errors.append(error)
        self.reported.set()

    async def refused(self) -> set[str]:
        """The commands, keys and channels that Redis has refused the user so far."""
        log = await self.redis.execute_command("ACL LOG")
        entries = [line if isinstance(line, dict) else dict(zip(line[::2], line[1::2], strict=True)) for line in log]
        return {line["object"] for line in entries if line["username"] == self.user}

    async def first_error(self, work: Awaitable[None]) -> BaseException | None:
        """The first error that `work` raises or a queue reports, or None."""
        working = asyncio.ensure_future(work)
        reported = asyncio.ensure_future(self.reported.wait())
        await asyncio.wait((working, reported), timeout=20, return_when=asyncio.FIRST_COMPLETED)
        reported.cancel()
        assert working.done() or self.errors, "neither an end nor an error"
        while not working.done():
            working.cancel()  # repeated, since the driver may swallow one
            await asyncio.wait((working,), timeout=0.05)
        (ended,) = await asyncio.gather(working, return_exceptions=True)
        return self.errors[0] if self.errors else ended

    async def close(self) -> None:
        for queue in self._queues:
            with suppress(BeeQueueError):
                await queue.close(1)
        await self.redis.execute_command("ACL DELUSER", self.user)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(find_server(os.environ)) as started:
        yield started


@pytest.fixture
async def access(server: Server) -> AsyncIterator[Access]:
    async with Redis.from_url(server.url, decode_responses=True) as redis:
        made = Access(server, redis)
        yield made
        await made.close()


# --- all that a role does ---------------------------------------------------------------------------------------------


async def produce(access: Access) -> None:
    """Does everything a producer does and uses each of its rights at least once."""
    access.other_side(get_events=False).process(echo)
    async with access.queue(is_worker=False) as queue:
        jobs = [queue.create_job(number) for number in range(3)]
        for error in (await queue.save_all(jobs)).values():
            raise error
        assert [await job.result(10_000) for job in jobs] == [0, 1, 2]
        later = await queue.create_job("later").delay_until(now_ms() + 3_600_000).save()
        assert await later.report_progress(1) == 1
        assert [await later.is_in_set(kind) for kind in ("waiting", "delayed", "succeeded")] == [False, True, False]
        assert [job.id for job in await queue.get_jobs("delayed")] == [later.id]
        assert await queue.get_jobs("waiting") == []
        assert {job.id for job in await queue.get_jobs("succeeded")} == {job.id for job in jobs}
        assert await queue.get_job(str(later.id)) is later
        assert await Job.from_id(queue, str(jobs[0].id)) is not None
        assert (await queue.check_health())[2:] == (3, 0, 1, 4)
        assert (await later.retry())[0] == 0
        await jobs[0].retry()
        assert await jobs[0].result(10_000) == 0
        await queue.remove_job(str(later.id))
        assert await queue.clean("succeeded") == 3
        await access.redis.script_flush()
        assert await (await queue.create_job("again").save()).result(10_000) == "again"


async def fail_twice(job: Job) -> Any:
    if job.data == "waits":
        await asyncio.Event().wait()
    if job.options.get("retries"):
        raise ValueError
    return job.data


async def work(access: Access) -> None:
    """Does everything a worker does and uses each of its rights at least once."""
    producer = access.other_side(is_worker=False)
    tidy = access.queue(get_events=False, remove_on_success=True)
    tidy.process(echo)
    await (await producer.create_job("quick").save()).result(10_000)
    await tidy.close()
    queue = await access.queue(activate_delayed_jobs=True, max_stalls=1).ready()
    raised = Seen()
    queue.on("raised jobs", raised)
    await access.redis.script_flush()
    for place in ("active", "stalling"):
        await put(access.redis, queue, [place], "lost")
    await put(access.redis, queue, ["waiting"], "ghost")
    await access.redis.hset(queue.to_key("jobs"), "lost", entry())
    await access.redis.hset(queue.to_key("stalls"), "gone", "1 0")
    await access.redis.zadd(queue.to_key("delayed"), {"far": 4_102_444_800_000})  # some jobs are left after each look
    await access.redis.delete(queue.to_key("stallBlock"))
    assert await queue.check_stalled_jobs() == 1
    jobs = [producer.create_job("later").delay_until(now_ms() + 20), producer.create_job("at once").retries(2)]
    jobs += [producer.create_job("a bit later").retries(2).backoff("fixed", 1)]
    assert await producer.save_all(jobs) == {}
    queue.process(fail_twice)
    assert [await job.result(10_000) for job in jobs] == ["later", "at once", "a bit later"]
    await raised.reaches(1)
    waits = await producer.create_job("waits").save()
    await until(lambda: queue.running)
    with pytest.raises(OperationTimedOut):
        await queue.close(1)
    access.other_side(get_events=False).process(echo)
    assert await waits.result(10_000) == "waits"


async def damage(access: Access) -> None:
    """Makes one finding of each kind, and one for each place where a repaired job goes."""
    queue, redis = access.other_side(is_worker=False), access.redis
    jobs = queue.to_key("jobs")
    for place in ("waiting", "active", "delayed", "succeeded", "failed", "stalling"):
        await put(redis, queue, [place], f"ghost-{place}")
    for job_id, state in (("done", "succeeded"), ("new", "created")):
        await redis.hset(jobs, job_id, entry(state))
    await redis.hset(jobs, "future", entry(delay=4_000_000_000_000))
    for job_id, places in (("two", ["waiting", "active", "delayed"]), ("silent", ["active", "stalling"]), ("bad", ["waiting"])):
        await redis.hset(jobs, job_id, "no job" if job_id == "bad" else entry())
        await put(redis, queue, places, job_id)


async def look_over(access: Access) -> None:
    """Does the same as `python -m beequeue check --repair`."""
    await damage(access)
    async with access.queue(is_worker=False, get_events=False, store_jobs=False) as queue:
        report = await check(queue)
        assert {finding.kind for finding in report.findings} == {*KINDS}
        done = await repair(queue, report)
        assert {finding.kind for finding in done.findings} == {*KINDS} - {"unreadable"}
        assert [finding.kind for finding in (await check(queue)).findings] == ["unreadable"]


DOES: dict[str, Callable[[Access], Awaitable[None]]] = {"worker": work, "producer": produce, "checker": look_over}


@pytest.mark.parametrize("role", ROLES)
async def test_with_the_rights_in_readme_a_role_can_do_all_that_it_does(access: Access, role: str) -> None:
    await access.allow(role)
    async with asyncio.timeout(30):
        assert await access.first_error(DOES[role](access)) is None
    assert await access.refused() == set()


def test_readme_grants_commands_one_by_one_and_each_once() -> None:
    for role, rights in RIGHTS.items():
        commands = [right for right in rights if right.startswith("+")]
        assert len(commands) == len(set(commands)) > 20, role
        assert not [right for right in commands if "@" in right]
        assert rights[: len(rights) - len(commands)][:7] == [
            "on",
            ">PASSWORD",
            "resetkeys",
            "~bq:add:*",
            "resetchannels",
            "&bq:add:*",
            "-@all",
        ]


@pytest.mark.parametrize(
    ("role", "right"),
    [(role, right) for role, rights in RIGHTS.items() for right in rights if right[0] == "+" and right not in OPTIONAL],
)
async def test_each_right_is_needed(access: Access, role: str, right: str) -> None:
    """without it the error says that something was refused, and Redis's log names it"""
    await access.allow(role, without=right)
    error = await access.first_error(DOES[role](access))
    assert isinstance(error, BeeQueueError), error
    assert REFUSED.search(str(error.__cause__ or error)), error
    assert await access.refused() >= {right[1:]}


# --- another queue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
async def test_the_keys_and_channels_of_another_queue_are_refused(access: Access, role: str) -> None:
    await access.allow(role)
    other = access.queue("other", is_worker=False, get_events=False)
    with pytest.raises(CommandError, match="NOPERM.*key"):
        await (check(other) if role == "checker" else other.create_job().save())
    if role != "checker":
        with pytest.raises(ConnectionRefused, match="NOPERM.*channel"):
            await access.queue("other", is_worker=False).ready()
    assert await access.redis.keys("bq:other:*") == []


async def test_a_producer_may_neither_take_jobs_nor_destroy_the_queue(access: Access) -> None:
    await access.allow("producer")
    queue = access.queue(is_worker=False)
    await queue.create_job().save()
    with pytest.raises(CommandError, match="NOPERM.*del"):
        await queue.destroy()
    worker = access.queue(get_events=False, stalled_check_interval=0)
    worker.process(echo)
    await until(lambda: len(access.errors) == 2)
    assert [REFUSED.search(str(error)) is not None for error in access.errors] == [True, True]
    assert {"brpoplpush", "set"} <= await access.refused()
    assert (await queue.check_health()).waiting == 1


# --- what can be left out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["+client|id", "+client|unblock", None])
async def test_closing_with_an_open_take(access: Access, monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """Redis is asked to end the take; if it refuses, the take runs its course. A job that arrives meanwhile is handed back."""
    monkeypatch.setattr(beequeue.store.store, "TAKE_WAIT_S", 1 if missing else 3_600)
    await access.allow("worker", missing)
    producer = await access.other_side(is_worker=False).ready()
    queue = access.queue(get_events=False)
    queue.process(echo)
    await (await producer.create_job(1).save()).result(10_000)
    await until(lambda: blocked(access))
    async with asyncio.timeout(20):
        if missing:
            closing = asyncio.create_task(queue.close())
            await until(lambda: takes_no_more(queue))
            await until(lambda: refused_some(access))
            await producer.create_job(2).save()
            await closing
            assert (await producer.check_health())[:2] == (1, 0)
            assert missing[1:] in await access.refused()
        else:
            await queue.close()
            assert await access.refused() == set()
    assert access.errors == []


async def blocked(access: Access) -> bool:
    clients = await access.redis.client_list()
    return any(client["user"] == access.user and client["cmd"] == "brpoplpush" for client in clients)


async def refused_some(access: Access) -> bool:
    return bool(await access.refused())


@pytest.mark.parametrize("right", ["ping", "role"])
async def test_without_these_a_quiet_connection_stays(access: Access, monkeypatch: pytest.MonkeyPatch, right: str) -> None:
    await access.allow("producer", without=f"+{right}")
    monkeypatch.setattr(beequeue.wire.link, "TICK_S", 0.01)
    queue = await access.queue(is_worker=False).ready()
    await until(lambda: refused_some(access))
    assert await access.refused() == {right}
    await queue.create_job().save()
    assert (queue.reconnects, access.errors) == (0, [])


async def test_the_rights_that_a_worker_without_max_stalls_does_not_need(access: Access) -> None:
    """its check finds a marked job, an unmarked one, and another worker's count"""
    (named,) = re.findall(r"^- (.*) where no `max_stalls` is set", PAGE, re.MULTILINE)
    await access.allow("worker")
    rights = [f"-{right}" for right in re.findall(r"`(\w+)`", named)]
    assert {f"+{right[1:]}" for right in rights} <= {*RIGHTS["worker"]}
    await access.redis.execute_command("ACL SETUSER", access.user, *rights)
    queue = await access.queue(stalled_check_interval=0).ready()
    for job_id, places in (("lost", ["active", "stalling"]), ("new", ["active"])):
        await access.redis.hset(queue.to_key("jobs"), job_id, entry())
        await put(access.redis, queue, places, job_id)
    await access.redis.hset(queue.to_key("stalls"), "gone", "1 0")
    assert await queue.check_stalled_jobs() == 1
    queue.process(echo)
    await until(lambda: access.redis.sismember(queue.to_key("succeeded"), "lost"))
    assert (access.errors, await access.refused()) == ([], set())


# --- afterwards -------------------------------------------------------------------------------------------------------


async def test_a_producer_that_reconnects_asks_about_its_jobs(access: Access) -> None:
    await access.allow("producer")
    queue = access.queue(is_worker=False)
    job = await queue.create_job("x").save()
    await access.redis.execute_command("CLIENT KILL", "USER", access.user)
    await until(lambda: queue.reconnects == 2)
    access.other_side(get_events=False).process(echo)
    assert await job.result(10_000) == "x"
    assert [type(error) for error in access.errors] == [ConnectionLost, ConnectionLost]
    assert await access.refused() == set()


async def test_a_right_taken_away_later_is_reported_to_the_caller(access: Access) -> None:
    await access.allow("producer")
    queue = await access.queue(is_worker=False).ready()
    await access.redis.execute_command("ACL SETUSER", access.user, "-evalsha")
    with pytest.raises(CommandError, match="NOPERM.*evalsha"):
        await queue.create_job().save()
    await access.redis.execute_command("ACL SETUSER", access.user, "+evalsha")
    assert (await queue.create_job().save()).id == "1"


async def test_the_command_as_a_checker(access: Access) -> None:
    """its first line lets it look, both let it repair"""
    await access.allow("checker")
    second = LINES[-1][1].split()
    assert LINES[-1][0] == "checker"
    await access.redis.execute_command("ACL SETUSER", access.user, *(right.replace("+", "-") for right in second))
    await damage(access)
    looked = await command(access.url, access.name)
    assert (looked.code, looked.errors) == (1, [])
    refused = await command(access.url, access.name, "--repair")
    assert (refused.code, refused.lines, len(refused.errors)) == (3, [], 1)
    assert REFUSED.search(refused.errors[0])
    await access.redis.execute_command("ACL SETUSER", access.user, *second)
    repaired = await command(access.url, access.name, "--repair")
    assert (repaired.code, repaired.errors) == (1, [])
    assert "0 findings" not in repaired.lines[-1]
