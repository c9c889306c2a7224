"""The soak: `python -m tests.faults.soak`. It runs for MINUTES (30), and SEED (189) picks a fault every EVERY (20) seconds.

Two queues share a Redis: one has the field and its ledger, the other the harness's own client and six workers. After each fault
the chains must be back and the ledger must add up; then a new page begins, so that the ledger does not grow. Memory is measured
along the way. Exit code: 0 when everything was right, 1 when not, 2 for a wrong argument.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import beequeue.wire.link
from beequeue.parse import whole_number
from config import fail
from tests.faults import worker
from tests.faults.field import Field, with_password
from tests.faults.harness import CHAINS, OF_REDIS, OF_THE_HARNESS, Ground, Harness
from tests.faults.scenarios import FAULTS
from tests.relay import Relay

SOAKED = (
    *OF_REDIS,
    *OF_THE_HARNESS,
    "stop-a-worker",
    "flush-scripts-in-save-all",
    "cut-behind-finishes",
    "relay-cuts",
    "relay-halves",
    "password-changes",
    "proxy-resets",
    "provider-fails",
    "loading",
    "paused-for-long",
    "server-stopped",
    "slow-link",
    "forgotten-flow",
)
"""The faults that keep this Redis in its place, spare the harness's rights, and leave most workers alive."""
GROWTH_MB = 3
"""How much a process may grow after the first third of its life. Two sockets leak over 50 MB of bindings in 30 minutes."""
ROWS = 10
"""The most lines of the memory table."""


@dataclass(frozen=True)
class Plan:
    """The settings from the environment."""

    minutes: float
    every: float
    seed: int
    faults: tuple[str, ...]

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Plan:
        """Raises `ValueError` with the line to show."""
        found = {}
        for name, default in (("MINUTES", "30"), ("EVERY", "20")):
            given = environment.get(name) or default
            if not given.replace(".", "", 1).isdecimal():
                raise ValueError(f"{name} must be a number, not {given!r}")
            found[name] = float(given)
        try:
            seed = whole_number(environment.get("SEED") or "189", at_least=0)
        except ValueError as error:
            raise ValueError(f"SEED {error}") from None
        faults = tuple(environment.get("FAULTS", "").split()) or SOAKED
        for fault in faults:
            if fault not in SOAKED:
                raise ValueError(f"FAULTS must name some of {', '.join(SOAKED)}; not {fault!r}")
        return cls(found["MINUTES"], found["EVERY"], seed, faults)


@dataclass
class Figures:
    """The figures of the report."""

    faults: Counter[str] = field(default_factory=Counter)
    ledger: Counter[str] = field(default_factory=Counter)
    memory: defaultdict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Minute and MB, by process."""

    def look(self, minute: float, harness: Harness, redis_mb: float) -> None:
        """Records the memory of every live process."""
        for member in (harness.client, *harness.workers):
            self.memory[member.name].append((minute, resident_mb(member.pid)))
        self.memory["redis"].append((minute, redis_mb))

    def balanced(self, fault: str, ground: Field) -> None:
        """Adds a page of the ledger that added up."""
        books, notes = ground.ledger, ground.crew.notes
        self.faults[fault] += 1
        self.ledger.update(
            {
                "saved": len(books.saved),
                "settled": len(books.told),
                "of them unknown": books.unknown,
                "uncertain": len(books.uncertain),
                "refused": len(books.refused),
                "run again": sum(notes.again().values()),
                "stalled": sum(notes.stalled.values()),
                "lost replies": notes.cuts - notes.killed,
                "killed workers": notes.killed,
            }
        )

    def growth(self) -> dict[str, float]:
        """How much each of our processes has grown after the first third of its life, in MB, if it lived long enough."""
        ours = {name: samples for name, samples in self.memory.items() if name != "redis" and len(samples) > 2}
        return {name: samples[-1][1] - samples[len(samples) // 3][1] for name, samples in ours.items()}

    def table(self) -> str:
        """Memory over time: the client, the workers (from smallest to biggest), Redis."""
        client = self.memory["client"]
        step = -(-len(client) // ROWS)
        lines = ["minute  client MB  workers MB     Redis MB"]
        for minute, size in client[::-step][::-1]:
            workers = [mb for name in self.memory if "worker" in name for when, mb in self.memory[name] if when == minute]
            redis = next(mb for when, mb in self.memory["redis"] if when == minute)
            lines.append(f"{minute:6.1f}  {size:9.1f}  {min(workers):.1f} to {max(workers):.1f}  {redis:8.1f}")
        return "\n".join(lines)


def resident_mb(pid: int) -> float:
    """A process's resident memory (Linux)."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def strike(fault: str, load: Field, ground: Ground) -> float:
    """Makes a fault happen to both queues and waits for both; returns the seconds from its end until seven chains live."""
    of_the_harness = [OF_THE_HARNESS[fault](ground)] if fault in OF_THE_HARNESS else []
    await asyncio.gather(FAULTS[fault](load), *of_the_harness)
    over = time.monotonic()
    await load.assert_no_two_states()
    await ground.harness.recovered()
    return time.monotonic() - over


