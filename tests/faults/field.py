"""The set-up that faults happen to: a Redis, two worker processes, a producer, and load.

Producer and workers each reach Redis through a relay, `to_producer` and `to_workers`; only the onlooker does not. A fault waits
for progress (`more`), never for the clock. `settle` ends the load and checks that the ledger adds up.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis

from beequeue import BeeQueueError, ConnectionLost, ConnectionRefused, Job, Queue
from beequeue.fsck.findings import check
from beequeue.job import now_ms
from beequeue.wire.node_json import load_json
from harness.server import Server, find_server, running_server
from tests.conftest import until
from tests.faults.crew import Crew
from tests.faults.ledger import ENDS, Ledger, Stored, discrepancies, end_of, is_delayed, retries_of, summary
from tests.faults.provider import Moods, with_provider
from tests.faults.worker import soon
from tests.observe import ONLOOKER, answers, beequeue_tasks
from tests.relay import Distort, Line, Relay

STALL_INTERVAL_MS = 400
PATIENCE_S = 60
"""How long anything that must happen may take."""
PASSWORD = "old"
OPTIONS = (
    "--bind",
    "127.0.0.1",
    "--requirepass",
    PASSWORD,
    "--masterauth",
    PASSWORD,
    "--appendonly",
    "yes",
    "--appendfsync",
    "always",
    "--repl-diskless-sync-delay",
    "0",
)
LOAD = 12
"""How many jobs the load keeps in progress."""
PLACES = ("waiting", "active", "delayed", "stalling", *ENDS)

TWICE = """
local seen, twice = {}, {}
local function count(ids)
  for _, id in ipairs(ids) do
    if seen[id] then twice[#twice + 1] = id end
    seen[id] = true
  end
end
count(redis.call('LRANGE', KEYS[1], 0, -1))
count(redis.call('LRANGE', KEYS[2], 0, -1))
count(redis.call('ZRANGE', KEYS[3], 0, -1))
count(redis.call('SMEMBERS', KEYS[4]))
count(redis.call('SMEMBERS', KEYS[5]))
return twice
"""


class Field:
    """`seed` decides everything random."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.chance = random.Random(seed)
        self.ledger = Ledger()
        self.unexpected: list[Exception] = []
        self.refusals: list[ConnectionRefused] = []
        self.save_errors: Counter[str] = Counter()
        """Errors of the load's saves, by class; for a `CommandError` also by its code."""
        self._stack = AsyncExitStack()
        self._load: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()
        self._running = False

    async def __aenter__(self) -> Self:
        enter = self._stack.enter_async_context
        try:
            await self._set_up()
            redis = with_provider(self.to_producer.url, self.moods.path)
            self.producer = await enter(Queue(self.name, redis, is_worker=False, reconnect=soon))
        except BaseException:
            await self._stack.aclose()
            raise
        self.producer.on("error", self.hear)
        self.producer.on("job succeeded", self._published)
        self.producer.on("job failed", lambda job_id, error: self._published(job_id, {"number": self._number_in(str(error))}))
        self._begin()
        return self

    def _begin(self) -> None:
        self._running = True
        self._load = [asyncio.create_task(self._keep_going()) for _ in range(LOAD)]

    async def _set_up(self) -> None:
        enter = self._stack.enter_async_context
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bq", dir="/tmp")))
        self.server: Server = self._stack.enter_context(running_server(find_server(os.environ), *OPTIONS))
        self.moods = Moods(directory / "mood", PASSWORD)
        self.to_producer = await enter(Relay(self.server.url, remember=2**16, tcp=True))
        self.to_workers = await enter(Relay(self.server.url, remember=2**16, tcp=True))
        self.redis = await enter(self.onlooker(self.server.url))
        self.crew = Crew(self.to_workers.url, self.name, directory, STALL_INTERVAL_MS, self.moods.path)
        self._stack.push_async_callback(self.crew.bury)
        for _ in range(2):
            await self.crew.hire()
        await self.crew.ready()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        for task in self._load:
            task.cancel()
        await asyncio.gather(*self._load, return_exceptions=True)
        await self._stack.aclose()

    def another_server(self) -> Server:
        """A second Redis, like the first."""
        return self._stack.enter_context(running_server(find_server(os.environ), *OPTIONS))

    @staticmethod
    def onlooker(url: str) -> Any:
        """A plain client that bypasses the relays."""
        return Redis.from_url(with_password(url), decode_responses=True, client_name=ONLOOKER)

    async def look_on(self, url: str) -> None:
        """From now on `redis` is a client of another Redis."""
        self.redis = await self._stack.enter_async_context(self.onlooker(url))

    # --- load ------------------------------------------------------------------------------------------------------------

    def new_job(
        self,
        *,
        due: int | None = None,
        ms: int | None = None,
        blocks: bool = False,
        kills: bool = False,
        gated: bool = False,
        size: int = 0,
    ) -> tuple[int, Job, asyncio.Future[None]]:
        """Makes a job whose end goes to the ledger; returns its number, the job, and a future that completes when it ends.

        For `ms` its handler sleeps, or `blocks` the event loop. With `kills` it then kills its worker; with `gated` it then
        waits until its worker opens the gate. `size` adds that many bytes of data.
        """
        number = self.ledger.issue()
        if kills:
            self.ledger.killers.add(number)
        data = {"number": number, "end": "killed" if kills else end_of(number), "blocks": blocks, "gated": gated}
        data["filler"] = "x" * size
        data["ms"] = self.chance.randrange(2, 20) if ms is None else ms
        job = self.producer.create_job(data).retries(retries_of(number))
        if due is not None or is_delayed(number):
            job.delay_until(due or now_ms() + 30)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(event: str, value: Any) -> None:
            self.ledger.tell(number, event, value)
            self._ended.set()
            if not ended.done():
                ended.set_result(None)

        for event in (*ENDS, "unknown"):
            job.on(event, lambda value, event=event: end(event, value))
        return number, job, ended

    async def save_all(self, jobs: Sequence[tuple[int, Job, asyncio.Future[None]]]) -> None:
        """Saves jobs from `new_job` in bulk; every save must succeed."""
        assert await self.producer.save_all(job for _, job, _ in jobs) == {}
        for number, job, _ in jobs:
            assert job.id is not None
            self.ledger.saved[number] = job.id

    async def save_each(self, jobs: Sequence[tuple[int, Job, asyncio.Future[None]]]) -> None:
        """Saves jobs from `new_job` one by one, all at once; every save must succeed."""
        results = await asyncio.gather(*(job.save() for _, job, _ in jobs), return_exceptions=True)
        errors = []
        for (number, job, _), saved in zip(jobs, results, strict=True):
            if isinstance(saved, Exception):
                self.ledger.save_failed(number, saved)
                errors.append(saved)
            else:
                assert job.id is not None
                self.ledger.saved[number] = job.id
        assert not errors, errors

    async def make_due(self, jobs: Sequence[tuple[int, Job, asyncio.Future[None]]]) -> None:
        """Makes delayed jobs due now."""
        key, now = self.producer.to_key, now_ms()
        await self.redis.zadd(key("delayed"), {job.id: now for _, job, _ in jobs}, xx=True)
        await self.redis.publish(key("earlierDelayed"), now)

    async def _keep_going(self) -> None:
        while self._running:
            number, job, ended = self.new_job()
            try:
                await job.save()
            except BeeQueueError as error:
                self.ledger.save_failed(number, error)
                self.save_errors[f"{type(error).__name__} {getattr(error, 'code', '')}".strip()] += 1
                await asyncio.sleep(0.01)  # as a producer would
            else:
                assert job.id is not None
                self.ledger.saved[number] = job.id
                await ended

    async def more(self, count: int = 40) -> None:
        """Returns when `count` more jobs have ended."""
        wanted = len(self.ledger.told) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.ledger.told) < wanted:
                self._ended.clear()
                await self._ended.wait()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits for a condition; a `TimeoutError` says what producer and workers have reported."""
        try:
            await until(condition, PATIENCE_S)
        except TimeoutError as late:
            late.add_note(
                f"workers' errors: {dict(self.crew.look().errors)}; {self.producer.reconnects} reconnects of the producer"
            )
            late.add_note(self.crew.complaints.read_text()[-2_000:])
            raise

    def _number_in(self, message: str) -> int:
        """The number of the job that failed with this message."""
        if "stalled more than" not in message:
            return int(message.removeprefix("bad "))
        job_id = message.split()[1]
        return max(number for number in self.ledger.killers if self.ledger.saved.get(number) == job_id)

    def _published(self, job_id: str, result: Any) -> None:
        self.ledger.published[result["number"]] += 1

    @property
    def lost(self) -> tuple[int, int]:
        """How often the producer has reconnected, and how many lost connections the workers have reported."""
        return self.producer.reconnects, self.crew.look().errors["ConnectionLost"]

    def claim(self, kind: type[Exception]) -> list[Exception]:
        """Returns the reported errors of a kind, which are expected from now on."""
        claimed = [error for error in self.unexpected if isinstance(error, kind)]
        self.unexpected = [error for error in self.unexpected if not isinstance(error, kind)]
        return claimed

    def hear(self, error: Exception) -> None:
        """Sorts an error that a producer has reported."""
        if isinstance(error, ConnectionRefused):
            self.refusals.append(error)
        elif not isinstance(error, ConnectionLost):
            self.unexpected.append(error)

    # --- Redis -----------------------------------------------------------------------------------------------------------

    async def clients(self, redis: Any = None) -> list[dict[str, str]]:
        """The connections of producer and workers in CLIENT LIST. One that is still saying HELLO may be an onlooker's."""
        found = await (redis or self.redis).client_list()
        ours = [client for client in found if client["name"] == "" and client["flags"] not in ("S", "M")]
        return [client for client in ours if client["cmd"] not in ("hello", "NULL")]

    async def all_are_connected(self) -> bool:
        """Whether the producer has two connections and each worker three, in the eyes of the relays and of Redis.

        On a busy machine Redis still lists connections that a relay has cut.
        """
        return len(self.lines()) == len(await self.clients()) == 2 + 3 * len(self.crew.alive)

    async def kill(self, clients: Iterable[dict[str, str]], redis: Any = None) -> None:
        """CLIENT KILL."""
        for client in clients:
            await (redis or self.redis).client_kill_filter(_id=client["id"])

    async def restart(self, *, wipe: bool) -> None:
        """Kills the server and starts it again, with its append-only file or empty; returns when the producer is back."""
        reconnects = self.producer.reconnects
        self.server.stop()
        if wipe:
            self.ledger.redis_is_wiped()
            shutil.rmtree(self.server.directory / "appendonlydir")
        self.server.start()
        await answers(self.redis)
        await self.until(lambda: self.producer.reconnects > reconnects)

    def lines(self) -> list[Line]:
        """The open connections of both relays."""
        return [line for relay in (self.to_producer, self.to_workers) for line in relay.lines if line.is_open]

    def distort(self, distort: Distort | None) -> None:
        """Makes both relays apply this to everything that Redis sends."""
        self.to_producer.distort = self.to_workers.distort = distort

    async def assert_no_two_states(self) -> None:
        """No id is in two states, at one moment."""
        key = self.producer.to_key
        places = ("waiting", "active", "delayed", "succeeded", "failed")
        assert await self.redis.eval(TWICE, len(places), *map(key, places)) == []

    async def stored(self) -> Stored:
        """The contents of Redis."""
        key, redis = self.producer.to_key, self.redis
        jobs = {}
        for job_id, entry in (await redis.hgetall(key("jobs"))).items():
            job = load_json(entry.encode(), "stored job")
            jobs[job_id] = (job["data"]["number"], job["status"])
        places = {
            kind: await redis.zrange(key(kind), 0, -1)
            if kind == "delayed"
            else await redis.lrange(key(kind), 0, -1)
            if kind in ("waiting", "active")
            else list(await redis.smembers(key(kind)))
            for kind in PLACES
        }
        return Stored(jobs, places)

    async def _at_rest(self) -> bool:
        key, redis = self.producer.to_key, self.redis
        return not await redis.exists(*(key(kind) for kind in PLACES if kind not in ENDS))

    # --- the end ---------------------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Ends the load, checks the ledger, closes everything, and checks that nothing is left."""
        print(await self.balance())
        assert set(await self.crew.dismiss()) == {0}
        await self.producer.close()
        assert beequeue_tasks() == []
        complaints = self.crew.complaints.read_text()
        assert "Traceback" not in complaints, complaints[complaints.index("Traceback") - 200 :]

    async def balance(self) -> str:
        """Ends the load, waits until all jobs have ended, and checks the ledger; returns its counts in one line."""
        self._running = False
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*self._load)
        except TimeoutError:
            pass  # The ledger names the jobs.
        await self._rest()
        notes, stored = self.crew.look(), await self.stored()
        reconnects = self.producer.reconnects
        found = discrepancies(self.ledger, notes, stored, tracked=self.producer.tracked, reconnects=reconnects)
        assert not found, "\n".join(found)
        assert (await check(self.producer)).findings == []
        assert self.unexpected == []
        return summary(self.ledger, notes)

    async def turn_page(self) -> None:
        """After `balance`: forgets all ended jobs, here and in Redis, and starts the load again."""
        await self.redis.delete(*(self.producer.to_key(kind) for kind in ("jobs", *ENDS)))
        self.ledger = Ledger(issued=self.ledger.issued, first=self.ledger.issued)
        self.crew.turn_page()
        for relay in (self.to_producer, self.to_workers):
            relay.forget_closed()
        self._begin()

    async def _rest(self) -> None:
        try:
            await until(self._at_rest, PATIENCE_S)
        except TimeoutError:
            pass  # The ledger names the jobs that are left.


def with_password(url: str) -> str:
    return url.replace("://", f"://:{PASSWORD}@")
