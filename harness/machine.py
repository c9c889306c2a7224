"""The machine that measures."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path


def processor() -> str:
    """The processor's model, as Linux reports it; elsewhere the architecture."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()
