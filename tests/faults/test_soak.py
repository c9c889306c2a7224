"""A short soak, and its messages about wrong arguments. `make soak` runs the long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.faults.harness import CHAINS
from tests.faults.scenarios import FAULTS
from tests.faults.soak import SOAKED, Figures


def soak(**variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MINUTES", "EVERY", "SEED", "FAULTS")}
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.soak"],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.timeout(120)
def test_a_short_soak() -> None:
    ended = soak(MINUTES="0.2", EVERY="1", SEED="1", FAULTS="flush-scripts kill-each-connection")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    lines = ended.stdout.splitlines()
    assert lines[-1] == "right: nothing lost, seven chains, memory flat"
    jobs = re.search(rf"^harness: ([\d,]+) jobs, {CHAINS} chains alive, ", ended.stdout, re.MULTILINE)
    assert jobs is not None
    assert int(jobs[1].replace(",", "")) > 500
    saved = re.search(r"^ledger: ([\d,]+) saved, ([\d,]+) settled", ended.stdout, re.MULTILINE)
    assert saved is not None
    assert saved[1] == saved[2]
    assert sum("ledger right" in line for line in lines) >= 1


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("MINUTES", "long", "MINUTES must be a number, not 'long'"),
        ("EVERY", "-1", "EVERY must be a number, not '-1'"),
        ("SEED", "1.5", "SEED must be a whole number of at least 0, not '1.5'"),
        ("FAULTS", "flood", f"FAULTS must name some of {', '.join(SOAKED)}; not 'flood'"),
    ],
)
def test_a_wrong_argument_is_named(variable: str, value: str, line: str) -> None:
    ended = soak(**{variable: value})
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line + "\n")


def test_every_fault_of_the_soak_exists() -> None:
    assert set(SOAKED) <= set(FAULTS)


def test_growth_is_measured_from_the_first_third_of_a_life() -> None:
    figures = Figures()
    for minute in range(9):
        figures.memory["client"].append((minute, 30 + 5 * minute))
        figures.memory["worker_1"].append((minute, 30 if minute < 3 else 36))
        figures.memory["redis"].append((minute, 9 * minute))
    figures.memory["worker_2"] = [(7, 30), (8, 60)]
    assert figures.growth() == {"client": 25, "worker_1": 0}
