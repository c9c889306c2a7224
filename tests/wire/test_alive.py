"""A connection works or reports that it does not: none hangs, and none that works is given up."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

import pytest
import uvloop
from redis.asyncio import Redis
from redis.credentials import CredentialProvider
from redis.exceptions import ResponseError

import beequeue.tasks
import beequeue.wire.connection
import beequeue.wire.link
from beequeue import BeeQueueError, ConnectionLost, ConnectionRefused, Job, Queue, QueueClosed, RedisFailure, TaskFailed
from beequeue.wire.connection import MOST_LOSSES
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import ONLOOKER, beequeue_tasks, clients, freeze, soon, thaw
from tests.relay import Line, Relay

TICK_S = 0.03

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the silence after which a link is looked into to 0.3 s."""
    monkeypatch.setattr(beequeue.wire.link, "TICK_S", TICK_S)


# --- between the driver's handshake and our protocol ------------------------------------------------------------------


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("reset", ["accepted", "greeted"])
def test_a_proxy_that_accepts_and_resets(
    own_server: Server, name: str, run: Run, reset: Literal["accepted", "greeted"]
) -> None:
    """each queue is ready soon after the proxy lets it through"""

    async def main() -> None:
        async with Relay(own_server.url) as relay:
            relay.resets = reset
            queues = [Queue(name, relay.url, is_worker=False, get_events=False, reconnect=soon) for _ in range(20)]
            opening = [asyncio.create_task(queue.ready()) for queue in queues]
            await until(lambda: relay.resets_done >= 100)
            relay.resets = ""
            async with asyncio.timeout(10):
                await asyncio.gather(*opening)
                await asyncio.gather(*(queue.create_job({}).save() for queue in queues))
            await asyncio.gather(*(queue.close() for queue in queues))

    run(main())


# --- a keeper never ends unnoticed ------------------------------------------------------------------------------------


