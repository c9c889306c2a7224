"""Installs the packages of other languages and environments, with their own package managers."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

INSTALL_S = 300
NPM_S = 50
"""Less than a test may take."""


class NotInstalled(Exception):
    """A program cannot run here; the message is one line that says why."""


def run(command: list[str], limit_s: int = INSTALL_S) -> None:
    """Runs a package manager; raises `NotInstalled` with the last line that it printed on stderr."""
    print("installing:", " ".join(Path(part).name for part in command), file=sys.stderr, flush=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s)  # noqa: S603 - our own commands
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()] or [f"exit code {error.returncode}"]
        raise NotInstalled(f"the installation failed: {said[-1]}") from None
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"the installation took more than {limit_s} s") from None


def npm_ci(directory: Path) -> str:
    """Installs a directory's package-lock.json unless that is done; returns the path of node. Raises `NotInstalled`.

    Several processes may call this at once: one installs, and the others wait.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NotInstalled("there is no node and npm on PATH")
    lock, installed = directory / "package-lock.json", directory / "node_modules" / ".package-lock.json"
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            run([npm, "ci", "--prefix", str(directory), "--no-audit", "--no-fund"], NPM_S)
    return node
