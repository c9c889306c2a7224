"""Under faults the client and the workers survive, log one line for each event, and return to seven live chains."""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from harness.server import find_server, running_server
from tests.conftest import until
from tests.faults.harness import OF_REDIS, OF_THE_HARNESS, Ground, Harness
from tests.observe import ONLOOKER
from tests.relay import Relay

pytestmark = pytest.mark.timeout(150)

FAULTS = OF_REDIS | OF_THE_HARNESS
CUT = {"restart-with-aof", "restart-without-aof", "kill-each-connection", "relay-goes-silent"}
"""The faults in which every connection is lost."""
LINES = (
    r"(client|worker): connected; .*",
    r"(client|worker): (command|event|take) connection to \S+ lost: .*",
    r"(command|event|take) connection to \S+ is back",
    r"(command|event|take) connection: .*; next attempt in \d+ ms",
    r"worker: job \d+ had lost its worker",
    r"worker: job \d+ had been settled, removed or handed on before its handler ended",
    r"client: \d+ jobs had vanished or ended unseen; their chains were restarted",
    r"worker: OOM .*",
    r"client: a save failed: .*",
    r"client: saves work again",
    r"(client|worker): stopped",
)
"""All the lines that the processes may log."""


@pytest.fixture
async def ground() -> AsyncIterator[Ground]:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with running_server(find_server(os.environ), *options) as server:
        async with (
            Redis.from_url(server.url, decode_responses=True, client_name=ONLOOKER) as redis,
            Relay(server.url, remember=2**16) as relay,
            Harness(relay.url, redis) as harness,
        ):
            yield Ground(server, relay, redis, harness, random.Random(189))


@pytest.mark.parametrize("fault", FAULTS)
async def test_it_lives_on(ground: Ground, fault: str) -> None:
    harness = ground.harness
    await harness.recovered()
    connections = {name: (2 if name == "client" else 3) if fault in CUT else 0 for name in harness.said}
    await FAULTS[fault](ground)
    await harness.recovered()

    lost = dict.fromkeys(harness.said, 0) | connections  # a fault may have started a worker
    await until(lambda: harness.count(r" is back$") == lost)
    assert harness.count(r" lost: ") == lost
    await harness.seven_are_left()

    last = harness.stats[-1]
    assert last["numReconnects"] == lost["client"]
    if fault == "restart-without-aof":
        assert last["numRestarted"] > 0  # the jobs had vanished
    elif fault not in {*CUT, "memory-runs-out"}:
        assert last["numRestarted"] == last["numJobSaveError"] == 0
    failed, again = harness.count("a save failed")["client"], harness.count("saves work again")["client"]
    assert failed == again <= 2
    assert bool(last["numJobSaveError"]) == bool(failed)
    assert harness.count("had vanished")["client"] <= 2
    await harness.end()
    for line in (line for lines in harness.said.values() for line in lines):
        assert any(re.fullmatch(form, line) for form in LINES), line


async def test_a_worker_that_is_stopped_leaves_its_jobs_to_the_others(ground: Ground) -> None:
    """at once, so a stall check finds nothing to bring back"""
    harness = ground.harness
    for worker in harness.workers.copy():
        await harness.recovered()
        await harness.retire(worker)
        await harness.hire()
    await harness.recovered()
    await harness.seven_are_left()
    await harness.end()
    assert harness.stats[-1]["numRestarted"] == 0
    assert set(harness.count("lost its worker").values()) == {0}