class TokenService(CredentialProvider):
    """Gives no credentials while it is down."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = [*failures]

    def get_credentials(self) -> tuple[str, str]:
        if self.failures:
            raise self.failures.pop(0)
        return ("default", "secret")


class OwnKind(BaseException):
    """A base of its own, as some libraries have."""


@pytest.mark.parametrize("failure", [RuntimeError, KeyError, asyncio.CancelledError, GeneratorExit, OwnKind])
async def test_a_credential_provider_that_fails_for_a_while(make_queue: MakeQueue, failure: type[BaseException]) -> None:
    """at the first connect, and at a later one"""
    with running_server(find_server({}), "--requirepass", "secret") as server:
        service = TokenService(failure())
        arguments = {"path": str(server.socket), "credential_provider": service}
        queue = make_queue(redis=arguments, is_worker=False, get_events=False, reconnect=soon)
        async with asyncio.timeout(10):
            await queue.create_job({}).save()
            service.failures.append(failure())
            make_queue.errors.clear()
            server.stop()
            await until(lambda: make_queue.errors)
            server.start()
            await queue.create_job({}).save()
        assert service.failures == []
        await queue.close()
        make_queue.errors.clear()


class Stubborn(CredentialProvider):
    """At its first call it neither answers nor lets itself be cancelled."""

    def __init__(self) -> None:
        self.asked = 0
        self.end = asyncio.Event()

    async def get_credentials_async(self) -> tuple[str, str]:
        self.asked += 1
        while self.asked == 1 and not self.end.is_set():
            with suppress(asyncio.CancelledError):
                await self.end.wait()
        return ("default", "secret")


async def test_a_credential_provider_that_is_not_cancelled(make_queue: MakeQueue) -> None:
    """the next attempt follows nevertheless"""
    with running_server(find_server({}), "--requirepass", "secret") as server:
        service = Stubborn()
        arguments = {"path": str(server.socket), "credential_provider": service, "socket_connect_timeout": 0.1}
        queue = make_queue(redis=arguments, is_worker=False, get_events=False, reconnect=soon)
        async with asyncio.timeout(10):
            await queue.create_job({}).save()
        await queue.close()
        service.end.set()
        await until(lambda: "beequeue connecting" not in beequeue_tasks())
        make_queue.errors.clear()


@pytest.mark.parametrize("wait", [GeneratorExit, OverflowError, OwnKind])
async def test_a_reconnect_that_raises_anything(make_queue: MakeQueue, own_server: Server, wait: type[BaseException]) -> None:
    def reconnect(attempt: int) -> int:
        if wait is OverflowError:
            return 10**400
        raise wait

    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=reconnect).ready()
    own_server.stop()
    await until(lambda: make_queue.claim(ConnectionLost))
    own_server.start()
    async with asyncio.timeout(10):
        await queue.create_job({}).save()
    await queue.close()
    assert any("linear_backoff is used instead" in str(error) for error in make_queue.errors)
    make_queue.errors.clear()


async def test_a_redis_that_runs_a_long_script_is_waited_for(make_queue: MakeQueue) -> None:
    """even if the driver selects a database first"""
    with running_server(find_server({}), "--busy-reply-threshold", "1") as server:
        redis: Any
        async with Redis.from_url(server.url) as redis, Redis.from_url(server.url) as other:
            running = asyncio.create_task(redis.eval("while true do end", 0))

            async def is_busy() -> bool:
                try:
                    await other.ping()
                except ResponseError as error:
                    return "BUSY" in str(error)
                return False

            await until(is_busy)
            queue = make_queue(redis={"path": str(server.socket), "db": 1}, is_worker=False, reconnect=soon)
            saving = asyncio.create_task(queue.create_job({}).save())
            await until(lambda: queue.client.connection._failures >= 2)
            assert not saving.done()
            await other.script_kill()
            assert (await saving).id == "1"
            await queue.close()
            await asyncio.wait((running,))
            assert isinstance(running.exception(), ResponseError)


@pytest.mark.parametrize("at", ["first", "later"])
async def test_a_set_up_that_fails_is_reported_and_tried_again(
    make_queue: MakeQueue, redis: Any, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """an unexpected error ends no keeper and leaves no connection open"""
    monkeypatch.setattr(beequeue.tasks, "FIRST_PAUSE_S", 0.01)
    queue = make_queue(is_worker=False, auto_connect=False, reconnect=soon)
    assert queue._connections.events is not None
    set_up, failures = queue._connections.events._set_up, [RuntimeError("nobody expects this")]
    assert set_up is not None

    async def failing(link: Any) -> None:
        if failures:
            raise failures.pop()
        await set_up(link)

    if at == "later":
        await queue.connect()
    queue._connections.events._set_up = failing
    if at == "later":
        assert queue._connections.events.link is not None
        queue._connections.events.link.drop("by the test")
        await until(lambda: queue.reconnects == 1)
        make_queue.claim(ConnectionLost)
    await queue.connect()
    assert (await queue.create_job({}).save()).id
    (failure,) = make_queue.claim(TaskFailed)
    assert str(failure) == "event connection: RuntimeError: nobody expects this; starting again in 0.01 s"
    await queue.close()


@pytest.mark.parametrize("wrong", [None, -1, "10", float("nan"), True], ids=repr)
async def test_a_back_off_that_returns_nonsense(own_server: Server, make_queue: MakeQueue, wrong: Any) -> None:
    """it is reported once, and the default is used instead"""
    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=lambda attempt: wrong).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    own_server.start()
    assert (await queue.create_job({}).save()).id
    (named,) = [error for error in make_queue.claim(BeeQueueError) if not isinstance(error, ConnectionLost)]
    assert str(named) == (
        f"reconnect(1) raised TypeError: it must return milliseconds, at least 0, not {wrong!r}; linear_backoff is used instead"
    )


async def test_a_back_off_that_raises(own_server: Server, make_queue: MakeQueue) -> None:
    def reconnect(attempt: int) -> int:
        raise LookupError("no such attempt")

    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=reconnect).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    own_server.start()
    assert (await queue.create_job({}).save()).id
    assert "reconnect(1) raised LookupError: no such attempt" in [str(error) for error in make_queue.claim(BeeQueueError)][1]


async def test_the_back_off_starts_over_after_each_outage(own_server: Server, make_queue: MakeQueue) -> None:
    attempts: list[int] = []

    def reconnect(attempt: int) -> int:
        attempts.append(attempt)
        return 5

    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=reconnect).ready()
    for outage in range(2):
        attempts.clear()
        own_server.stop()
        await until(lambda: len(attempts) > 5)
        assert attempts[0] == 1, outage
        own_server.start()
        await queue.check_health()
    make_queue.claim(ConnectionLost)


# --- an unfit server --------------------------------------------------------------------------------------------------


async def demote(redis: Any) -> None:
    """Makes a server a replica without a primary: it refuses writes and cuts no client."""
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")


async def test_readonly_leads_to_the_new_primary(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, seen: Callable[[], Seen]
) -> None:
    """Commands that a demoted server refuses are repeated on the new one, and all connections of producer and worker follow."""
    with running_server(find_server({})) as new:
        async with Relay(own_server.url) as relay:
            settings: dict[str, Any] = {"redis": relay.url, "reconnect": soon, "initial_redis_failure_retry_delay": 10}
            worker = make_queue(get_events=False, **settings).process(echo, 2)
            producer = make_queue(is_worker=False, **settings)
            assert await (await producer.create_job(1).save()).result() == 1
            await demote(own_redis)
            relay.lead_to(new.url)
            async with asyncio.timeout(10):
                jobs = await asyncio.gather(*(producer.create_job(number).save() for number in range(50)))
                assert [await job.result() for job in jobs] == [*range(50)]
                await producer.check_health()
            await until(lambda: not any(line.is_open for line in relay.lines[:5]))
            await producer.close()
            await worker.close()
            assert [client for client in await clients(own_server) if client["flags"] == "N"] == []
        assert "READONLY" in {str(error).partition("READONLY")[1] for error in make_queue.claim(ConnectionLost)}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("is_worker", [False, True])
async def test_a_quiet_queue_notices_a_demotion(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, is_worker: bool
) -> None:
    """through ROLE, without a command under way"""
    with running_server(find_server({})) as new:
        async with Relay(own_server.url) as relay:
            queue = await make_queue(redis=relay.url, is_worker=is_worker, reconnect=soon).ready()
            await demote(own_redis)
            relay.lead_to(new.url)
            await until(lambda: queue.reconnects == 2 + is_worker)
            assert (await queue.create_job({}).save()).id == "1"
            await queue.close()
    assert len(make_queue.claim(ConnectionLost)) == 2 + is_worker


async def test_a_queue_waits_for_its_primary(own_server: Server, own_redis: Any, make_queue: MakeQueue, caplog: Any) -> None:
    """while the name leads to a replica; a queue that only reads can use the replica"""
    await own_redis.hset("bq:reader:jobs", "1", "{}")
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    await demote(own_redis)
    reader = make_queue("reader", redis=own_server.url, is_worker=False, get_events=False, reconnect=soon)
    assert (await reader.check_health()).waiting == 0
    saving = asyncio.create_task(queue.create_job({}).save())
    with caplog.at_level(logging.WARNING, "beequeue"):
        await until(lambda: caplog.text.count("is a replica; next attempt in 10 ms") > 4)
    assert not saving.done()
    await own_redis.execute_command("REPLICAOF", "NO", "ONE")
    assert (await saving).id == "1"
    assert len(make_queue.claim(ConnectionLost)) == 2
    assert reader.reconnects == 0


async def test_a_late_refusal_moves_no_connection_again(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """on a link that is being left, after others have found the new server"""
    with running_server(find_server({})) as new:
        async with Relay(own_server.url) as relay:
            queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
            await demote(own_redis)
            old_lines, gate = [*relay.lines], asyncio.Event()

            async def distort(line: Line, data: bytes) -> bytes:
                if line in old_lines and line.role == "command":
                    await gate.wait()
                return data

            relay.distort = distort
            destroying = asyncio.create_task(queue.destroy())
            await until(lambda: _refusals(own_redis, "READONLY", 0))
            relay.lead_to(new.url)
            assert (await queue.create_job({}).save()).id == "1"
            assert queue.reconnects == 1
            gate.set()
            assert await destroying == 3  # of the keys on the new server
            assert queue.reconnects == 2
            await queue.close()
    lost = [str(error).partition(" ")[0] for error in make_queue.claim(ConnectionLost)]
    assert sorted(lost) == ["command", "event"]


async def test_closing_while_a_server_is_left(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """even while a take is open on the link that is being left; waiting calls raise"""
    queue = await make_queue(redis=own_server.url, reconnect=soon).ready()
    queue.process(echo)
    await until(lambda: own_redis.info("clients"))
    await demote(own_redis)
    saving = asyncio.create_task(queue.create_job({}).save())
    await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
    await queue.close()
    with pytest.raises(QueueClosed):
        await saving
    assert beequeue_tasks() == []
    await until(lambda: _nobody(own_server))
    make_queue.errors.clear()


async def _nobody(server: Server) -> bool:
    return await clients(server) == []


async def test_a_refused_save_that_is_cancelled_is_not_made(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    await demote(own_redis)
    job = queue.create_job({})
    saving = asyncio.create_task(job.save())
    await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
    saving.cancel()
    await asyncio.wait((saving,))
    await own_redis.execute_command("REPLICAOF", "NO", "ONE")
    await until(lambda: queue.reconnects == 2)
    assert (await queue.check_health()).waiting == 0
    await job.save()
    make_queue.claim(ConnectionLost)


async def test_a_bulk_save_that_is_cancelled_is_not_made(own_server: Server, make_queue: MakeQueue) -> None:
    """while Redis is down; its jobs can be saved later"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    own_server.stop()
    await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
    jobs = [queue.create_job(number) for number in range(2)]
    saving = asyncio.create_task(queue.save_all(jobs))
    await until(lambda: all(job.saving for job in jobs))
    saving.cancel()
    await asyncio.wait((saving,))
    assert saving.cancelled()
    own_server.start()
    assert (await queue.check_health()).waiting == 0
    assert await queue.save_all(jobs) == {}
    assert (await queue.check_health()).waiting == 2
    make_queue.claim(ConnectionLost)