async def soak(plan: Plan, figures: Figures) -> None:
    """Runs the soak; raises if anything was wrong."""
    chance, started = random.Random(plan.seed), time.monotonic()
    load = Field("soak", plan.seed)
    async with load, Relay(load.server.url, remember=2**16, tcp=True) as relay:
        async with Harness(with_password(relay.url), load.redis, workers=6, STATS_INTERVAL="1") as harness:
            ground = Ground(load.server, relay, load.redis, harness, chance)
            await harness.recovered()
            due, to_come = time.monotonic(), list[str]()
            while not figures.faults or time.monotonic() < started + 60 * plan.minutes:
                due = max(due + plan.every, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
                to_come = to_come or chance.sample(plan.faults, len(plan.faults))
                fault = to_come.pop()
                say(started, f"{fault}:")
                back = await strike(fault, load, ground)
                counts = await load.balance()
                figures.balanced(fault, load)
                await load.turn_page()
                relay.forget_closed()
                used = (await load.redis.info("memory"))["used_memory"] / 1e6
                figures.look((time.monotonic() - started) / 60, harness, used)
                say(started, f"{fault}: seven chains {back:.1f} s later; ledger right: {counts}")
            await harness.seven_are_left()
            await harness.end()
            print(totals(harness.stats[-1]))
        await load.settle()


def say(started: float, line: str) -> None:
    """Prints a line with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    print(f"{minutes:2}:{seconds:02}  {line}", flush=True)


def totals(last: Mapping[str, Any]) -> str:
    """The client's last line, in words."""
    return (
        f"harness: {last['numQueueSucceeded']:,} jobs, {CHAINS} chains alive, {last['numRestarted']} restarted, "
        f"{last['numJobSaveError']} saves failed, {last['numSucceededLost']} jobs missed their own event, "
        f"{last['numReconnects']} connections came back"
    )


def show(figures: Figures) -> None:
    """Prints the end of the report."""
    grown = ", ".join(f"{name} {mb:+.1f}" for name, mb in figures.growth().items())
    print(f"ledger: {', '.join(f'{count:,} {what}' for what, count in figures.ledger.items())}")
    print(f"faults: {sum(figures.faults.values())}: {', '.join(f'{name} {n}' for name, n in figures.faults.items())}")
    print("", figures.table(), "", f"growth after the first third of each life, MB: {grown}", sep="\n")


def main() -> int:
    try:
        plan = Plan.read(os.environ)
    except ValueError as error:
        fail(str(error), code=2)
    beequeue.wire.link.TICK_S = worker.TICK_S  # The field's producer, like its workers, finds a silent connection soon.
    logging.getLogger("beequeue").setLevel(logging.ERROR)  # Drops the line for each attempt to connect.
    figures, wrong = Figures(), []
    try:
        asyncio.run(soak(plan, figures))
    except Exception:  # The report still shows everything that was right until then.
        traceback.print_exc()
        wrong.append("the soak did not run to its end")
    if figures.faults:
        show(figures)
    wrong += [f"{name} grew by {mb:.1f} MB" for name, mb in figures.growth().items() if mb > GROWTH_MB]
    print(f"wrong: {', '.join(wrong)}" if wrong else "right: nothing lost, seven chains, memory flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
