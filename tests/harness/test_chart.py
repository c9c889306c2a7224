"""`python -m harness chart`: what it reads from a log, what it draws, and its message when it cannot."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from client import COUNTERS, stats
from harness import chart
from harness.__main__ import main
from tests import ROOT

COMPOSE_V1 = "\x1b[33mclient_1  |\x1b[0m "
COMPOSE_V2 = "\x1b[36missue-189_client_1  | \x1b[0m"
PREFIXES = {
    "plain": "",
    "compose v1": "client_1  | ",
    "compose v1 in colour": COMPOSE_V1,
    "compose v2": "issue-189_client_1  | ",
    "compose v2 in colour": COMPOSE_V2,
    "compose --timestamps": "client_1  | 2026-11-24T08:50:45.123456789Z ",
}
OTHER_LINES = """\
Attaching to issue-189_redis_1, issue-189_client_1

\x1b[32mredis_1   |\x1b[0m 1:M 24 Nov 2026 08:50:30.000 * Ready to accept connections tcp
worker_1  | worker: connected
client_1  | {"level":"info"}
client_1  | {"numQueueSucceeded":"1","numQueueFailed":0,"numJobSucceeded":1}
client_1  | {"numJobSaveSuccess":3588,"numJobSaveErr
issue-189_client_1 exited with code 0
"""

WriteLog = Callable[..., Path]
Run = Callable[..., tuple[int | str | None, str, str]]


def line(elapsed_s: float, succeeded: int, own: int, failed: int = 0, **extended: int) -> str:
    counts = dict(zip(COUNTERS, (succeeded + failed, 0, succeeded, failed, own), strict=True))
    return json.dumps({**stats(counts, elapsed_s), **extended}, separators=(",", ":"))


RUN = [
    line(3, 3000, 2970, rssKb=31250),
    line(6, 9000, 8910, rssKb=62500),
    line(9, 9900, 9800, failed=300, rssKb=93750),
]


@pytest.fixture
def write_log(tmp_path: Path) -> WriteLog:
    def write(name: str, lines: list[str], prefix: str = "", between: str = "") -> Path:
        path = tmp_path / name
        path.write_text(between + "".join(f"{prefix}{line}\n{between}" for line in lines))
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `python -m harness chart` in `tmp_path`, within this process: matplotlib is imported once."""

    def run(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["harness", "chart", *map(str, arguments)])
        try:
            code: int | str | None = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def words(svg: Path) -> list[str]:
    return ["".join(text.itertext()).strip() for text in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_a_log_is_read_in_each_of_its_forms(write_log: WriteLog, prefix: str) -> None:
    log = chart.read(str(write_log("a.b.log", RUN, prefix, between=OTHER_LINES)), 3)
    assert log.name == "a.b"
    assert log.times == [3, 6, 9]
    assert log.counter("numQueueSucceeded") == [(0, 0), (3, 3000), (6, 9000), (9, 9900)]
    assert log.counter("numJobSucceeded") == [(0, 0), (3, 2970), (6, 8910), (9, 9800)]
    assert log.counter("lost") == [(0, 0), (3, 30), (6, 90), (9, 100)]


def test_the_log_of_make_local_is_read() -> None:
    # test_harness shows that its lines look like Compose v1's without colours
    parsed = chart.parse_line("client_1  | " + RUN[0])
    assert parsed is not None
    assert {**json.loads(RUN[0]), "lost": 30, "ended": 3000, "elapsed_s": 3.0} == parsed


def test_bytes_that_are_no_text_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"\xff\xfe\r\n" + "\r\n".join(RUN).encode() + b"\r\n")
    assert len(chart.read(str(tmp_path / "a.log"), 3).lines) == 3


def test_the_rate_is_that_of_each_interval(write_log: WriteLog) -> None:
    log = chart.read(str(write_log("a.log", RUN)), 3)
    assert log.rate() == [(3, 1000), (6, 2000), (9, 400)]  # failed jobs count too, as in throughput
    # 6000 jobs in 3 s after 3000 in 3 s; the throughput since the start would be another number
    assert [time for time, _ in chart.read(str(write_log("b.log", RUN[:1])), 0.5).rate()] == [0.5]


def test_the_loss_is_a_share_of_all_jobs_so_far(write_log: WriteLog) -> None:
    log = chart.read(str(write_log("a.log", [line(3, 0, 0), *RUN[1:]])), 3)
    assert log.loss_percent() == [(6, 1.0), (9, pytest.approx(100 / 99))]


def test_memory_is_in_megabytes_where_it_is_known(write_log: WriteLog) -> None:
    assert chart.read(str(write_log("a.log", RUN)), 3).memory_mb() == [(3, 32.0), (6, 64.0), (9, 96.0)]
    assert chart.read(str(write_log("b.log", [line(3, 3000, 3000)])), 3).memory_mb() == []


@pytest.mark.parametrize(
    ("stopped_s", "drawn_s", "rates"),
    [(7.8, 7.8, 3), (6.1, 6.1, 2), (9, 9, 3), (11, 9, 3)],
    ids=["sooner", "at once", "in time", "after a long wind-down"],
)
def test_the_last_line_of_a_run_that_was_stopped(write_log: WriteLog, stopped_s: float, drawn_s: float, rates: int) -> None:
    last = int(1000 * stopped_s)
    log = chart.read(str(write_log("a.log", [line(3, 3000, 3000), line(6, 6000, 6000), line(stopped_s, last, last)])), 3)
    assert log.times == [3, 6, pytest.approx(drawn_s, rel=0.001)]
    assert len(log.rate()) == rates


def test_a_slow_run_goes_by_the_number_of_the_line(write_log: WriteLog, capsys: pytest.CaptureFixture[str]) -> None:
    log = chart.read(str(write_log("a.log", [line(3, 2, 2), line(6, 3, 3), line(8, 4, 4)])), 3)
    assert log.times == [3, 6, 9]
    assert math.isnan(log.lines[-1]["elapsed_s"])
    assert capsys.readouterr().err == ""


def test_an_interval_that_cannot_be_right_is_noted(write_log: WriteLog, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_log("a.log", RUN)
    chart.read(str(path), 1)
    took = "by its throughput, line 2 came after 6 s, not 2 s"
    assert capsys.readouterr().err == f"{path}: {took}; is the interval 1 s right, and the log complete?\n"


def test_a_name_may_stand_before_the_file(write_log: WriteLog) -> None:
    path = write_log("a.log", RUN)
    assert chart.read(f"two sockets={path}", 3).name == "two sockets"
    odd = write_log("x=y.log", RUN)
    assert chart.read(str(odd), 3).name == "x=y"


def test_an_svg_names_the_logs_and_its_axes(write_log: WriteLog, run: Run, tmp_path: Path) -> None:
    lossy, cured = write_log("lossy.log", RUN, COMPOSE_V1), write_log("b.log", [line(3, 3000, 3000), line(6, 6100, 6100)])
    output = tmp_path / "picture.svg"
    assert run(lossy, f"_the $cure$ & more={cured}", "--output", output) == (0, f"{output}\n", "")
    texts = words(output)
    assert "lossy: 100 of 9,900 lost" in texts
    assert "_the $cure$ & more: 0 of 6,100 lost" in texts
    assert "not in the log of _the $cure$ & more: EXTENDED_STATS was off" in texts
    assert "seconds since the start (number of the stats line × 3 s)" in texts
    for title, unit, _ in chart.PANELS.values():
        assert title in texts
        assert unit in texts


def test_a_png_is_written_where_nothing_else_is_asked_for(write_log: WriteLog, run: Run, tmp_path: Path) -> None:
    write_log("a.log", RUN)
    assert run("a.log") == (0, "chart.png\n", "")
    picture = (tmp_path / "chart.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    width = int.from_bytes(picture[16:20])
    assert width == 9 * chart.PIXELS_PER_INCH
    assert len(picture) > 20_000


@pytest.mark.parametrize(
    "lines",
    [
        [line(3, 0, 0)],
        [line(3, 5, 0)],
        [line(3, 3000, 3000)],
        [line(3 * number, 4 * number, 4 * number) for number in range(1, 5000)],
        [line(3, 10, 12), line(6, 20, 22)],  # own events heard that the queue's listener has not counted yet
    ],
    ids=["no job", "all lost", "one line", "hours", "fewer than none"],
)
def test_odd_runs_are_drawn_too(write_log: WriteLog, run: Run, tmp_path: Path, lines: list[str]) -> None:
    write_log("a.log", lines)
    assert run("a.log", "--output", "a.svg") == (0, "a.svg\n", "")
    assert "not in the log of a: EXTENDED_STATS was off" in words(tmp_path / "a.svg")


def test_many_logs_look_different(write_log: WriteLog) -> None:
    log = chart.read(str(write_log("a.log", RUN)), 3)
    looks: list[dict[str, Any]] = [chart._curves(log, number)[1][2] for number in range(28)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.log"], "absent.log: No such file or directory"),
        (["x=absent.log"], "absent.log: No such file or directory"),
        (["."], ".: Is a directory"),
        (["a.log", "empty.log"], "empty.log: contains no stats line"),
        (["other.log"], "other.log: contains no stats line"),
        (["twice.log"], "twice.log: the counters go back at stats line 4; a chart needs one log for each run"),
        (
            ["a.log", "a=twice.log", "a.log"],
            "twice.log: the counters go back at stats line 4; a chart needs one log for each run",
        ),
        (["a.log", "a=a.log"], "more than one log is called 'a'; name them: NAME=file"),
        (["a.log", "--output", "a.jpg"], "--output must end in .png or .svg, not 'a.jpg'"),
        (["a.log", "--output", "png"], "--output must end in .png or .svg, not 'png'"),
        (["a.log", "--output", "absent/a.png"], "absent/a.png: No such file or directory"),
        (["a.log", "--interval", "soon"], "--interval must be a number of seconds greater than 0, not 'soon'"),
        (["a.log", "--interval", "0"], "--interval must be a number of seconds greater than 0, not '0'"),
        (["a.log", "--interval", "nan"], "--interval must be a number of seconds greater than 0, not 'nan'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    write_log: WriteLog, run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write_log("a.log", RUN)
    write_log("empty.log", [])
    write_log("other.log", [], between=OTHER_LINES)
    write_log("twice.log", RUN + RUN)
    assert run(*arguments) == (2, "", message + "\n")
    assert not list(tmp_path.glob("*.png"))


def test_matplotlib_is_needed_for_the_chart_only(write_log: WriteLog, tmp_path: Path) -> None:
    write_log("a.log", RUN)
    without = "import sys; sys.modules['matplotlib'] = None; from harness.__main__ import main; main()"
    command = [sys.executable, "-c", without, "chart", "a.log"]
    environment = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "matplotlib is not installed: make chart, or pip install -e '.[chart]'\n"


def test_the_extras_name_the_same_matplotlib() -> None:
    pins = re.findall(r'"(matplotlib[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(pins) == 2
    assert pins[0] == pins[1]
    assert re.fullmatch(r"matplotlib==[\d.]+", pins[0])
