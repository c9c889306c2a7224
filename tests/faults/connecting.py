"""Faults between a queue and its server: on the network, while connecting, and a slow server. See `scenarios`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import beequeue.wire.link
from beequeue import CommandError, Job, Queue, TaskFailed
from beequeue.job import now_ms
from harness.server import Server
from tests.faults.field import Field
from tests.faults.provider import FAILURES, with_provider
from tests.faults.worker import TICK_S
from tests.observe import answers, freeze, soon, thaw

DEADLINE_S = beequeue.wire.link.REPLY_TICKS * TICK_S
"""How long a connection may be silent before it is checked; in the field a fifth of the usual time."""
LONG_S = 2.5 * DEADLINE_S
FORGET_S = 3 * beequeue.wire.link.QUIET_TICKS * TICK_S
SLOW_RATE = 1_000_000
BIG = 3_000_000
"""Bytes of a job that takes longer than `DEADLINE_S` on a slow link, as 15 MB take longer than the usual 10 s."""
PAGE, PAGE_BYTES = 30, 100_000
"""The number and size of jobs whose data, sent in one reply, needs that long as well."""
FILLERS = 20_000
LOAD_DELAY_US = 1_000
RIGHTS = ("hmget", "hget", "rpop", "lrange", "brpoplpush")
"""Commands of a worker; all but the last are called in scripts."""
GATED = 20_000


# --- connecting ----------------------------------------------------------------------------------------------------------


async def proxy_resets(field: Field) -> None:
    """A proxy whose Redis is away accepts and resets connections; later it passes the greeting first."""
    relays = field.to_producer, field.to_workers
    for moment in ("accepted", "greeted"):
        await field.until(field.all_are_connected)
        for relay in relays:
            relay.resets, relay.resets_done = moment, 0
        for line in field.lines():
            line.reset()
        await field.until(lambda: field.to_producer.resets_done >= 10 and field.to_workers.resets_done >= 30)
        for relay in relays:
            relay.resets = ""
        await field.until(field.all_are_connected)
        await field.more()


async def provider_fails(field: Field) -> None:
    """The credential provider raises, in each way, while all reconnect and a new worker connects for the first time."""
    for failure in FAILURES:
        await field.until(field.all_are_connected)
        before = field.moods.failures()
        field.moods.fail(failure)
        await field.kill(await field.clients())
        new = await field.crew.hire()
        processes = [os.getpid(), *(worker.pid for worker in field.crew.alive)]

        def all_have_failed(before: dict[int, int] = before, processes: list[int] = processes) -> bool:
            failures = field.moods.failures()
            return all(failures[pid] > before[pid] for pid in processes)

        await field.until(all_have_failed)
        field.moods.heal()
        await field.until(field.all_are_connected)
        await field.crew.ready()
        await field.more()
        await field.crew.retire(new)
    field.claim(TaskFailed)


async def right_missing(field: Field) -> None:
    """One right is taken away and given back: no job is lost."""
    for right in RIGHTS:
        await field.redis.acl_log_reset()
        await field.redis.execute_command("ACL", "SETUSER", "default", f"-{right}")

        async def is_refused(right: str = right) -> bool:
            return any(entry["object"] == right for entry in await field.redis.acl_log())

        await field.until(is_refused)
        await field.redis.execute_command("ACL", "SETUSER", "default", f"+{right}")
        await field.more()
    field.unexpected = [error for error in field.unexpected if not (isinstance(error, CommandError) and error.code == "NOPERM")]


# --- another server --------------------------------------------------------------------------------------------------------


async def replica_promoted(field: Field) -> None:
    """A planned failover, with a name that still leads to the old primary for a while: it says READONLY, and no call fails."""
    old, replica = await _fail_over(field)
    failed = _readonly(field)
    asked = await _accepted(old)
    await field.until(lambda: _more_than(asked + 3 * 2 * (2 + 3 * len(field.crew.alive)), _accepted(old)))
    assert await refusals(old, "READONLY") > 0
    _lead_to(field, replica)
    await field.kill(await field.clients(old), old)
    await field.until(field.all_are_connected)
    assert _readonly(field) == failed


async def demoted_alive(field: Field) -> None:
    """A planned failover, with a name that leads to the new primary at once: the old one cuts nobody off, and all leave it."""
    failed = _readonly(field)
    old, replica = await _fail_over(field)
    _lead_to(field, replica)

    async def all_have_left() -> bool:
        return not await field.clients(old)

    await field.until(all_have_left)
    await field.until(field.all_are_connected)
    assert await refusals(old, "READONLY") > 0
    assert _readonly(field) == failed


async def _fail_over(field: Field) -> tuple[Any, Server]:
    """Makes a replica the primary, which `field.redis` then reaches; returns an onlooker of the old primary, and the new."""
    old, replica = field.redis, field.another_server()
    await field.look_on(replica.url)
    ports = free_ports(2)
    for redis, port in zip((old, field.redis), ports, strict=True):
        await redis.config_set("port", port)
    await field.redis.replicaof("127.0.0.1", ports[0])

    async def is_online() -> bool:
        told = await old.info("replication")
        replicas = [told[f"slave{index}"] for index in range(told["connected_slaves"])]
        return any(each["port"] == ports[1] and each["state"] == "online" for each in replicas)

    async def is_demoted() -> bool:
        return bool((await old.info("replication"))["role"] == "slave")

    await field.until(is_online)
    await old.execute_command("FAILOVER", "TO", "127.0.0.1", ports[1], "TIMEOUT", 10_000)
    await field.until(is_demoted)
    return old, replica


def _lead_to(field: Field, server: Server) -> None:
    for relay in (field.to_producer, field.to_workers):
        relay.lead_to(server.url)
    field.server = server


def _readonly(field: Field) -> tuple[int, int]:
    """How often a save has failed with READONLY, and how often a worker has reported it."""
    return field.save_errors["CommandError READONLY"], field.crew.look().errors["CommandError READONLY"]


async def loading(field: Field) -> None:
    """Redis is killed and takes long to load its data: it answers LOADING; all wait and no call fails."""
    redis = field.redis
    fillers = [f"{field.name}-filler-{number}" for number in range(FILLERS)]
    await redis.mset(dict.fromkeys(fillers, ""))

    async def is_rewritten() -> bool:
        told = await redis.info("persistence")
        return not (told["aof_rewrite_in_progress"] or told["aof_rewrite_scheduled"])

    await redis.config_set("auto-aof-rewrite-percentage", 0)  # until it starts again: two rewrites cannot overlap
    await field.until(is_rewritten)
    await redis.bgrewriteaof()  # Then it loads one file, and serves clients now and then meanwhile.
    await field.until(is_rewritten)
    failed = field.save_errors["CommandError LOADING"], field.crew.look().errors["CommandError LOADING"]
    async with _another_queue(field) as queue:
        field.server.stop()
        field.server.start("--key-load-delay", str(LOAD_DELAY_US), "--loading-process-events-interval-bytes", "1024")
        await redis.connection_pool.disconnect()
        await field.until(lambda: _more_than(20, refusals(redis, "LOADING")))
        saving = [asyncio.create_task(queue.create_job(number).save()) for number in range(10)]
        refused = await refusals(redis, "LOADING")
        await field.until(lambda: _more_than(refused + 20, refusals(redis, "LOADING")))
        await redis.config_set("key-load-delay", 0)
        await asyncio.gather(*saving)
    await answers(redis)
    await field.until(field.all_are_connected)
    await redis.unlink(*fillers)
    assert (field.save_errors["CommandError LOADING"], field.crew.look().errors["CommandError LOADING"]) == failed


# --- a slow server ----------------------------------------------------------------------------------------------------------


async def paused_for_long(field: Field) -> None:
    """CLIENT PAUSE for longer than a reply may take, of all commands, then of writes: no save fails, no connection is lost."""
    for all_commands in (True, False):
        await _saves_wait(field, partial(field.redis.client_pause, int(1000 * LONG_S), all_commands))


async def server_stopped(field: Field) -> None:
    """SIGSTOP of Redis for longer than a reply may take, then SIGCONT: no save fails, no connection is lost."""

    async def stop() -> None:
        freeze(field.server)
        asyncio.get_running_loop().call_later(LONG_S, thaw, field.server)

    await _saves_wait(field, stop)


async def _saves_wait(field: Field, hold: Callable[[], Awaitable[Any]]) -> None:
    """Makes many saves while Redis does not answer; all succeed, on the same connections."""
    await field.until(field.all_are_connected)
    jobs = [field.new_job(ms=0) for _ in range(3_000)]
    lost, failed, loop = field.lost, field.save_errors.total(), asyncio.get_running_loop()
    began = loop.time()
    await hold()
    await field.save_each(jobs)
    assert loop.time() > began + DEADLINE_S
    await asyncio.gather(*(ended for _, _, ended in jobs))
    assert (field.lost, field.save_errors.total()) == (lost, failed)


# --- the network -------------------------------------------------------------------------------------------------------------


async def slow_link(field: Field) -> None:
    """1 MB/s each way: data that takes longer than a reply may take is saved, fetched and run, and so are small jobs."""
    await field.until(field.all_are_connected)
    lost, loop, producer = field.lost, asyncio.get_running_loop(), field.producer
    for relay in (field.to_producer, field.to_workers):
        relay.rate = SLOW_RATE
    began, big = loop.time(), field.new_job(size=BIG)
    await field.save_each([big])
    assert loop.time() > began + DEADLINE_S
    await field.more()
    fetched = await Job.from_id(producer, str(big[1].id))
    assert fetched is not None
    assert fetched.data == big[1].data
    await big[2]
    page = [field.new_job(size=PAGE_BYTES, due=now_ms() + 3_600_000) for _ in range(PAGE)]
    await field.save_all(page)
    found = {job.id for job in await producer.get_jobs("delayed", start=0, end=PAGE + 20)}
    assert {job.id for _, job, _ in page} <= found
    await field.make_due(page)
    await asyncio.gather(*(ended for _, _, ended in page))
    for relay in (field.to_producer, field.to_workers):
        relay.rate = None
    assert field.lost == lost


async def forgotten_flow(field: Field) -> None:
    """Something on the network silently forgets idle connections. PINGs keep ours alive: an idle queue works at once."""
    await field.until(field.all_are_connected)
    lost, loop, relay = field.lost, asyncio.get_running_loop(), field.to_producer
    async with _another_queue(field, get_events=False) as quiet:
        await quiet.create_job("first").save()
        address = urlsplit(relay.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"PING\r\n")
        assert await reader.readline()  # -NOAUTH
        plain = relay.lines[-1]
        field.to_producer.forget_after_s = field.to_workers.forget_after_s = FORGET_S
        await field.until(lambda: loop.time() > plain.moved_at + 1.2 * FORGET_S)
        writer.write(b"PING\r\n")
        await field.until(lambda: plain.dead)
        writer.close()
        await quiet.create_job("second").save()
        await field.producer.check_health()
        field.to_producer.forget_after_s = field.to_workers.forget_after_s = None
        assert quiet.reconnects == 0
    assert field.lost == lost
    plain.cut()


@asynccontextmanager
async def _another_queue(field: Field, **settings: Any) -> AsyncIterator[Queue]:
    """A producer of another queue, which has no worker; the queue is destroyed at the end."""
    redis = with_provider(field.to_producer.url, field.moods.path)
    async with Queue(f"{field.name}-quiet", redis, is_worker=False, reconnect=soon, **settings) as queue:
        queue.on("error", field.hear)
        yield queue
        await queue.destroy()


# --- many at once ------------------------------------------------------------------------------------------------------------


async def ended_at_once(field: Field) -> None:
    """20,000 jobs end in one worker at the same moment: each is settled and runs once."""
    small = field.crew.alive.copy()
    big = await field.crew.hire(2 * GATED)
    await field.crew.ready()
    for worker in small:
        await field.crew.retire(worker)
    jobs = [field.new_job(ms=0, gated=True) for _ in range(GATED)]
    await field.save_all(jobs)
    numbers = {number for number, *_ in jobs}
    await field.until(lambda: numbers <= field.crew.look().started.keys())
    big.open_gate()
    await asyncio.gather(*(ended for _, _, ended in jobs))
    assert numbers & field.crew.look().again().keys() == set()
    for _ in small:
        await field.crew.hire()
    await field.crew.ready()
    await field.crew.retire(big)


async def refusals(redis: Any, code: str) -> int:
    """How often Redis has answered with this error."""
    count: int = (await redis.info("errorstats")).get(f"errorstat_{code}", {"count": 0})["count"]
    return count


async def _accepted(redis: Any) -> int:
    """How many connections Redis has accepted."""
    count: int = (await redis.info("stats"))["total_connections_received"]
    return count


async def _more_than(bound: int, count: Awaitable[int]) -> bool:
    return await count > bound


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback interface."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
