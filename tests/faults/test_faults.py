"""Each fault alone, and several in a row under one load, on a real Redis: no job is lost, and the ledger adds up.

`make faults SEED=n` repeats the run of a seed. FAULTS selects faults by name, ROUNDS sets the number of mixed runs.
"""

from __future__ import annotations

import os
import random

import pytest

import beequeue.wire.link
from beequeue.parse import whole_number
from tests.faults import worker
from tests.faults.field import Field
from tests.faults.scenarios import FAULTS


def number(variable: str, default: int, *, at_least: int) -> int:
    """An int from the environment; a wrong value ends the run with one line."""
    try:
        return whole_number(os.environ.get(variable) or str(default), at_least=at_least)
    except ValueError as error:
        pytest.exit(f"{variable} {error}", returncode=2)


def chosen() -> list[str]:
    """The faults that FAULTS names, by default all."""
    given = os.environ.get("FAULTS", "").split()
    for fault in given:
        if fault not in FAULTS:
            pytest.exit(f"FAULTS must name some of {', '.join(FAULTS)}; not {fault!r}", returncode=2)
    return given or list(FAULTS)


SEED = number("SEED", 189, at_least=0)
ROUNDS = number("ROUNDS", 1, at_least=1)
TIMES = number("TIMES", 1, at_least=1)
"""How many times in a row each fault happens when it is alone."""
CHOSEN = chosen()
MIXED = 4
"""The number of faults in a mixed run."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer, like the workers, finds a silent connection soon."""
    monkeypatch.setattr(beequeue.wire.link, "TICK_S", worker.TICK_S)


async def suffer(name: str, seed: int, faults: list[str], times: int = 1) -> None:
    """Makes faults happen under load, then checks the ledger. The output says how to repeat the run."""
    print(f"to repeat: make faults SEED={seed} ROUNDS=1 TIMES={TIMES} FAULTS='{' '.join(CHOSEN)}'; this is {', '.join(faults)}")
    async with Field(name, seed) as field:
        await field.more()
        for fault in faults:
            print(fault)
            for _ in range(times):
                await FAULTS[fault](field)
                await field.assert_no_two_states()
            await field.more()
        await field.settle()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", CHOSEN)
async def test_alone(name: str, fault: str) -> None:
    await suffer(name, SEED, [fault], TIMES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
async def test_mixed(name: str, seed: int) -> None:
    chance = random.Random(seed)
    await suffer(name, seed, chance.sample(CHOSEN, min(MIXED, len(CHOSEN))))
