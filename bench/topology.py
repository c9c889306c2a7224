"""The main job's topology as under Compose, with Python's programs or Node's: one client and six workers.

Measures between two of the client's stats lines, while all processes work. At both, it reads each process's processor time.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from bench.measures import CHAINS, WORKER_CONCURRENCY, WORKERS
from bench.programs import Program, cpu_s
from harness.member import ROOT
from harness.original import NODE_MODULES

NODE_PROGRAMS = ROOT / "harness" / "node"


@dataclass(frozen=True)
class TopologyRun:
    """The difference between the two moments; the client's memory is that of the second one."""

    jobs: int
    seconds: float
    cpu_s: float
    redis_cpu_s: float
    client_rss_kb: int


class Moment(NamedTuple):
    """The values that are read when the client prints a line."""

    stats: dict[str, Any]
    at_s: float
    cpu_s: float
    redis_cpu_s: float


def run_topology(url: str, queue: str, node: str | None, warm_up_s: int, seconds: int) -> TopologyRun:
    """Runs the topology on `url`; with Node's programs if `node` is the path of Node. Raises `Failed`."""
    environment = {
        "REDIS_URL": url,
        "QUEUE_NAME": queue,
        "NUM_CHAINS": str(CHAINS),
        "CONCURRENCY": str(WORKER_CONCURRENCY),
        "ORDERED_EVENTS": "true",
        "EXTENDED_STATS": "true",
        "STATS_INTERVAL": "1",
        "DURATION": "",
    }
    if node is None:
        client, worker = [sys.executable, "client.py"], [sys.executable, "worker.py"]
    else:
        environment["NODE_PATH"] = str(NODE_MODULES)
        client, worker = [node, str(NODE_PROGRAMS / "client.js")], [node, str(NODE_PROGRAMS / "worker.js")]
    with redis.Redis.from_url(url) as connection:
        server_pid: int = connection.info("server")["process_id"]
    with ExitStack() as running:
        members = [running.enter_context(Program(worker, environment)) for _ in range(WORKERS)]
        members.insert(0, running.enter_context(Program(client, environment)))

        def moment(after_lines: int) -> Moment:
            for _ in range(after_lines - 1):
                members[0].line()
            stats = members[0].line()
            return Moment(stats, time.perf_counter(), sum(cpu_s(member.pid) for member in members), cpu_s(server_pid))

        start, end = moment(warm_up_s), moment(seconds)
    return TopologyRun(
        jobs=_ended(end.stats) - _ended(start.stats),
        seconds=end.at_s - start.at_s,
        cpu_s=end.cpu_s - start.cpu_s,
        redis_cpu_s=end.redis_cpu_s - start.redis_cpu_s,
        client_rss_kb=end.stats["rssKb"],
    )


def _ended(stats: dict[str, Any]) -> int:
    return int(stats["numQueueSucceeded"] + stats["numQueueFailed"])
