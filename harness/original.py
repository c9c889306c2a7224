"""The real bee-queue on Node, in the version that tests/node/package-lock.json pins: a peer and a yardstick."""

from __future__ import annotations

import functools
import shutil
import subprocess

from harness.member import ROOT

DIRECTORY = ROOT / "tests" / "node"
INSTALL_S = 50


class NoOriginal(Exception):
    """bee-queue cannot run here; the message says why."""


@functools.cache
def install() -> str:
    """Installs bee-queue when it is missing or older than the lock file; returns the path of node. Raises `NoOriginal`."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NoOriginal("bee-queue needs node and npm")
    installed, lock = DIRECTORY / "node_modules" / ".package-lock.json", DIRECTORY / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = [npm, "ci", "--prefix", str(DIRECTORY), "--no-audit", "--no-fund"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)  # noqa: S603 - a fixed command
        except subprocess.CalledProcessError as error:
            raise NoOriginal(f"npm ci failed: {error.stderr.strip()}") from None
        except subprocess.TimeoutExpired:
            raise NoOriginal(f"npm ci took more than {INSTALL_S} s") from None
    return node
