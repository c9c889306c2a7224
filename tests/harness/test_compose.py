"""The main job in containers, as README and `make up` start it, on Compose v1 and v2."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.conftest import skip
from tests.faults.harness import LOOK
from tests.harness.test_harness import CHAINS, check_stats, until

CLIENT = "issue-189_client_1"
PROJECT = "com.docker.compose.project"
V1, V2 = ["docker-compose"], ["docker", "compose"]
VARIABLES = {"ORDERED_EVENTS": "true", "EXTENDED_STATS": "true", "STATS_INTERVAL": "1"}
versions = pytest.mark.parametrize("compose", [V1, V2], ids=["v1", "v2"], indirect=True)
pytestmark = pytest.mark.timeout(300)


def run(*command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An editable copy of what make and Compose read. The engine answers, and no client runs yet."""
    if shutil.which("docker") is None or run("docker", "info").returncode:
        skip("no Docker engine answers")
    if run("docker", "ps", "-q", "--filter", f"name=^{CLIENT}$").stdout:
        skip(f"a container {CLIENT} runs already")
    directory = tmp_path_factory.mktemp("harness189")
    for name in ("Makefile", "docker-compose.yml", "Dockerfile", ".dockerignore", "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    for name in ("client.py", "worker.py", "config.py"):
        shutil.copy(ROOT / name, directory)
    for name in ("beequeue", "harness"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture
def compose(request: pytest.FixtureRequest, project: Path) -> Iterator[list[str]]:
    command: list[str] = request.param
    if run(*command, "version").returncode:
        skip(f"{' '.join(command)} is not installed")
    yield command
    run(*command, "down", "--timeout", "0", cwd=project)


def readme(compose: list[str]) -> list[str]:
    """README's command."""
    return [*compose, "up", "--build", "--scale", "worker=6"]


def make_up(compose: list[str]) -> list[str]:
    return ["make", "up", f"COMPOSE={' '.join(compose)}"]


class Up:
    """The main job in the foreground; its output goes to a file."""

    def __init__(self, command: list[str], project: Path, **variables: str) -> None:
        self.output = project / "output"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=project,
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> list[str]:
        """The stats lines so far."""
        return re.findall(rf"{CLIENT}\s*\|[^{{\n]*(\{{.*\}})", self.output.read_text())

    def stats(self) -> list[dict[str, Any]]:
        """The same, parsed; their counters must add up, since no job vanishes."""
        return [check_stats(line, extended=True) for line in self.lines()]

    def wait_for_stats(self, count: int, deadline_s: float = 200) -> list[dict[str, Any]]:
        deadline = time.monotonic() + deadline_s
        while len(stats := self.stats()) < count:
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        return stats


Start = Callable[..., Up]


@pytest.fixture
def start(compose: list[str], project: Path) -> Iterator[Start]:
    """Starts the main job; `compose` removes the containers afterwards."""
    started: list[Up] = []

    def start(command: list[str], **variables: str) -> Up:
        started.append(Up(command, project, **variables))
        return started[-1]

    yield start
    for up in started:
        up.process.kill()
        up.process.wait()


def containers(project: Path, compose: list[str]) -> list[str]:
    return run(*compose, "ps", "-q", cwd=project).stdout.split()


def test_bases_are_pinned_by_a_version() -> None:
    """a tag follows security updates, which a digest would not"""
    named = re.findall(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    named += re.findall(r"^ +image: (\S+)$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    assert set(named) == {"python:3.13-slim", "redis:8-alpine", "issue-189"}


@versions
def test_no_warning(compose: list[str], project: Path) -> None:
    checked = run(*compose, "config", "--quiet", cwd=project)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@versions
def test_the_main_job(compose: list[str], project: Path, start: Start) -> None:
    up = start(readme(compose), STATS_INTERVAL="0.5")
    stats = up.wait_for_stats(6)
    last = stats[-1]
    assert list(last)[-1] == "succededLossPercent"
    assert last["numJobSaveError"] == last["numQueueFailed"] == 0
    assert stats[0]["numSucceededLost"] < last["numSucceededLost"]
    said = [line for line in up.output.read_text().lower().splitlines() if not re.match(r"[^|]*redis[^|]*\|", line)]
    assert not [line for line in said if "warning" in line]
    check_top()
    check_the_image_is_complete()
    check_nobody_gets_in(compose, project)
    check_it_ends_cleanly(up, compose, project)


def check_top() -> None:
    """`docker exec -it issue-189_client_1 top`, on a terminal."""
    ours, theirs = pty.openpty()
    shown = subprocess.Popen(
        ["docker", "exec", "-it", CLIENT, "top", "-n", "1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    screen = b""
    try:
        while data := os.read(ours, 65536):
            screen += data
    except OSError:
        pass  # the other side was closed
    os.close(ours)
    assert shown.wait(30) == 0, screen
    assert b"load average" in screen
    assert b"python" in screen


def check_the_image_is_complete() -> None:
    """requirements.txt is all that the harness's own modules need"""
    assert run("docker", "exec", CLIENT, "python", "-m", "harness", "--help").stderr == ""


def check_nobody_gets_in(compose: list[str], project: Path) -> None:
    running = containers(project, compose)
    assert len(running) == 8
    inspected = json.loads(run("docker", "inspect", *running).stdout)
    for container in inspected:
        host = container["HostConfig"]
        assert not host["PortBindings"]
        assert host["PublishAllPorts"] is False
        assert not any(container["NetworkSettings"]["Ports"].values())
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["Privileged"] is False
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert container["Mounts"] == []  # nothing of the host, and nothing that outlives the container
    images = sorted(container["Config"]["Image"] for container in inspected)
    assert images == ["issue-189"] * 7 + ["redis:8-alpine"]
    one_of_each = {container["Config"]["Labels"]["com.docker.compose.service"]: container["Id"] for container in inspected}
    assert set(one_of_each) == {"redis", "client", "worker"}
    for container_id in one_of_each.values():
        check_powerless(container_id)
    for container in inspected:
        if container["Config"]["Image"] == "issue-189":
            assert container["HostConfig"]["Init"] is True


def check_powerless(container: str) -> None:
    """Checks what the kernel allows the first process, and that even root can write nothing."""
    script = "cat /proc/1/status; for place in / /usr/local/bin /etc; do touch $place/x && echo wrote to $place; done"
    said = run("docker", "exec", "--user", "0", container, "sh", "-c", script).stdout
    facts = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    assert "0" not in facts["Uid"].split()
    assert {int(facts[name], 16) for name in facts if name.startswith("Cap")} == {0}
    assert facts["NoNewPrivs"] == "1"
    assert "wrote to" not in said


def check_it_ends_cleanly(up: Up, compose: list[str], project: Path) -> None:
    end(up, compose, project)
    logged = run("docker", "logs", CLIENT)
    assert check_stats(logged.stdout.splitlines()[-1])["numJobSaveError"] == 0
    assert logged.stderr.splitlines()[-1] == "client: stopped"
    down = run(*compose, "down", cwd=project)
    assert down.returncode == 0, down.stderr
    assert containers(project, compose) == []


def end(up: Up, compose: list[str], project: Path) -> None:
    """Sends Ctrl-C. All exit with 0, so none had to be killed after the grace period."""
    running = containers(project, compose)
    up.process.send_signal(signal.SIGINT)
    up.process.wait(60)
    run(*compose, "stop", cwd=project)  # v2's `up` may return before all have stopped
    check_exit_codes(running)


def check_exit_codes(ended: list[str]) -> None:
    states = [(container["Name"], container["State"]) for container in json.loads(run("docker", "inspect", *ended).stdout)]
    codes = {name: (state["Running"], state["ExitCode"]) for name, state in states}
    assert set(codes.values()) == {(False, 0)}, codes


@versions
def test_make_up_ends_with_its_client(compose: list[str], project: Path, start: Start) -> None:
    """after DURATION; and the cure and every other variable pass from the shell"""
    variables = {"ORDERED_EVENTS": "true", "EXTENDED_STATS": "true", "DURATION": "2", "STATS_INTERVAL": "0.5"}
    up = start(make_up(compose), **variables, QUEUE_NAME="other", NUM_CHAINS="5", CONCURRENCY="1")
    assert up.process.wait(200) == 0, up.output.read_text()
    everything = run("docker", "ps", "--all", "--quiet", "--filter", f"label={PROJECT}={project.name}").stdout.split()
    assert len(everything) == 8
    check_exit_codes(everything)
    stats = up.stats()
    assert {line["numAlive"] for line in stats[:3]} == {5}
    last = max(stats, key=lambda line: line["numQueueSucceeded"])
    assert last["numQueueSucceeded"] == last["numJobSucceeded"] == last["numJobSaveSuccess"] > 500
    assert last["numSucceededLost"] == last["numTracked"] == last["numJobSaveError"] == 0
    assert f"{CHAINS - 2} chains, ordered_events=True" in up.output.read_text()
    assert "worker: connected; concurrency 1" in up.output.read_text()


@versions
def test_a_wrong_variable_ends_make_up(compose: list[str], project: Path, start: Start) -> None:
    """the variable is set in .env, which passes to the containers too"""
    (project / ".env").write_text("CONCURRENCY=0\n")
    try:
        up = start(make_up(compose))
        assert up.process.wait(200) != 0
    finally:
        (project / ".env").unlink()
    assert "CONCURRENCY must be a whole number of at least 1, not '0'" in up.output.read_text()
    # v2's `up` may return while it still starts workers; they end themselves
    until(lambda: not run("docker", "ps", "--quiet", "--filter", f"label={PROJECT}={project.name}").stdout)


@pytest.mark.parametrize("compose", [V2], ids=["v2"], indirect=True)
def test_it_lives_on_under_faults(compose: list[str], project: Path, start: Start) -> None:
    """what containers do under faults does not depend on the version of Compose"""
    up = start(readme(compose), **VARIABLES)
    up.wait_for_stats(2)
    chains = Chains(compose, project)
    restart_redis(compose, project, up, chains)
    kill_a_worker(compose, project, up, chains)
    pause_redis(compose, project, up, chains)
    run(*compose, "stop", "worker", cwd=project)
    chains.wait(lambda ids: len(ids) == CHAINS)
    until_a_line(up, lambda last: last["numAlive"] == last["numTracked"] == CHAINS)
    end(up, compose, project)
    assert "Traceback" not in up.output.read_text()


class Chains:
    """Looks at the queue with redis-cli, in Redis's container."""

    def __init__(self, compose: list[str], project: Path) -> None:
        self._redis = run(*compose, "ps", "-q", "redis", cwd=project).stdout.strip()

    def wait(self, condition: Callable[[list[str]], bool]) -> None:
        """Waits until it is true of the ids of all jobs waiting or active at one moment."""
        script = f"local function look() {LOOK} end return table.concat(look(), ' ')"
        looks = ("-r", "50", "-i", "0.01", "EVAL", script, "2", "bq:issue-189:waiting", "bq:issue-189:active")
        until(lambda: any(condition(ids.split()) for ids in self._say(*looks).splitlines()), 45)

    def are_back(self) -> None:
        """Waits until all chains have jobs at one moment, each saved since this call."""
        last = int(self._say("GET", "bq:issue-189:id").strip() or 0)
        self.wait(lambda ids: len(ids) == CHAINS and all(int(job_id) > last for job_id in ids))

    def _say(self, *command: str) -> str:
        return run("docker", "exec", self._redis, "redis-cli", *command).stdout


def until_a_line(up: Up, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Waits for a new stats line that meets the condition."""
    seen = len(up.lines())
    until(lambda: any(condition(json.loads(line)) for line in up.lines()[seen:]))


def restart_redis(compose: list[str], project: Path, up: Up, chains: Chains) -> None:
    """Redis comes back empty, so every chain starts anew."""
    assert run(*compose, "restart", "--timeout", "1", "redis", cwd=project).returncode == 0
    chains.are_back()
    until_a_line(up, lambda last: last["numAlive"] == CHAINS and last["numReconnects"] == 2 and last["numRestarted"] > 0)


def kill_a_worker(compose: list[str], project: Path, up: Up, chains: Chains) -> None:
    """Compose does not restart the worker. The other workers recover its jobs; `up` starts it again."""
    assert run("docker", "kill", running_workers(project)[0]).returncode == 0
    chains.are_back()
    until_a_line(up, lambda last: last["numAlive"] == CHAINS)
    assert len(running_workers(project)) == 5
    again = run(*compose, "up", "--detach", "--no-recreate", "--scale", "worker=6", cwd=project, **VARIABLES)
    assert again.returncode == 0, again.stderr
    assert len(running_workers(project)) == 6


def running_workers(project: Path) -> list[str]:
    labels = (f"label={PROJECT}={project.name}", "label=com.docker.compose.service=worker")
    return run("docker", "ps", "-q", "--filter", labels[0], "--filter", labels[1]).stdout.split()


def pause_redis(compose: list[str], project: Path, up: Up, chains: Chains) -> None:
    """The stats lines continue, and so do the chains, on the same connections."""
    assert run(*compose, "pause", "redis", cwd=project).returncode == 0
    seen = len(up.lines())

    def same_twice() -> bool:
        told = [json.loads(line)["numQueueSucceeded"] for line in up.lines()[seen:]]
        return len(told) > len(set(told))

    until(same_twice)
    assert run(*compose, "unpause", "redis", cwd=project).returncode == 0
    chains.are_back()
    until_a_line(up, lambda last: last["numAlive"] == CHAINS and last["numReconnects"] == 2)


@versions
def test_editing_config_rebuilds_only_the_last_layer(compose: list[str], project: Path) -> None:
    assert run(*compose, "build", "client", cwd=project).returncode == 0
    before = layers()
    with (project / "config.py").open("a") as file:
        file.write("# edited\n")
    assert run(*compose, "build", "client", cwd=project).returncode == 0
    after = layers()
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def layers() -> list[str]:
    found: list[str] = json.loads(run("docker", "image", "inspect", "issue-189").stdout)[0]["RootFS"]["Layers"]
    return found
