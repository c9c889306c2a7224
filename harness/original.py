"""The real bee-queue on Node, in the version that tests/node/package-lock.json pins: a peer for tests and a yardstick."""

from __future__ import annotations

import functools

from harness.install import npm_ci
from harness.member import ROOT

DIRECTORY = ROOT / "tests" / "node"
NODE_MODULES = DIRECTORY / "node_modules"


@functools.cache
def install() -> str:
    """Installs bee-queue if it is missing or older than the lock file; returns the path of node. Raises `NotInstalled`."""
    return npm_ci(DIRECTORY)
