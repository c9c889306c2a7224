"""The reply to a settlement that brings no job waits in the kernel for the next reply; only on plain TCP, and not for long."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import beequeue.wire.link
from beequeue import LateFinish, Queue
from beequeue.wire.link import Link
from tests.conftest import MakeQueue, Seen, echo, skip, until
from tests.relay import Relay
from tests.wire.test_tls import Files, files

__all__ = ["files"]
LONG_S = 600.0


@asynccontextmanager
async def place(kind: str, url: str, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """The settings of a Redis on a plain TCP socket, a unix socket, or TLS."""
    if kind == "tls":
        made: Files = request.getfixturevalue("files")
        yield made.setting()
    else:
        async with Relay(url, tcp=kind == "tcp") as relay:
            yield relay.url


def low_water(queue: Queue) -> int:
    """How many bytes must arrive on the worker's take before the kernel reports them."""
    assert queue._connections.takes is not None
    assert queue._connections.takes.link is not None
    own = queue._connections.takes.link._transport.get_extra_info("socket")
    with socket.socket(fileno=socket.dup(own.fileno())) as same:
        return same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


async def saved(queue: Queue, data: Any) -> None:
    job = await queue.create_job(data).save()
    assert await job.result() == data


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_a_settlement_is_noticed_although_no_job_follows(
    kind: str, url: str, name: str, request: pytest.FixtureRequest
) -> None:
    async with place(kind, url, request) as redis, Queue(name, redis) as queue:
        ended = Seen()
        queue.on("succeeded", ended)
        queue.process(echo, concurrency=2)
        for count in range(1, 4):
            await queue.create_job(count).save()
            await ended.reaches(count)
            await until(lambda: queue.running == 0 and low_water(queue) == 1)
        await queue.destroy()


async def test_a_late_finish_is_noticed_although_its_reply_is_as_short(url: str, make_queue: MakeQueue) -> None:
    async with Relay(url, tcp=True) as relay, make_queue(redis=relay.url) as queue:
        started, gate = Seen(), asyncio.Event()

        async def handler(job: Any) -> None:
            started()
            await gate.wait()

        queue.process(handler, concurrency=2)
        job = await queue.create_job().save()
        await started.reaches(1)
        await job.remove()
        gate.set()
        await until(lambda: make_queue.claim(LateFinish))


@pytest.mark.parametrize(("kind", "size"), [("tcp", 9), ("unix", 1), ("tls", 1)])
async def test_the_kernel_holds_replies_back_only_on_a_plain_socket(
    kind: str, size: int, url: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        skip("other kernels are not asked to")
    monkeypatch.setattr(beequeue.wire.link, "LONE_REPLY_S", LONG_S)
    async with place(kind, url, request) as redis, Queue(name, redis) as queue:
        queue.process(echo, concurrency=2)
        assert low_water(queue) == 1
        await saved(queue, "first")
        assert low_water(queue) == size
        await queue.destroy()


async def test_a_job_wakes_its_worker_once(url: str, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a job wakes it twice: for the reply to its settlement, and for the next job."""
    reads: list[Link] = []
    received = Link.data_received

    def counted(link: Link, data: bytes) -> None:
        reads.append(link)
        received(link, data)

    monkeypatch.setattr(Link, "data_received", counted)
    monkeypatch.setattr(beequeue.wire.link, "LONE_REPLY_S", LONG_S)  # a busy machine may return to it late
    async with Relay(url, tcp=True) as relay, make_queue(redis=relay.url) as queue:
        queue.process(echo, concurrency=2)
        await saved(queue, "first")
        assert queue._connections.takes is not None
        link, before = queue._connections.takes.link, len(reads)
        for number in range(50):
            await saved(queue, number)
        assert len([each for each in reads[before:] if each is link]) == 50


async def test_close_does_not_wait_for_a_reply_held_by_the_kernel(
    url: str, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beequeue.wire.link, "LONE_REPLY_S", LONG_S)
    async with Relay(url, tcp=True) as relay, make_queue(redis=relay.url) as queue:
        ended = Seen()
        queue.on("succeeded", ended)
        queue.process(echo, concurrency=2)
        await saved(queue, "last")
        async with asyncio.timeout(4):  # the take ends only after 5 s
            await queue.close()
        assert len(ended.calls) == 1


async def test_replies_in_single_bytes_come_through(url: str, make_queue: MakeQueue) -> None:
    """The last bytes of a reply may be too few to wake the worker."""
    async with Relay(url, tcp=True) as relay, make_queue(redis=relay.url) as queue:
        queue.process(echo, concurrency=2)
        await saved(queue, "whole")
        relay.split("take")
        for number in range(5):
            await saved(queue, number)


async def test_no_further_file_descriptor_is_needed(url: str, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """the limit is lowered again even if the process has no file descriptor left"""
    async with Relay(url, tcp=True) as relay, make_queue(redis=relay.url) as queue:
        ended = Seen()
        queue.on("succeeded", ended)
        queue.process(echo, concurrency=2)
        await saved(queue, "first")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await queue.create_job("last").save()
            await ended.reaches(2, 3)  # the take ends only after 5 s
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
