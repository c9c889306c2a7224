"""Whether this process is a forked child: connections opened before a fork belong to the parent."""

from __future__ import annotations

import os


class Process:
    """This process; `forks` counts the forks between it and the first one. `os.getpid` would cost each save a system call."""

    def __init__(self) -> None:
        self.forks = 0

    def count(self) -> None:
        """Called in each forked child."""
        self.forks += 1


process = Process()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.count)
