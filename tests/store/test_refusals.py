"""When Redis refuses a script a right or memory, no job is lost or doubled, and the error names the right."""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, ResponseError

from beequeue import CommandError, Queue
from beequeue.store.scripts import SCRIPTS
from beequeue.store.store import ARGS_AN_ATTEMPT
from beequeue.wire.link import with_refused_command
from harness.server import Server, find_server, running_server

OWN = {name: script for name, script in SCRIPTS.items() if not name.startswith("fsck")}
COMMANDS = {name: sorted({*re.findall(r"(?:call|pcall|in_batches)\('([A-Z]+)'", script.text)}) for name, script in OWN.items()}
UNDOING = {
    ("add_delayed_job", "HDEL"),
    ("add_delayed_job", "ZREM"),
    ("add_job", "HDEL"),
    ("add_jobs", "HDEL"),
    ("finish", "RPUSH"),
    ("hand_back", "LPUSH"),
    ("finish", "ZREM"),
    ("take", "RPUSH"),
}
"""Commands that a script calls only when another one was refused."""
UNSAID = {("finish", "SREM"), ("finish", "HEXISTS"), ("finish", "SISMEMBER")}
"""Commands whose refusal is reported elsewhere, or that are seldom called."""


def entry(job_id: str) -> str:
    return f'{{"data":"{job_id}","options":{{"timestamp":1,"stacktraces":[]}},"status":"created"}}'


class Stock:
    """A queue in Redis with jobs in each state."""

    STATES = ("waiting", "active", "delayed", "succeeded", "failed")

    def __init__(self, server: Server, redis: Any) -> None:
        self.server = server
        self.redis = redis
        self.prefix = f"bq:test-{uuid.uuid4().hex[:12]}:"
        self.jobs = {state: [f"{state}-{number}" for number in range(5)] for state in self.STATES}

    def key(self, suffix: str) -> str:
        return self.prefix + ("succeeded" if suffix == "ended" else suffix)

    async def fill(self) -> None:
        for state, ids in self.jobs.items():
            await self.redis.hset(self.key("jobs"), mapping={job_id: entry(job_id) for job_id in ids})
            match state:
                case "waiting" | "active":
                    await self.redis.rpush(self.key(state), *ids)
                case "delayed":
                    await self.redis.zadd(self.key(state), {job_id: at for at, job_id in enumerate(ids, 1)})
                case _:
                    await self.redis.sadd(self.key(state), *ids)
        await self.redis.sadd(self.key("stalling"), *self.jobs["active"])
        await self.redis.hset(self.key("stalls"), mapping={"succeeded-0": "1 0", "active-1": "9 0"})

    async def places(self) -> dict[str, list[str]]:
        """Returns the places of each job; a job without data has none."""
        found: dict[str, list[str]] = {job_id: [] for job_id in await self.redis.hkeys(self.key("jobs"))}
        for state in self.STATES:
            match state:
                case "waiting" | "active":
                    ids = await self.redis.lrange(self.key(state), 0, -1)
                case "delayed":
                    ids = await self.redis.zrange(self.key(state), 0, -1)
                case _:
                    ids = await self.redis.smembers(self.key(state))
            for job_id in ids:
                found.setdefault(job_id, []).append(state)
        return found

    async def balance(self) -> set[str]:
        """Returns all jobs; each must have one place and its data."""
        places = await self.places()
        data = await self.redis.hkeys(self.key("jobs"))
        assert {job_id: where for job_id, where in places.items() if len(where) != 1} == {}
        assert {*data} == {*places}
        return {*places}


def calls(name: str) -> list[Sequence[Any]]:
    """Returns the arguments of calls that together use each command of a script."""
    size = len(entry("active-0"))
    attempts = [
        ("active-0", "succeeded", "{}", "message", "", size),
        ("active-1", "failed", "{}", "message", "", size),
        ("active-2", "retry now", entry("active-2"), "message", "", size),
        ("active-3", "retry later", entry("active-3"), "message", 9, size),
        ("active-4", "delete", "", "message", "", size),
    ]
    assert {len(attempt) for attempt in attempts} == {ARGS_AN_ATTEMPT}
    match name:
        case "add_job":
            return [("", entry("new")), ("own", entry("own"))]
        case "add_jobs":
            return [("", entry("new"), "own", entry("own"))]
        case "add_delayed_job":
            return [("", entry("new"), 0), ("own", entry("own"), 99)]
        case "check_stalled_jobs":
            whole = [(1_000, limit, 1_000, 100, "check", "") for limit in (0, "")]
            return [(1_000, "", 1_000, 2, "check", "mark 0"), *whole]
        case "clean":
            return [(99, 10, "succeeded-0", "succeeded-1")]
        case "finish":
            again = [(*attempt[:-1], "0" * 40) for attempt in attempts]
            return [(0, *again[0]), (2, *sum(attempts, ())), (2,)]
        case "ended":
            return [(99, "waiting-0", "", "failed-0", "")]
        case "get_job":
            return [("waiting-0", ""), ("failed-0", 99)]
        case "hand_back":
            return [("active-0", "active-1")]
        case "look_up":
            return [(99, "waiting-0"), (99, "failed-0")]
        case "raise_delayed_jobs":
            return [(2, 1, 1)]
        case "remove_job":
            return [("waiting-0",), ("active-0",)]
        case "retry_job":
            return [("failed-0",), ("succeeded-0",), ("waiting-0",)]
        case "take":
            return [(0, "ghost"), (2, "active-0"), (1, ""), (2,)]
        case _:
            return [()]


