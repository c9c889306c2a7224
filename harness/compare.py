"""`python -m harness compare`: runs both orderings in turn, on one Redis and with the same workers.

Each round starts one client for each contestant, and every other round reverses their order. The original on Node has its
own workers and its own queue. `report` judges the results.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tqdm import tqdm

import config
from beequeue import BeeQueueError, Queue
from beequeue.escape import escape
from beequeue.wire.address import Address
from beequeue.wire.driver import BlockingConnection
from harness import original, report
from harness.machine import processor
from harness.member import Member
from harness.server import redis_url

BAR = "{desc} |{bar}| {n:.0f} of {total:.0f} s"
"""Shown on a terminal only."""
INTERVAL_S = 1
START_S = 30
"""How long a client or a worker may take to start."""


class NotCompared(Exception):
    """A run failed or was disturbed; the message is the line to show."""


@dataclass
class Contestant:
    """A client program and its workers; contestants may share workers."""

    name: str
    client: Sequence[str]
    crew: Sequence[Member]
    variables: Mapping[str, str]
    runs: list[report.Run] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    rounds: int
    seconds: int
    node: bool
    json: bool


async def run(plan: Plan, settings: config.Config, environment: Mapping[str, str]) -> int:
    """Runs the comparison, prints the findings, and returns the exit code; raises `NotCompared`, `NoServer`, `NotInstalled`."""
    with redis_url(environment) as url:
        names = [f"compare-{os.getpid()}", f"compare-{os.getpid()}-node"]
        common = {**environment, "REDIS_URL": url, "EXTENDED_STATS": "true"}
        common |= {"STATS_INTERVAL": str(INTERVAL_S), "DURATION": str(plan.seconds)}
        contestants = _contestants(plan, settings.workers, common, names)
        conditions = _conditions(plan, settings, url)
        crews = {id(each.crew): each for each in contestants}.values()
        try:
            for each in crews:
                await asyncio.gather(*(_start_worker(member, each.variables) for member in each.crew))
            with tqdm(total=len(contestants) * plan.rounds * plan.seconds, disable=None, leave=False, bar_format=BAR) as bar:
                for number in range(plan.rounds):
                    for each in contestants if number % 2 == 0 else contestants[::-1]:
                        bar.set_description(f"round {number + 1} of {plan.rounds}, {each.name}")
                        each.runs.append(await _run_client(each, bar))
        finally:
            await asyncio.gather(*(member.end() for each in crews for member in each.crew))
            await _remove_queues(names, url)
    rows = [report.Row(each.name, each.runs) for each in contestants]
    findings = report.as_json(rows, conditions)
    if plan.json:
        print(json.dumps(findings))
    else:
        print(report.table(rows), "", ", ".join(map(escape, conditions.values())), findings["verdict"], sep="\n")
    return int(findings["exitCode"])


def _contestants(plan: Plan, workers: int, common: Mapping[str, str], names: Sequence[str]) -> list[Contestant]:
    port, client = {**common, "QUEUE_NAME": names[0]}, [sys.executable, "client.py"]
    crew = [Member(f"worker_{number}", [sys.executable, "worker.py"]) for number in range(1, workers + 1)]
    contestants = [
        Contestant("two sockets (as upstream)", client, crew, {**port, "ORDERED_EVENTS": "false"}),
        Contestant("one socket (the cure)", client, crew, {**port, "ORDERED_EVENTS": "true"}),
    ]
    if plan.node:
        node = original.install()
        variables = {**common, "QUEUE_NAME": names[1], "NODE_PATH": str(original.NODE_MODULES)}
        crew = [Member(f"node worker_{number}", [node, "harness/node/worker.js"]) for number in range(1, workers + 1)]
        contestants.append(Contestant("bee-queue 2.0.0 on Node", [node, "harness/node/client.js"], crew, variables))
    return contestants


async def _start_worker(worker: Member, variables: Mapping[str, str]) -> None:
    """Starts a worker and waits until it reports that it is connected; raises `NotCompared`."""
    said: list[str] = []
    connected = asyncio.Event()

    def listen(line: str) -> None:
        said.append(line)
        del said[:-1]
        if "connected" in line:
            connected.set()

    await worker.start(variables, listen, listen)
    waits = [asyncio.create_task(connected.wait()), asyncio.create_task(worker.ended())]
    await asyncio.wait(waits, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if not connected.is_set():
        raise NotCompared(f"{worker.name} did not start: {' '.join(said) or 'it printed nothing'}")


async def _run_client(contestant: Contestant, bar: tqdm[NoReturn]) -> report.Run:
    """Runs the client from start to end; raises `NotCompared`."""
    lines: list[report.Line] = []
    said: list[str] = []

    def hear(line: str) -> None:
        lines.append(json.loads(line))
        bar.update(INTERVAL_S)

    client = Member(f"the client of {contestant.name!r}", contestant.client)
    try:
        await client.start(contestant.variables, hear, said.append)
        async with asyncio.timeout(int(contestant.variables["DURATION"]) + START_S):
            code = await client.ended()
    except TimeoutError:
        raise NotCompared(f"{client.name} did not end: {_last(said)}") from None
    finally:
        await client.end()
    if code:
        raise NotCompared(f"{client.name} ended with {code}: {_last(said)}")
    for worker in contestant.crew:
        if worker.code is not None:
            raise NotCompared(f"{worker.name} ended with {worker.code}")
    last = lines[-1]
    for key in ("numJobSaveError", "numQueueFailed", "numReconnects", "numRestarted"):
        if last.get(key):
            raise NotCompared(f"{client.name} was disturbed, {key} is {last[key]}: {_last(said)}")
    half = lines[len(lines) // 2 - 1]
    if not (last["numQueueSucceeded"] > half["numQueueSucceeded"] and last["numJobSucceeded"]):
        raise NotCompared(f"{client.name} received no event after half-time: {_last(said)}")
    return report.Run(half, last)


def _last(said: Sequence[str]) -> str:
    return said[-1] if said else "it printed nothing"


def _conditions(plan: Plan, settings: config.Config, url: str) -> dict[str, Any]:
    """The server, the machine and the sizes, for the line below the table."""
    client = BlockingConnection(Address(url), START_S)
    server = dict(line.partition(":")[::2] for line in client.call("INFO", "server").decode().splitlines())
    client.close()
    version = server.get("valkey_version") or server["redis_version"]
    return {
        "rounds": f"{plan.rounds} round{'s'[: plan.rounds > 1]} of {plan.seconds} s each in turn",
        "workers": f"{settings.workers} workers of {settings.concurrency} jobs",
        "chains": f"{settings.num_chains} chains",
        "server": f"{str(server.get('server_name', 'redis')).title()} {version}",
        "python": f"Python {platform.python_version()}",
        "machine": f"{os.cpu_count()} cores ({processor()})",
        "kernel": f"{platform.system()} {platform.release()}",
    }


async def _remove_queues(names: Sequence[str], url: str) -> None:
    """Destroys the queues of this comparison. A Redis that has ended has kept none."""
    for name in names:
        with suppress(BeeQueueError, TimeoutError):
            async with asyncio.timeout(START_S), Queue(name, url, is_worker=False, get_events=False) as queue:
                await queue.destroy()