async def test_a_refused_save_is_taken_back_while_others_wait_for_an_answer(
    own_server: Server, own_redis: Any, make_queue: MakeQueue
) -> None:
    """on the link that is being left"""
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        await demote(own_redis)
        gate = asyncio.Event()

        async def distort(line: Line, data: bytes) -> bytes:
            first, end, others = data.partition(b"\r\n")
            if b"READONLY" not in first or gate.is_set():
                return data
            await line.pass_back(first + end)
            await gate.wait()
            return others

        relay.distort = distort
        cancelled, other = (asyncio.create_task(queue.create_job(number).save()) for number in (1, 2))
        await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
        cancelled.cancel()
        await asyncio.wait((cancelled,))
        await own_redis.execute_command("REPLICAOF", "NO", "ONE")
        gate.set()
        assert (await other).id == "1"
        await queue.close()
    make_queue.claim(ConnectionLost)


async def test_the_back_off_to_a_server_that_lets_in_and_refuses(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grows while the server is unfit at once, and starts over once it was fit for a while (CLUSTERDOWN: no slot served)"""
    for calm_s, expected in (
        (60.0, [1, 2, 3, 4, 5]),
        (0.0, [1] * 5),
    ):  # one after the other, as both would use the same cluster port
        monkeypatch.setattr(beequeue.wire.connection, "CALM_S", calm_s)
        attempts: list[int] = []

        def reconnect(attempt: int, attempts: list[int] = attempts) -> int:
            attempts.append(attempt)
            return 5

        with running_server(find_server({}), "--cluster-enabled", "yes") as server:
            queue = make_queue("{one-slot}", redis=server.url, is_worker=False, get_events=False, reconnect=reconnect)
            await queue.ready()
            saving = asyncio.create_task(queue.create_job({}).save())
            await until(lambda attempts=attempts: len(attempts) >= 5)  # type: ignore[misc]
            redis: Any = Redis.from_url(server.url)
            async with redis:
                await redis.execute_command("CLUSTER", "ADDSLOTS", *range(16_384))
            assert (await saving).id == "1"
            await queue.close()
        assert attempts[:5] == expected
    make_queue.claim(ConnectionLost)


async def test_a_busy_redis_is_waited_for(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """BUSY: no call raises while another client's script runs"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    await own_redis.config_set("lua-time-limit", 1)
    busy = asyncio.create_task(own_redis.eval("while true do end", 0))
    saves = [asyncio.create_task(queue.create_job(number).save()) for number in range(200)]
    await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
    fetching = asyncio.create_task(queue.get_job("200"))
    killer: Any = Redis.from_url(own_server.url)
    async with killer:
        await killer.execute_command("SCRIPT", "KILL")
    await asyncio.gather(busy, return_exceptions=True)
    assert [job.id for job in await asyncio.gather(*saves)] == [str(number) for number in range(1, 201)]
    job = await fetching
    assert job is not None
    assert job.data == 199
    assert (await queue.check_health()).waiting == 200
    make_queue.claim(ConnectionLost)


async def test_a_replica_without_its_primary_is_not_ready(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """MASTERDOWN"""
    await own_redis.config_set("replica-serve-stale-data", "no")
    await demote(own_redis)
    queue = make_queue(redis=own_server.url, is_worker=False, reconnect=soon)
    saves = [asyncio.create_task(queue.create_job(number).save()) for number in range(3)]
    await until(lambda: _refusals(own_redis, "MASTERDOWN", 10))
    await own_redis.execute_command("REPLICAOF", "NO", "ONE")
    assert sorted(str(job.id) for job in await asyncio.gather(*saves)) == ["1", "2", "3"]


async def _refusals(redis: Any, code: str, count: int) -> bool:
    told = await redis.info("errorstats")
    return bool(told.get(f"errorstat_{code}", {"count": 0})["count"] > count)


# --- a silent link ----------------------------------------------------------------------------------------------------


Verdicts = list[bool | RedisFailure]


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Verdicts:
    """Collects the verdicts of the connections opened beside a silent link."""
    told: Verdicts = []
    ask = beequeue.wire.connection.answers

    async def answers(*args: Any) -> bool | RedisFailure:
        told.append(await ask(*args))
        return told[-1]

    monkeypatch.setattr(beequeue.wire.connection, "answers", answers)
    return told


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("mode", ["ALL", "WRITE"])
async def test_a_pause_cuts_nothing(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, verdicts: Verdicts, mode: str
) -> None:
    """CLIENT PAUSE for ten times the allowed silence: all saves wait, and none fails"""
    queue = await make_queue(redis=own_server.url, is_worker=False).ready()
    await own_redis.execute_command("CLIENT", "PAUSE", int(100 * TICK_S * 1000), mode)
    saves = [asyncio.create_task(queue.create_job(number).save()) for number in range(1_000)]
    await asyncio.gather(*saves)
    assert False in verdicts
    assert queue.reconnects == 0
    assert (await queue.check_health()).waiting == 1_000


@pytest.mark.usefixtures("hurried")
async def test_a_frozen_server_is_waited_for(own_server: Server, make_queue: MakeQueue, verdicts: Verdicts) -> None:
    """SIGSTOP: a new connection gets no answer either"""
    queue = await make_queue(redis=own_server.url).ready()
    queue.process(echo)
    freeze(own_server)
    try:
        saving = asyncio.create_task(queue.create_job("x").save())
        await until(lambda: len(verdicts) >= 6)
    finally:
        thaw(own_server)
    assert await (await saving).result() == "x"
    assert queue.reconnects == 0


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("reachable", [True, False])
async def test_a_silent_link_is_cut(own_server: Server, make_queue: MakeQueue, reachable: bool) -> None:
    """when Redis answers on a new connection, and when none can be opened"""
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        for line in (lines := [*relay.lines]):
            line.dead = True
        if not reachable:
            own_server.stop()
        with pytest.raises(ConnectionLost) as caught:
            await queue.create_job({}).save()
        assert caught.value.maybe_applied
        if not reachable:
            own_server.start()
        assert (await queue.create_job({}).save()).id
        assert (await queue.check_health()).waiting
        for line in lines:
            line.cut()
        await queue.close()
    assert all("nothing has moved for" in str(error) for error in make_queue.claim(ConnectionLost))


@pytest.mark.usefixtures("hurried")
async def test_a_silent_link_is_found_even_if_it_swallows_more(own_server: Server, make_queue: MakeQueue) -> None:
    """an endless series of saves does not keep a silent link alive"""
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        for line in (lines := [*relay.lines]):
            line.dead = True
        saves: list[asyncio.Task[Any]] = []

        def one_fails() -> bool:
            saves.append(asyncio.create_task(queue.create_job({}).save()))
            return saves[0].done()

        await until(one_fails)
        await asyncio.gather(*saves, return_exceptions=True)
        for line in lines:
            line.cut()
        await queue.close()
    make_queue.claim(ConnectionLost)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("tcp", [True, False], ids=["all in buffers on the way", "hardly any buffers"])
async def test_a_slow_link_is_not_cut(own_server: Server, make_queue: MakeQueue, tcp: bool) -> None:
    """1 MB/s: a job that takes many times the allowed silence is saved, fetched, listed and run, and so are small ones"""
    size = 1_500_000
    async with Relay(own_server.url, tcp=tcp) as relay:
        worker = await make_queue(redis=relay.url, get_events=False).ready()
        producer = await make_queue(redis=relay.url, is_worker=False).ready()
        relay.rate = 1_000_000
        large = producer.create_job("x" * size)
        await asyncio.gather(large.save(), *(producer.create_job(number).save() for number in range(20)))
        fetched = await Job.from_id(producer, str(large.id))
        assert fetched is not None
        assert len(fetched.data) == size
        assert max(len(str(job.data)) for job in await producer.get_jobs("waiting")) == size
        done = Seen()
        producer.on("job succeeded", done)

        async def handler(job: Job) -> int:
            return len(str(job.data))

        worker.process(handler, 2)
        await done.reaches(21, 30)
        relay.rate = None
        assert producer.reconnects == worker.reconnects == 0
        await worker.close()
        await producer.close()


@pytest.mark.usefixtures("hurried")
async def test_every_connection_is_kept_alive(own_server: Server, make_queue: MakeQueue) -> None:
    """including that of a producer without events, and a worker's while all slots are taken"""
    async with Relay(own_server.url) as relay:
        gate, started = asyncio.Event(), Seen()

        async def handler(job: Any) -> None:
            started()
            await gate.wait()

        queue = await make_queue(redis=relay.url, get_events=False).ready()
        await queue.create_job({}).save()
        queue.process(handler)
        await started.reaches(1)
        said = {line: len(line.said) for line in relay.lines}
        await until(lambda: all(line.said[said[line] :].count(b"ROLE") > 2 for line in relay.lines))
        gate.set()
        await queue.close()


async def test_a_reply_that_never_fits_is_not_asked_for_endlessly(own_server: Server, make_queue: MakeQueue) -> None:
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        await queue.create_job("x" * 1000).set_id("large").save()
        cuts = 0

        async def distort(line: Line, data: bytes) -> bytes:
            nonlocal cuts
            if b"x" * 1000 in data:
                cuts += 1
                line.cut()
                return b""
            return data

        relay.distort = distort
        with pytest.raises(ConnectionLost, match="the event connection was lost before Redis answered"):
            await queue.get_job("large")
        assert cuts == MOST_LOSSES + 1
        assert (await queue.create_job({}).save()).id == "1"
        await queue.close()
    make_queue.claim(ConnectionLost)


async def test_a_first_stall_check_that_fails_stops_no_worker(make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """whatever it raises"""
    queue = make_queue()
    failures = [RuntimeError("nobody expects this")]
    check = queue._stall_checker.check

    async def failing() -> int:
        if failures:
            raise failures.pop()
        return await check()

    monkeypatch.setattr(queue._stall_checker, "check", failing)
    queue.process(echo)
    assert await (await queue.create_job("x").save()).result() == "x"
    assert [str(error) for error in make_queue.claim(RuntimeError)] == ["nobody expects this"]


# --- what a new connection tells --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("kind", ["password", "database", "password changed", "provider", "no right"])
async def test_a_silent_server_is_waited_for_even_if_it_refuses(make_queue: MakeQueue, verdicts: Verdicts, kind: str) -> None:
    """Neither an unanswered handshake nor a refusal counts as an answer."""
    with running_server(find_server({}), "--requirepass", "secret") as server:
        redis: Any = Redis.from_url(server.url, password="secret", client_name=ONLOOKER)
        service = TokenService()
        arguments: dict[str, Any] = {"path": str(server.socket), "db": 3 if kind == "database" else 0}
        arguments |= {"credential_provider": service} if kind == "provider" else {"password": "secret"}
        async with redis:
            if kind == "no right":
                await redis.execute_command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-eval")
                arguments["username"] = "worker"
            queue = await make_queue(redis=arguments, is_worker=False, reconnect=soon).ready()
            if kind == "password changed":
                await redis.config_set("requirepass", "another")
            elif kind == "provider":
                service.failures += [RuntimeError("down")] * 100
            if kind in ("password", "database"):
                freeze(server)
            else:
                await redis.execute_command("CLIENT", "PAUSE", 1_000, "WRITE")
            saving = asyncio.create_task(queue.create_job({}).save())
            await until(lambda: verdicts)
            if kind in ("password", "database"):
                thaw(server)
            assert (await saving).id == "1"
            assert verdicts[0] is not True
            assert queue.reconnects == 0
            await queue.close()


@pytest.mark.usefixtures("hurried")
async def test_a_refusal_of_a_new_connection_is_no_answer(make_queue: MakeQueue, verdicts: Verdicts) -> None:
    """even if it comes at once while earlier commands wait"""
    with running_server(find_server({})) as server:
        redis: Any = Redis.from_url(server.url, client_name=ONLOOKER)
        async with redis:
            await redis.execute_command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
            arguments = {"path": str(server.socket), "username": "worker", "password": "secret"}
            queue = await make_queue(redis=arguments, is_worker=False, reconnect=soon).ready()
            await redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            saving = asyncio.create_task(queue.create_job({}).save())
            await until(lambda: _waits(redis))
            await redis.execute_command("ACL", "SETUSER", "worker", "-evalsha")
            await until(lambda: verdicts)
            await redis.execute_command("ACL", "SETUSER", "worker", "+evalsha")
            await redis.execute_command("CLIENT", "UNPAUSE")
            assert (await saving).id == "1"
            assert verdicts[0] is not True
            assert queue.reconnects == 0
            await queue.close()


async def _waits(redis: Any) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"])


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("refuses", ["password", "maxclients"])
async def test_a_silent_link_is_cut_though_new_ones_are_refused(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, refuses: str
) -> None:
    """when Redis answers on another open link"""
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        await queue.create_job({}).save()
        (line,) = [line for line in relay.lines if line.role == "event"]
        before = await own_redis.config_get(REFUSING[refuses])
        await own_redis.config_set(REFUSING[refuses], "secret" if refuses == "password" else len(await own_redis.client_list()))
        line.dead = True
        with pytest.raises(ConnectionLost, match="lost before Redis answered"):
            await queue.create_job({}).save()
        assert (await queue.check_health()).waiting == 1
        await own_redis.config_set(REFUSING[refuses], before[REFUSING[refuses]])
        line.cut()
        assert (await queue.create_job({}).save()).id
        await queue.close()
    make_queue.claim(ConnectionRefused)
    assert len(make_queue.claim(ConnectionLost)) == 1


REFUSING = {"password": "requirepass", "maxclients": "maxclients"}


@pytest.mark.usefixtures("hurried")
async def test_a_silent_server_that_refuses_new_connections_is_named(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, caplog: Any
) -> None:
    """all links are silent, so nothing tells whether it lives"""
    async with Relay(own_server.url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        await own_redis.config_set("requirepass", "secret")
        for line in relay.lines:
            line.dead = True
        with caplog.at_level(logging.WARNING, "beequeue"):
            saving = asyncio.create_task(queue.create_job({}).save())
            await until(lambda: "has not answered for 0 s, and refuses a new connection: " in caplog.text)
        assert re.search("event connection: .* refuses a new connection: .*(?i:auth)", caplog.text)
        assert queue.reconnects == 0
        await own_redis.config_set("requirepass", "")
        with pytest.raises(ConnectionLost):
            await saving
        for line in [*relay.lines]:
            line.cut()
        await queue.close()
    make_queue.claim(ConnectionLost)
    make_queue.claim(ConnectionRefused)


@pytest.mark.usefixtures("hurried")
async def test_a_server_that_answers_no_connection_is_named(own_server: Server, make_queue: MakeQueue, caplog: Any) -> None:
    """in the log, even when a queue has never been ready"""
    queue = await make_queue(redis=own_server.url, is_worker=False).ready()
    freeze(own_server)
    try:
        with caplog.at_level(logging.WARNING, "beequeue"):
            saving = asyncio.create_task(queue.create_job({}).save())
            opened = make_queue(redis=own_server.url, is_worker=False, get_events=False)
            await until(lambda: "event connection: " in caplog.text and "command connection: " in caplog.text)
        assert "has not answered for 0 s, nor does it answer on a new connection" in caplog.text
    finally:
        thaw(own_server)
    await saving
    await opened.ready()


@pytest.mark.parametrize("command", ["CLIENT", "ROLE"])
async def test_a_worker_does_without_a_command_that_the_server_lacks(make_queue: MakeQueue, command: str) -> None:
    with running_server(find_server({}), "--rename-command", command, "") as server:
        queue = make_queue(redis=server.url)
        queue.process(echo)
        assert await (await queue.create_job("x").save()).result() == "x"
        await queue.close(10_000)


async def test_arguments_that_a_server_repeats_are_not_shown() -> None:
    """a Redis without AUTH quotes the password"""
    with running_server(find_server({}), "--rename-command", "AUTH", "") as server:
        queue = Queue("q", redis={"path": str(server.socket), "credential_provider": TokenService()}, is_worker=False)
        with pytest.raises(BeeQueueError) as caught:
            await queue.ready()
        assert "secret" not in str(caught.value)
        with pytest.raises(BeeQueueError):
            await queue.close()