def lost(name: str) -> set[str]:
    """Returns the jobs that a script may delete."""
    deleted = {"clean": ("succeeded-0", "succeeded-1"), "remove_job": ("waiting-0", "active-0"), "finish": ("active-4",)}
    return {*deleted.get(name, ())}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(find_server(os.environ)) as started:
        yield started


@pytest.fixture
async def stock(server: Server) -> AsyncIterator[Stock]:
    async with Redis.from_url(server.url, decode_responses=True) as redis:
        made = Stock(server, redis)
        await made.fill()
        yield made
        await redis.config_set("maxmemory", 0)
        await redis.delete(*[key async for key in redis.scan_iter(f"{made.prefix}*")])


async def drive(stock: Stock, client: Any, name: str) -> list[str]:
    """Calls a script as a worker or a producer would; returns the refusals."""
    refused = []
    maxmemory = (await stock.redis.config_get("maxmemory"))["maxmemory"]
    for arguments in calls(name):
        try:
            if name == "check_stalled_jobs":
                await stock.redis.delete(stock.key("stallBlock"))
                if arguments[-1]:
                    await stock.redis.config_set("maxmemory", 0)
                    await stock.redis.set(stock.key("stallBlock"), f"{arguments[-2]} {arguments[-1]}")
                    await stock.redis.config_set("maxmemory", maxmemory)
            reply = await client.eval(OWN[name].text, len(OWN[name].keys), *map(stock.key, OWN[name].keys), *arguments)
        except ResponseError as error:
            prefix = "NOPERM " if isinstance(error, NoPermissionError) else ""
            refused.append(with_refused_command(prefix + str(error), OWN[name].text))
        else:
            refused += [str(part) for part in reply if isinstance(part, Exception)] if isinstance(reply, list) else []
        await stock.balance()
    return refused


@pytest.mark.parametrize(("name", "command"), [(name, command) for name in OWN for command in COMMANDS[name]])
async def test_with_one_right_missing(stock: Stock, name: str, command: str) -> None:
    user = f"user-{uuid.uuid4().hex[:12]}"
    await stock.redis.execute_command("ACL SETUSER", user, "on", "nopass", "~*", "&*", "+@all", f"-{command.lower()}")
    before = await stock.balance()
    async with Redis.from_url(f"unix://{user}:x@{stock.server.socket}", decode_responses=True) as client:
        refused = await drive(stock, client, name)
    await stock.redis.execute_command("ACL DELUSER", user)
    assert await stock.balance() >= before - lost(name)
    if (name, command) not in UNDOING | UNSAID:
        assert refused
    assert [message for message in refused if command not in re.findall(r"[A-Z]+", message.rpartition("(")[2])] == []


@pytest.mark.parametrize("name", OWN)
async def test_at_maxmemory(stock: Stock, name: str) -> None:
    before = await stock.balance()
    await stock.redis.config_set("maxmemory", 1)
    refused = await drive(stock, stock.redis, name)
    await stock.redis.config_set("maxmemory", 0)
    after = await stock.balance()
    assert before - lost(name) <= after <= before
    assert bool(refused) == name.startswith("add_")


def test_each_command_is_driven() -> None:
    """a new script, or one that calls a new command, needs a case here"""
    assert Counter(map(bool, COMMANDS.values())) == {True: len(OWN)}
    assert {name for name, command in UNDOING | UNSAID if command not in COMMANDS[name]} == set()


async def test_the_caller_sees_which_right_is_missing(stock: Stock) -> None:
    user = f"user-{uuid.uuid4().hex[:12]}"
    await stock.redis.execute_command("ACL SETUSER", user, "on", ">PASSWORD", "~*", "&*", "+@all", "-zcard", "-lpush")
    async with Queue(stock.prefix[3:-1], f"unix://{user}:PASSWORD@{stock.server.socket}", is_worker=False) as queue:
        with pytest.raises(CommandError, match=r"\(ZCARD\)$"):
            await queue.check_health()
        with pytest.raises(CommandError, match=r"\(LPUSH\)$"):
            await queue.create_job("x").save()
    await stock.redis.execute_command("ACL DELUSER", user)
