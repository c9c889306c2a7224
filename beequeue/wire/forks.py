"""Whether this process is a forked child: what has been opened before a fork is the parent's."""

from __future__ import annotations

import os


class Process:
    """This process. `forks` counts those between it and the first one: asking for its id would cost a system call a save."""

    def __init__(self) -> None:
        self.forks = 0

    def count(self) -> None:
        """In a child."""
        self.forks += 1


process = Process()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process.count)
