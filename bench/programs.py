"""Runs the contestants' programs: their environments, orders, results and processor time.

Every program is a process that ends with this one. Only programs of the same measurement run at the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.children import end_with_parent
from harness.member import ROOT
from harness.original import NODE_MODULES

BENCH = ROOT / "bench"
TIME_LIMIT_S = 300
"""For one program."""
END_S = 10
"""How long a program may take to end after SIGTERM."""
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A program gave no result; the message is one line."""


class Program:
    """A running process. Its stdout can be read line by line; its stderr is kept for the message if it fails."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = " ".join(Path(part).name for part in command if not part.startswith("{"))
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the program
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        self.pid = self._process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the process if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def line(self) -> dict[str, Any]:
        """The next line of its stdout, parsed; raises `Failed` if there is none."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            self._process.wait(END_S)
            raise Failed(f"{self.name} ended with {self._process.returncode} instead of a result: {self._last_error()}")
        told: dict[str, Any] = json.loads(text)
        return told

    def result(self) -> dict[str, Any]:
        """The last line of its stdout, parsed; raises `Failed`."""
        try:
            printed, _ = self._process.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} took more than {TIME_LIMIT_S} s") from None
        if self._process.returncode or not printed:
            raise Failed(f"{self.name} ended with {self._process.returncode}: {self._last_error()}")
        told: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return told

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]  # Node prints more after it
        return (errors or lines or ["it printed nothing"])[-1]


def python_program(name: str, order: Mapping[str, Any]) -> Program:
    """Starts a program of bench/contestants/."""
    return Program([sys.executable, "-m", f"bench.contestants.{name}", json.dumps(order)])


def node_program(node: str, name: str, order: Mapping[str, Any]) -> Program:
    """Starts a program of bench/node/."""
    return Program([node, str(BENCH / "node" / f"{name}.js"), json.dumps(order)], {"NODE_PATH": str(NODE_MODULES)})


def cpu_s(pid: int) -> float:
    """The user and system time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
