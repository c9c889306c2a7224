"""The harness as processes: `python -m harness local`, and the client and the worker on their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as sync_redis

from harness.server import Server
from tests import ROOT

KEYS = [
    "numJobSaveSuccess",
    "numJobSaveError",
    "numQueueSucceeded",
    "numQueueFailed",
    "numJobSucceeded",
    "throughput",
    "numSucceededLost",
    "succededLossPercent",
]
CHAINS = 7


def until(condition: Callable[[], Any], deadline_s: float = 20) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def check_stats(line: str, extended: bool = False) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads(line)
    assert list(stats)[:8] == KEYS
    assert extended or len(stats) == 8
    assert [type(stats[key]) for key in KEYS] == [int] * 5 + [str, int, str]
    lost = stats["numQueueSucceeded"] - stats["numJobSucceeded"]
    assert stats["numSucceededLost"] == lost >= 0
    # alive = saving + saved - ended, and a job may end before the reply to its save is handled
    assert -CHAINS <= stats["numJobSaveSuccess"] - stats["numQueueSucceeded"] <= CHAINS
    return stats


def environment(**variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name.lower() not in ("ordered_events", "duration")}
    return {**clean, "STATS_INTERVAL": "0.5", **variables}


class Local:
    """`python -m harness local`, started."""

    def __init__(self, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness", "local"],
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[list[str], str]:
        out, err = self.process.communicate(timeout=40)
        return out.splitlines(), err

    def descendants(self) -> list[int]:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except FileNotFoundError:
                pass  # it has ended
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]


@pytest.fixture
def local() -> Iterator[Callable[..., Local]]:
    started: list[Local] = []

    def start(**variables: str) -> Local:
        started.append(Local(**variables))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
        run.process.communicate()


@pytest.mark.parametrize("ordered", ["false", "true"])
def test_the_main_job(local: Callable[..., Local], ordered: str) -> None:
    run = local(DURATION="3", ORDERED_EVENTS=ordered, EXTENDED_STATS="true", WORKERS="6")
    out, err = run.end()
    assert run.process.returncode == 0, err
    assert len(out) == 6
    assert all(line.startswith("client_1  | {") for line in out)
    stats = [check_stats(line.split("| ", 1)[1], extended=True) for line in out]
    assert [line["numAlive"] for line in stats[:-1]] == [CHAINS] * 5
    last = stats[-1]
    assert last["numJobSaveError"] == last["numQueueFailed"] == last["numRestarted"] == last["numAlive"] == 0
    assert last["numJobSaveSuccess"] == last["numQueueSucceeded"] > 1000
    assert last["numTracked"] == last["numSucceededLost"]
    if ordered == "true":
        assert last["numSucceededLost"] == 0
        assert last["succededLossPercent"] == "0.0"
    else:
        assert last["numSucceededLost"] > 0
    assert sum(line.endswith("worker: connected; concurrency 2") for line in err.splitlines()) == 6
    assert sum(line.endswith("worker: stopped") for line in err.splitlines()) == 6
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_of_it(local: Callable[..., Local], own_server: Server, number: signal.Signals) -> None:
    run = local(WORKERS="3", REDIS_URL=own_server.url)
    assert run.process.stdout is not None
    check_stats(run.process.stdout.readline().split("| ", 1)[1])
    children = run.descendants()
    assert len(children) == 4
    run.process.send_signal(number)
    out, err = run.end()
    assert run.process.returncode == 0, err
    last = check_stats(out[-1].split("| ", 1)[1])
    assert last["numJobSaveSuccess"] == last["numQueueSucceeded"]
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert_nothing_left(own_server)


def assert_nothing_left(server: Server) -> None:
    with sync_redis.Redis.from_url(server.url, decode_responses=True) as redis:
        assert {key.removeprefix("bq:issue-189:") for key in redis.scan_iter()} <= {"id", "stallBlock"}


def test_nothing_outlives_a_killed_parent(local: Callable[..., Local]) -> None:
    run = local(WORKERS="2", REDIS_URL="")
    assert run.process.stdout is not None
    run.process.stdout.readline()
    children = run.descendants()
    assert len(children) == 4  # a server, two workers, the client
    run.process.kill()
    run.process.wait()
    until(lambda: not any(_runs(pid) for pid in children))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_ends_when_nobody_reads(local: Callable[..., Local]) -> None:
    run = local(WORKERS="1")
    assert run.process.stdout is not None
    run.process.stdout.readline()
    run.process.stdout.close()
    assert run.process.stderr is not None
    err = run.process.stderr.read()
    assert run.process.wait(20) == 0, err
    assert "Traceback" not in err


def test_a_redis_that_does_not_answer_is_named(local: Callable[..., Local]) -> None:
    run = local(REDIS_URL="unix:///nowhere/redis.sock")
    out, err = run.end()
    assert run.process.returncode == 1
    assert out == []
    assert len(err.splitlines()) == 1
    assert err.startswith("REDIS_URL names a Redis that does not answer: ")


def test_a_server_that_cannot_be_run_is_named(local: Callable[..., Local]) -> None:
    run = local(REDIS_URL="", REDIS_SERVER="/nowhere/redis-server")
    _, err = run.end()
    assert run.process.returncode == 1
    assert err == "REDIS_SERVER must name an executable server, not '/nowhere/redis-server'\n"


def test_dotenv_sets_the_number_of_workers(tmp_path: Path, own_server: Server) -> None:
    """as .env.example promises for `make local`"""
    for name in ("client.py", "worker.py", "config.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "harness", tmp_path / "harness", ignore=shutil.ignore_patterns("__pycache__", "node"))
    (tmp_path / ".env").write_text("WORKERS=2\nDURATION=1\n")
    ended = subprocess.run(
        [sys.executable, "-m", "harness", "local"],
        cwd=tmp_path,
        env={**environment(REDIS_URL=own_server.url), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert {line.split(" ")[0] for line in ended.stderr.splitlines()} == {"client_1", "worker_1", "worker_2"}


class Programs:
    """client.py and worker.py on the test's own server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.started: list[subprocess.Popen[str]] = []

    def start(self, program: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, program],
            cwd=ROOT,
            env=environment(REDIS_URL=self.server.url, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def programs(own_server: Server) -> Iterator[Programs]:
    made = Programs(own_server)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_workers_that_stop_under_load_leave_nothing_in_active(programs: Programs) -> None:
    client = programs.start("client.py", EXTENDED_STATS="true")
    assert client.stdout is not None
    with sync_redis.Redis.from_url(programs.server.url) as redis:
        for _ in range(3):
            worker = programs.start("worker.py", CONCURRENCY="5")
            stats = check_stats(client.stdout.readline(), extended=True)
            enough = stats["numQueueSucceeded"] + 500
            while check_stats(client.stdout.readline(), extended=True)["numQueueSucceeded"] < enough:
                pass
            worker.terminate()
            _, err = worker.communicate(timeout=20)
            assert worker.returncode == 0, err
            assert "Traceback" not in err
            assert redis.exists("bq:issue-189:active") == 0
            assert redis.llen("bq:issue-189:waiting") == CHAINS
    client.terminate()
    out, err = client.communicate(timeout=20)
    assert client.returncode == 0, err
    assert "Traceback" not in err
    assert check_stats(out.splitlines()[-1], extended=True)["numAlive"] == CHAINS


def test_a_killed_workers_jobs_come_back(programs: Programs) -> None:
    """by the stall check of another worker: all chains go on, and none is restarted"""
    client = programs.start("client.py", EXTENDED_STATS="true")
    victim = programs.start("worker.py")
    assert client.stdout is not None
    while not check_stats(client.stdout.readline(), extended=True)["numQueueSucceeded"]:
        pass
    with sync_redis.Redis.from_url(programs.server.url) as redis:

        def active() -> set[Any]:
            return set(redis.lrange("bq:issue-189:active", 0, -1))

        def holds_a_job() -> bool:
            victim.send_signal(signal.SIGCONT)
            victim.send_signal(signal.SIGSTOP)  # an open take still gets a job
            return bool(active())

        until(holds_a_job)
        victim.kill()
        victim.wait()
        lost = active()
        assert lost
        programs.start("worker.py")
        until(lambda: not lost & active(), deadline_s=30)
    assert check_stats(client.stdout.readline(), extended=True)["numAlive"] == CHAINS
    client.terminate()
    out, _ = client.communicate(timeout=20)
    last = check_stats(out.splitlines()[-1], extended=True)
    assert last["numRestarted"] == 0
    assert last["numJobSaveSuccess"] == last["numQueueSucceeded"]


@pytest.mark.parametrize("ordered", ["true", "false"])
def test_the_harness_outlives_a_restart_of_redis(programs: Programs, ordered: str) -> None:
    client = programs.start("client.py", EXTENDED_STATS="true", ORDERED_EVENTS=ordered)
    workers = [programs.start("worker.py") for _ in range(2)]
    assert client.stdout is not None
    before = check_stats(client.stdout.readline(), extended=True)
    for worker in workers:
        assert worker.stderr is not None
        assert "connected" in worker.stderr.readline()
    deadline = time.monotonic() + 50
    programs.server.stop()
    programs.server.start()
    while True:
        assert time.monotonic() < deadline
        stats = json.loads(client.stdout.readline())
        if stats["numAlive"] == CHAINS and stats["numQueueSucceeded"] > before["numQueueSucceeded"] + 500:
            break
    for process in [client, *workers]:
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert "connection to" in err
        assert "is back" in err
    assert_nothing_left_but_lost(programs.server)


def assert_nothing_left_but_lost(server: Server) -> None:
    with sync_redis.Redis.from_url(server.url) as redis:
        assert redis.exists("bq:issue-189:active") == 0


@pytest.mark.parametrize("program", ["client.py", "worker.py"])
def test_a_refusal_is_one_line(program: str, own_server: Server) -> None:
    with sync_redis.Redis.from_url(own_server.url) as redis:
        redis.config_set("requirepass", "secret")
    ended = subprocess.run(
        [sys.executable, program],
        cwd=ROOT,
        env=environment(REDIS_URL=own_server.url),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert "authenticat" in ended.stderr.lower()


@pytest.mark.parametrize("program", ["client.py", "worker.py"])
def test_stopped_before_redis_is_up(program: str, programs: Programs) -> None:
    programs.server.stop()
    process = programs.start(program)
    assert process.stderr is not None
    assert "next attempt in 250 ms" in process.stderr.readline()
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
