"""The order that a contestant gets, and the line that it prints. Light: what is imported here counts as its memory."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from harness.memory import resident_kb


def order() -> dict[str, Any]:
    """What to do: the program's argument."""
    ordered: dict[str, Any] = json.loads(sys.argv[1])
    return ordered


def report(jobs: int, seconds: float, **more: float) -> None:
    """Prints the result, with the memory and the CPU time of this process so far."""
    told = {"jobs": jobs, "seconds": seconds, "rss_kb": resident_kb(), "cpu_s": time.process_time()}
    print(json.dumps({**told, **more}))
