"""The harness's own client and workers, as processes under faults; and the faults that reach them.

`Harness` starts the processes, keeps their output, and waits until all chains have moved on. A fault acts on a `Ground` and
returns when it is over; `Harness.recovered` waits until client and workers are back.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from harness.member import Member
from harness.server import Server
from tests.conftest import until
from tests.observe import answers
from tests.relay import Relay

CHAINS = 7
NAME = "issue-189"
CLIENT_NAME = "harness"
"""The name of their connections in CLIENT LIST."""
BACK_S = 45
"""How long a recovery may take: 10 s to find a silent connection, two stall checks of 5 s, and 15 s of back-off."""
LOOK = """
local ids = redis.call('LRANGE', KEYS[1], 0, -1)
for _, id in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do ids[#ids + 1] = id end
return ids
"""
"""Reads both lists at one moment."""


class Harness:
    """client.py and `workers` processes of worker.py on the Redis at `url`; `redis` reaches the same Redis past all relays."""

    def __init__(self, url: str, redis: Any, *, workers: int = 3, **variables: str) -> None:
        url += ("&" if "?" in url else "?") + f"client_name={CLIENT_NAME}"
        self.redis = redis
        self.client = Member("client", [sys.executable, "client.py"])
        self.workers: list[Member] = []
        self.stats: list[dict[str, Any]] = []
        self.said: dict[str, list[str]] = {}
        """The stderr of each process, by line; for a worker also its stdout, which should be empty."""
        self._size = workers
        self._hired = 0
        self._variables = {**os.environ, "REDIS_URL": url, "QUEUE_NAME": NAME, "ORDERED_EVENTS": "true"}
        self._variables |= {"EXTENDED_STATS": "true", "STATS_INTERVAL": "0.5", "DURATION": "0", **variables}

    async def __aenter__(self) -> Self:
        for _ in range(self._size):
            await self.hire()
        await self._start(self.client, lambda line: self.stats.append(json.loads(line)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in (self.client, *self.workers):
            if member.code is None:
                os.kill(member.pid, signal.SIGKILL)
        await asyncio.gather(*(member.ended() for member in (self.client, *self.workers)))

    async def hire(self) -> None:
        """Starts a worker."""
        self._hired += 1
        worker = Member(f"worker_{self._hired}", [sys.executable, "worker.py"])
        await self._start(worker, None)
        self.workers.append(worker)

    async def _start(self, member: Member, out: Callable[[str], None] | None) -> None:
        said = self.said[member.name] = []
        await member.start(self._variables, out or said.append, said.append)

    async def kill_worker(self, worker: Member) -> None:
        """SIGKILL."""
        os.kill(worker.pid, signal.SIGKILL)
        await worker.ended()
        self.workers.remove(worker)

    async def retire(self, worker: Member) -> None:
        """SIGTERM."""
        await self._all_started()
        assert await worker.end() == 0
        self.workers.remove(worker)

    async def jobs(self) -> list[str]:
        """The ids in `waiting` and `active`, at one moment."""
        ids: list[str] = await self.redis.eval(LOOK, 2, self._key("waiting"), self._key("active"))
        return ids

    async def recovered(self) -> None:
        """Returns when each chain has a job in Redis that was saved since this call, and the client reports all alive."""
        last = int(await self.redis.get(self._key("id")) or 0)
        lines = len(self.stats)

        async def all_are_new() -> bool:
            ids = await self.jobs()
            return len(ids) == len(set(ids)) == CHAINS and all(int(job_id) > last for job_id in ids)

        try:
            await until(all_are_new, BACK_S)
            await until(lambda: any(line["numAlive"] == CHAINS for line in self.stats[lines:]), BACK_S)
        except TimeoutError as late:
            late.add_note(await self.account(last))
            raise

    async def account(self, last: int) -> str:
        """The last lines of each process, and the jobs in Redis: for an error message."""
        said = [f"{name}: {line}" for name, lines in self.said.items() for line in lines[-5:]]
        return "\n".join([f"waiting or active: {await self.jobs()}, wanted: beyond {last}", f"client: {self.stats[-1]}", *said])

    async def seven_are_left(self) -> None:
        """Stops the workers. Then exactly the seven jobs that the client keeps alive are in Redis."""
        await self.stop_workers()

        async def all_wait() -> bool:
            return len(await self.jobs()) == CHAINS

        await until(all_wait, BACK_S)
        lines = len(self.stats)
        await until(lambda: len(self.stats) > lines + 1)
        assert (self.stats[-1]["numAlive"], self.stats[-1]["numTracked"], len(await self.jobs())) == (CHAINS,) * 3

    async def stop_workers(self) -> None:
        """SIGTERM; each worker must hand back its jobs and exit with 0."""
        await self._all_started()
        assert {await worker.end() for worker in self.workers} <= {0}

    async def end(self) -> None:
        """SIGTERM to all: each process exits with 0 and has printed no traceback."""
        assert await self.client.end() == 0
        await self.stop_workers()
        for name, lines in self.said.items():
            assert "Traceback" not in "".join(lines), "\n".join((name, *lines))

    async def _all_started(self) -> None:
        """Waits for workers that were just started, which do not handle SIGTERM yet."""
        await until(lambda: all(self.count("connected;")[worker.name] for worker in self.workers), BACK_S)

    def count(self, pattern: str) -> dict[str, int]:
        """How many lines of each process match."""
        return {name: sum(bool(re.search(pattern, line)) for line in lines) for name, lines in self.said.items()}

    def _key(self, suffix: str) -> str:
        return f"bq:{NAME}:{suffix}"


@dataclass
class Ground:
    """The targets of a fault. `relay` is between the harness and the server."""

    server: Server
    relay: Relay
    redis: Any
    harness: Harness
    chance: random.Random

    async def restart(self, *, wipe: bool) -> None:
        """Kills the server and starts it again, with its append-only file or empty."""
        self.server.stop()
        if wipe:
            shutil.rmtree(self.server.directory / "appendonlydir")
        self.server.start()
        await answers(self.redis)


async def kill_workers(ground: Ground) -> None:
    """kill -9 of a worker: a stall check brings its jobs back. Another worker replaces it."""
    await ground.harness.kill_worker(ground.chance.choice(ground.harness.workers))
    await ground.harness.hire()


async def kill_each_connection(ground: Ground) -> None:
    """CLIENT KILL of every connection, one right after the other."""
    for client in await ground.redis.client_list():
        if client["name"] == CLIENT_NAME:
            await ground.redis.client_kill_filter(_id=client["id"])


async def relay_goes_silent(ground: Ground) -> None:
    """All connections are half-open, and neither side is told. Connections in use are given up after about 10 s."""
    harness = ground.harness
    lost = harness.count(" event connection .* lost: ")
    for line in (lines := [line for line in ground.relay.lines if line.is_open]):
        line.dead = True
    names = [member.name for member in (harness.client, *harness.workers)]
    await until(lambda: all(harness.count(" event connection .* lost: ")[name] > lost[name] for name in names), BACK_S)
    for line in lines:  # The server, and connections that are not in use, never notice.
        line.cut()


async def restart_with_aof(ground: Ground) -> None:
    """Redis is killed and comes back with everything that it had confirmed."""
    await ground.restart(wipe=False)


async def restart_without_aof(ground: Ground) -> None:
    """Redis is killed and comes back empty: all jobs have vanished."""
    await ground.restart(wipe=True)


async def flush_scripts(ground: Ground) -> None:
    """SCRIPT FLUSH."""
    await ground.redis.script_flush()


async def pause_clients(ground: Ground) -> None:
    """CLIENT PAUSE for 2 s."""
    await ground.redis.client_pause(2_000)


async def memory_runs_out(ground: Ground) -> None:
    """maxmemory, until saves are refused."""
    harness = ground.harness
    failed = harness.count("a save failed: OOM")["client"]
    await ground.redis.config_set("maxmemory", 1)
    await until(lambda: harness.count("a save failed: OOM")["client"] > failed, BACK_S)
    await ground.redis.config_set("maxmemory", 0)


Fault = Callable[[Ground], Awaitable[None]]


def _named(*functions: Fault) -> dict[str, Fault]:
    return {function.__name__.replace("_", "-"): function for function in functions}


OF_THE_HARNESS = _named(kill_workers, kill_each_connection, relay_goes_silent)
"""Faults of the harness alone, by name."""
OF_REDIS = _named(restart_with_aof, restart_without_aof, flush_scripts, pause_clients, memory_runs_out)
"""Faults of everything that uses this Redis, by name."""
