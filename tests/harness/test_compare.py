"""`python -m harness compare`: its findings from given runs, and a real comparison."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import redis as sync_redis
from tqdm import tqdm

import config
from harness import compare as comparison
from harness.__main__ import main
from harness.compare import Contestant, NotCompared, _run_client
from harness.install import NotInstalled
from harness.latencies import Latencies
from harness.member import Member
from harness.original import install
from harness.report import CURE_LOST, CURE_SLOWER, NO_RACE, OK, Row, Run, speed_ratio, table, verdict
from harness.server import Server
from tests import ROOT


def run(jobs: int = 10_000, lost: int = 0, per_s: int = 1000, rss_kb: int = 31_000) -> Run:
    """A run with half of its jobs ended at half-time, none of them lost, and 30,000 kB then."""

    def line(jobs: int, lost: int, rss_kb: int) -> dict[str, Any]:
        heard = {"numQueueSucceeded": jobs, "numSucceededLost": lost, "numTracked": lost, "throughput": str(per_s)}
        return {**heard, "rssKb": rss_kb, "p50Ms": per_s / 1000, "p99Ms": per_s / 100}

    return Run(line(jobs // 2, 0, 30_000), line(jobs, lost, rss_kb))


def judge(two: list[Run], one: list[Run]) -> tuple[int, str]:
    return verdict(Row("two", two), Row("one", one))


async def test_the_orderings_take_turns_to_be_first(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """so a machine that slows down favours neither"""
    order: list[str] = []

    async def start_worker(*arguments: Any) -> None: ...

    async def run_client(contestant: comparison.Contestant, bar: Any) -> Run:
        order.append(contestant.variables["ORDERED_EVENTS"])
        return run()

    monkeypatch.setattr(comparison, "_start_worker", start_worker)
    monkeypatch.setattr(comparison, "_run_client", run_client)
    plan = comparison.Plan(rounds=3, seconds=1, node=False, json=True)
    await comparison.run(plan, config.load(), {"REDIS_URL": url})
    assert order == ["false", "true", "true", "false", "false", "true"]


def test_the_race_and_its_cure() -> None:
    two = [run(lost=100, per_s=1000, rss_kb=30_150), run(lost=0, per_s=1000, rss_kb=30_000)]
    code, sentence = judge(two, [run(per_s=900), run(per_s=1200)])
    assert code == OK
    assert sentence == (
        "The race, and its cure: on two sockets 100 of 20,000 jobs (0.50 %) missed their own event and stay in memory, "
        "1.5 kB each; on one socket none of 20,000 missed it, at 1.05 times the speed (0.90 to 1.20)."
    )


def test_one_job_lost_with_the_cure_is_its_failure() -> None:
    code, sentence = judge([run(lost=100), run(lost=100)], [run(), run(lost=1)])
    assert code == CURE_LOST
    assert sentence == "The cure failed: on one socket 1 of 20,000 jobs (0.01 %) missed their own event."


def test_a_cure_that_lost_is_a_failure_where_the_race_did_not_show() -> None:
    assert judge([run()], [run(lost=1)])[0] == CURE_LOST


def test_no_race() -> None:
    code, sentence = judge([run()], [run()])
    assert code == NO_RACE
    assert sentence == (
        "The race did not show: on two sockets none of 10,000 jobs missed its own event; try more time, or more chains."
    )


@pytest.mark.parametrize(("speeds", "code"), [((940, 900), CURE_SLOWER), ((960, 500), OK), ((2000, 100), OK)])
def test_a_cure_is_slower_when_it_is_in_every_round(speeds: tuple[int, int], code: int) -> None:
    assert judge([run(lost=1), run(lost=1)], [run(per_s=speed) for speed in speeds])[0] == code


def test_rounds_are_compared_one_by_one() -> None:
    """a machine that halves its speed between two rounds does not spoil the ratio"""
    two, one = [run(per_s=1000), run(per_s=500)], [run(per_s=1100), run(per_s=550)]
    ratio = speed_ratio(Row("two", two), Row("one", one))
    assert (ratio.median, ratio.lowest, ratio.highest) == (1.1, 1.1, 1.1)


def test_the_table() -> None:
    rows = [Row("two sockets", [run(lost=100), run(lost=20, per_s=3000, rss_kb=33_000)]), Row("one", [run(rss_kb=30_000)])]
    assert table(rows).splitlines() == [
        "               jobs  lost  lost %  jobs/s  p50 ms  p99 ms  bindings left  MB half-time  MB end  MB/1M jobs",
        "two sockets  20,000   120    0.60   2,000    2.00   20.00            120          30.7    32.8       409.6",
        "one          10,000     0    0.00   1,000    1.00   10.00              0          30.7    30.7         0.0",
    ]


def test_memory_by_lost_job() -> None:
    assert Row("two", [run(lost=100, rss_kb=30_200)]).bytes_per_lost_job == 2048
    assert Row("one", [run()]).bytes_per_lost_job is None
    assert "stay in memory;" in judge([run(lost=1, rss_kb=30_000)], [run()])[1]


def test_latencies_are_kept_to_three_percent() -> None:
    latencies = Latencies()
    assert latencies.percentile_ms(0.5) is None
    for milliseconds in range(1, 1001):
        latencies.add(milliseconds / 1000)
    for share in (0.01, 0.5, 0.99, 1.0):
        assert latencies.percentile_ms(share) == pytest.approx(1000 * share, rel=0.032)


def compare(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WORKERS": "2", **variables}
    command = [sys.executable, "-m", "harness", "compare", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("what", ["numJobSaveError", "numQueueFailed", "numReconnects", "numRestarted"])
async def test_a_run_that_was_disturbed_is_not_judged(what: str) -> None:
    lines = [{"numQueueSucceeded": jobs, "numJobSucceeded": jobs} for jobs in (1, 2)]

    def client(last: dict[str, int]) -> Contestant:
        said = "\n".join(map(json.dumps, (lines[0], last)))
        return Contestant("a client", [sys.executable, "-c", f"print({said!r})"], [], {**os.environ, "DURATION": "10"})

    assert (await _run_client(client(lines[1]), tqdm(disable=True))).last == lines[1]
    with pytest.raises(NotCompared, match=f"^the client of 'a client' was disturbed, {what} is 1: it printed nothing$"):
        await _run_client(client(lines[1] | {what: 1}), tqdm(disable=True))


async def test_a_run_whose_worker_has_ended_is_not_judged() -> None:
    worker = Member("worker_1", [sys.executable, "-c", "raise SystemExit(3)"])
    await worker.start(os.environ, print, print)
    await worker.ended()
    said = '{"numQueueSucceeded":1,"numJobSucceeded":1}\n{"numQueueSucceeded":2,"numJobSucceeded":2}'
    program = [sys.executable, "-c", f"print({said!r})"]
    contestant = Contestant("a client", program, [worker], {**os.environ, "DURATION": "10"})
    with pytest.raises(NotCompared, match=r"^worker_1 ended with 3$"):
        await _run_client(contestant, tqdm(disable=True))


def test_both_orderings_on_ones_own_redis(own_server: Server) -> None:
    ended = compare("--rounds", "2", "--seconds", "2", "--json", REDIS_URL=own_server.url)
    assert ended.stderr == ""  # in a pipe there is no progress bar
    findings = json.loads(ended.stdout)
    two, one = findings["rows"]
    assert [two["name"], one["name"]] == ["two sockets (as upstream)", "one socket (the cure)"]
    for row in (two, one):
        assert len(row["runs"]) == 2
        assert row["jobs"] > 1000
        assert row["bindings left"] == row["lost"]
        assert 0 < row["p50 ms"] <= row["p99 ms"] < 1000
        assert row["jobs/s"] > 100
        assert row["MB end"] > 10
    assert one["lost"] == 0
    assert ended.returncode == findings["exitCode"]
    assert findings["exitCode"] in ((OK, CURE_SLOWER) if two["lost"] else (NO_RACE,))
    assert findings["speedRatio"]["lowest"] <= findings["speedRatio"]["median"] <= findings["speedRatio"]["highest"]
    with sync_redis.Redis.from_url(own_server.url) as redis:
        assert list(redis.scan_iter()) == []


def test_the_original_is_a_third_row() -> None:
    try:
        install()
    except NotInstalled as reason:
        pytest.skip(str(reason))
    ended = compare("--rounds", "1", "--seconds", "2", "--node")
    title, *rows, empty, conditions, sentence = ended.stdout.splitlines()
    assert ended.stderr == ""
    assert re.fullmatch(r" +jobs +lost +lost % +jobs/s .*", title)
    names = ["two sockets (as upstream)", "one socket (the cure)", "bee-queue 2.0.0 on Node"]
    assert [row[: len(name)] for row, name in zip(rows, names, strict=True)] == names
    assert empty == ""
    assert conditions.startswith("1 round of 2 s each in turn, 2 workers of 2 jobs, 7 chains, ")
    assert re.match(r"The (race|cure)", sentence)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0\n"),
        (["--seconds", "1"], "--seconds must be at least 2, not 1\n"),
    ],
)
def test_what_cannot_be_compared(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", "compare", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, *capsys.readouterr()) == (2, "", line)


def test_workers_that_cannot_start_are_named(own_server: Server) -> None:
    with sync_redis.Redis.from_url(own_server.url) as redis:
        redis.execute_command("ACL SETUSER", "default", "-script", "-evalsha")
    ended = compare("--rounds", "1", "--seconds", "2", REDIS_URL=own_server.url)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"worker_[12] did not start: .*no permission.*\n", ended.stderr, re.IGNORECASE)


def test_tqdm_is_needed_for_the_comparison_only() -> None:
    without = "import sys; sys.modules['tqdm'] = None; from harness.__main__ import main; main()"
    command = [sys.executable, "-c", without, "compare"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "tqdm is not installed: make compare, or pip install -e '.[compare]'\n"
