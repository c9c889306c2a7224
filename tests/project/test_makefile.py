"""The Makefile: its help, and the messages for a wrong call. What the targets run is tested elsewhere."""

from __future__ import annotations

import re
import subprocess
import tomllib

from tests import ROOT


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_has_a_line_for_each_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"logs"}
    assert set(re.findall(r"^make (\w+) +\w", make().stdout, re.MULTILINE)) == targets
    assert {"up", "local", "test", "lint", "bench"} <= targets


def test_help_fits_a_terminal() -> None:
    assert [line for line in make().stdout.splitlines() if len(line) > 80] == []


def test_a_chart_without_logs_says_what_it_needs() -> None:
    ended = make("chart")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[0] == 'Name the logs: make chart LOGS="a.log NAME=b.log"'


def test_each_target_with_a_stamp_names_extras_that_exist() -> None:
    """pip installs nothing for a misspelt extra, and only warns"""
    text = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    named = dict(re.findall(r"^extras-(\w+) := \[(.+)\]$", text, re.MULTILINE))
    assert set(re.findall(r"\$\(VENV\)/\.([a-z]+)", text)) == {*named, "bench"}
    assert {extra for value in named.values() for extra in value.split(",")} <= extras
