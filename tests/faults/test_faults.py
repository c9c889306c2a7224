"""Each fault alone, and several in a row under one load, on a real Redis: nothing is lost, and the ledger adds up.

`make faults SEED=n` repeats what a seed has done; FAULTS names some of them, ROUNDS says how many mixed runs there are.
"""

from __future__ import annotations

import os
import random

import pytest

import beequeue.link
from tests.faults import worker
from tests.faults.field import Field
from tests.faults.scenarios import FAULTS

SEED = int(os.environ.get("SEED", "189"))
ROUNDS = int(os.environ.get("ROUNDS", "1"))
TIMES = int(os.environ.get("TIMES", "1"))
CHOSEN = os.environ.get("FAULTS", "").split() or list(FAULTS)
MIXED = 4
"""How many faults there are in a mixed run."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer too finds a silent connection soon."""
    monkeypatch.setattr(beequeue.link, "TICK_S", worker.TICK_S)


async def suffer(name: str, seed: int, faults: list[str], times: int = 1) -> None:
    """Lets faults happen under load, and settles; a failure says how to repeat it."""
    print(f"to repeat: make faults SEED={SEED} FAULTS='{' '.join(faults)}' ROUNDS={ROUNDS} TIMES={TIMES}")
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
@pytest.mark.parametrize("number", range(ROUNDS))
async def test_mixed(name: str, number: int) -> None:
    chance = random.Random(SEED + number)
    await suffer(name, SEED + number, chance.sample(CHOSEN, min(MIXED, len(CHOSEN))))
