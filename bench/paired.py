"""The measures that compare beequeue with its baseline: one run of one side, and how the sides alternate.

A run returns its rows' values by key. Each measure starts a server, and each run uses and destroys its own queue there. For
both sides of a drain, beequeue's producer stores the jobs, so both find the same bytes.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beequeue import Queue
from bench.measures import BATCH, CONCURRENCIES, IN_FLIGHT, NODE, OURS, ROWS, Sizes
from bench.programs import Program, node_program, python_program
from bench.topology import run_topology
from harness.server import running_server

Values = dict[str, float]
Samples = dict[str, dict[str, list[float]]]
"""Row's key -> side -> a value for each round."""


@dataclass(frozen=True)
class Setup:
    """The parameters of every measure."""

    server: Path
    sizes: Sizes
    rounds: int
    node: str | None
    """The path of Node; None: there is nothing to compare with."""
    tcp: bool = True
    """TCP over the loopback, as under Compose and with nearly every Redis; else a unix socket."""

    def program(self, side: str, name: str, order: dict[str, Any]) -> Program:
        if side == OURS:
            return python_program(name, order)
        assert self.node is not None
        return node_program(self.node, name, order)


@contextmanager
def own_server(setup: Setup) -> Iterator[str]:
    """The URL of a server that runs until the end of the block; raises `NoServer`."""
    if setup.tcp:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with running_server(setup.server, "--bind", "127.0.0.1", "--port", str(port)):
            yield f"redis://127.0.0.1:{port}/0"
    else:
        with running_server(setup.server) as server:
            yield server.url


@contextmanager
def own_queue(url: str) -> Iterator[str]:
    """The name of a new queue, which is destroyed at the end of the block."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    yield name

    async def destroy() -> None:
        async with Queue(name, url, is_worker=False, get_events=False) as queue:
            await queue.destroy()

    asyncio.run(destroy())


def store(url: str, queue: str, jobs: int) -> dict[str, Any]:
    """Stores no-op jobs; returns what the producer reports."""
    with python_program("enqueue", {"url": url, "queue": queue, "jobs": jobs, "batch": BATCH}) as producer:
        return producer.result()


def rate(result: dict[str, Any]) -> float:
    return float(result["jobs"] / result["seconds"])


def drain(setup: Setup, side: str, url: str) -> Values:
    values = {}
    for concurrency in CONCURRENCIES:
        with own_queue(url) as queue:
            store(url, queue, setup.sizes.drain)
            order = {"url": url, "queue": queue, "jobs": setup.sizes.drain, "concurrency": concurrency}
            with setup.program(side, "drain", order) as worker:
                result = worker.result()
        values[f"drain_{concurrency}"] = rate(result)
        if concurrency == 10:
            values["worker_memory"] = result["rss_kb"] * 1024 / 1e6
    return values


def enqueue(setup: Setup, side: str, url: str) -> Values:
    values: Values = {}
    orders: dict[str, dict[str, int]] = {
        "save_all": {"jobs": setup.sizes.save_all, "batch": BATCH},
        "saves": {"jobs": setup.sizes.saves, "in_flight": IN_FLIGHT},
    }
    for key, order in orders.items():
        with own_queue(url) as queue, setup.program(side, "enqueue", {"url": url, "queue": queue, **order}) as producer:
            values[key] = rate(producer.result())
    return values


def latency(setup: Setup, side: str, url: str) -> Values:
    jobs, warm_up = setup.sizes.latency, setup.sizes.latency_warm_up
    with own_queue(url) as queue:
        work = {"url": url, "queue": queue, "jobs": jobs + warm_up, "concurrency": 1}
        order = {"url": url, "queue": queue, "jobs": jobs, "warm_up": warm_up}
        with setup.program(side, "drain", work) as worker, setup.program(side, "latency", order) as producer:
            result = producer.result()
            worker.result()
    return {"latency_p50": result["p50_us"], "latency_p99": result["p99_us"]}


def harness(setup: Setup, side: str, url: str) -> Values:
    with own_queue(url) as queue:
        run = run_topology(
            url, queue, setup.node if side == NODE else None, setup.sizes.harness_warm_up_s, setup.sizes.harness_s
        )
    return {
        "harness": run.jobs / run.seconds,
        "harness_cpu": run.cpu_s / run.jobs * 1e6,
        "harness_redis_cpu": run.redis_cpu_s / run.jobs * 1e6,
        "client_memory": run.client_rss_kb * 1024 / 1e6,
    }


def import_time(setup: Setup, side: str, url: str) -> Values:
    with python_program("importing", {"module": side}) as program:  # the sides have the modules' names
        return {"import": float(program.result()["seconds"] * 1000)}


RUNS: dict[str, Callable[[Setup, str, str], Values]] = {
    "harness": harness,
    "drain": drain,
    "enqueue": enqueue,
    "latency": latency,
    "import": import_time,
}


def measure(setup: Setup, name: str) -> Samples:
    """Runs one measure. Each round runs each side once; the sides take turns going first."""
    rows = [row for row in ROWS if row.measure == name]
    sides = [OURS, rows[0].baseline]
    if setup.node is None and NODE in sides:
        sides.remove(NODE)
    samples: Samples = {row.key: {side: [] for side in sides} for row in rows}
    with own_server(setup) as url:
        for number in range(setup.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                values = RUNS[name](setup, side, url)
                for row in rows:
                    samples[row.key][side].append(values[row.key])
                told = ", ".join(f"{row.key} {values[row.key]:,.4g} {row.unit}" for row in rows)
                print(f"{name}, round {number + 1} of {setup.rounds}, {side}: {told}", file=sys.stderr, flush=True)
    return samples
