"""Other queues on Redis: their programs, their environments, and one run of each.

Each peer has a program here that stores or drains no-op jobs under the rules of bench/contestants/, configured for speed as
its own documentation advises. The peers' packages have their own environments, made at first use. A peer whose packages
cannot be installed is left out.
"""

from __future__ import annotations

import json
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measures import BATCH, OURS
from bench.paired import Setup, own_queue, own_server, rate
from bench.programs import Failed, Program, python_program
from harness import install
from harness.install import NotInstalled

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A queue, its program, and the list of packages that it needs."""

    name: str
    program: str
    requirements: str = "requirements.txt"
    concurrency: int = 10

    @property
    def language(self) -> str:
        return "Node" if self.program.endswith(".js") else "Python"


@dataclass(frozen=True)
class PeerResult:
    """One queue's drain and enqueue, in jobs/s."""

    name: str
    language: str
    version: str
    concurrency: int
    jobs: int
    drain: float
    enqueue: float


PEERS = (
    Peer("bullmq", "bullmq.js", "package-lock.json"),
    Peer("bullmq", "run_bullmq.py"),
    Peer("arq", "run_arq.py", "requirements-arq.txt"),
    Peer("saq", "run_saq.py"),
    Peer("dramatiq", "run_dramatiq.py"),
    Peer("huey", "run_huey.py"),
    Peer("rq", "run_rq.py", concurrency=1),
)


def run(setup: Setup) -> tuple[list[PeerResult], dict[str, str]]:
    """Measures beequeue and every peer in turn. Returns the results, and a reason for each peer that is left out."""
    results = [_ours(setup)]
    left_out: dict[str, str] = {}
    for peer in PEERS:
        try:
            results.append(_peer(setup, peer))
        except (NotInstalled, Failed) as reason:
            left_out[f"{peer.name} ({peer.language})"] = str(reason)
        else:
            told = f"{results[-1].drain:,.0f} drained, {results[-1].enqueue:,.0f} enqueued per second"
            print(f"peers, {peer.name} ({peer.language}): {told}", file=sys.stderr, flush=True)
    return results, left_out


def best_python_drain(peers: Sequence[PeerResult]) -> PeerResult | None:
    """The fastest of Python's other queues."""
    others = [peer for peer in peers if peer.language == "Python" and peer.name != OURS]
    return max(others, key=lambda peer: peer.drain, default=None)


def _ours(setup: Setup) -> PeerResult:
    jobs = setup.sizes.drain
    with own_server(setup) as url, own_queue(url) as queue:
        order = {"url": url, "queue": queue, "jobs": jobs}
        with python_program("enqueue", {**order, "batch": BATCH}) as producer:
            enqueued = rate(producer.result())
        with python_program("drain", {**order, "concurrency": 10}) as worker:
            drained = rate(worker.result())
    return PeerResult(OURS, "Python", "", 10, jobs, drained, enqueued)


def _peer(setup: Setup, peer: Peer) -> PeerResult:
    """Uses a new server, so that nothing of the peer needs to be removed."""
    interpreter = _environment(peer)
    jobs = setup.sizes.peers if peer.concurrency > 1 else setup.sizes.peers_at_1
    with own_server(setup) as url:
        order = {"url": url, "queue": "bench", "jobs": jobs, "concurrency": peer.concurrency}
        enqueued = _step(interpreter, peer, {**order, "step": "enqueue"})
        drained = _step(interpreter, peer, {**order, "step": "drain"})
    version = str(drained["version"])
    return PeerResult(peer.name, peer.language, version, peer.concurrency, jobs, rate(drained), rate(enqueued))


def _step(interpreter: str, peer: Peer, order: dict[str, Any]) -> dict[str, Any]:
    with Program([interpreter, str(HERE / peer.program), json.dumps(order)]) as program:
        return program.result()


def _environment(peer: Peer) -> str:
    """Installs the peer's packages if need be; returns their interpreter. Raises `NotInstalled`."""
    if peer.language == "Node":
        return install.npm_ci(HERE)
    requirements = HERE / peer.requirements
    directory = HERE / ".venv" / requirements.stem
    interpreter, stamp = directory / "bin" / "python", directory / ".installed"
    if not stamp.exists() or stamp.stat().st_mtime < requirements.stat().st_mtime:
        venv.create(directory, clear=True, with_pip=True)
        install.run([str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(requirements)])
        stamp.touch()
    return str(interpreter)
