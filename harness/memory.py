"""How much memory this process uses. Imports little, because programs that report their own memory import it."""

from __future__ import annotations

import os


def resident_kb() -> int:
    """This process's resident memory in kB (Linux)."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
