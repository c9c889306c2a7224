"""A contestant's order and the line that it prints. Imports little, because imports count as the contestant's memory."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from harness.memory import resident_kb


def order() -> dict[str, Any]:
    """The program's argument, parsed."""
    ordered: dict[str, Any] = json.loads(sys.argv[1])
    return ordered


def report(jobs: int, seconds: float, **more: float) -> None:
    """Prints the result, with this process's memory and processor time."""
    told = {"jobs": jobs, "seconds": seconds, "rss_kb": resident_kb(), "cpu_s": time.process_time()}
    print(json.dumps({**told, **more}))
