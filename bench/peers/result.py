"""A peer's order, the line that it prints, and its clock, which follows bench/contestants/drain.py."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from typing import Any


def order() -> dict[str, Any]:
    """`url`, `queue`, `jobs`, `concurrency`, and `step`: `enqueue` or `drain`."""
    ordered: dict[str, Any] = json.loads(sys.argv[1])
    return ordered


def report(package: str, jobs: int, seconds: float) -> None:
    """Prints the result."""
    print(json.dumps({"version": importlib.metadata.version(package), "jobs": jobs, "seconds": seconds}))


class Clock:
    """From the first job's handler to the last job's end."""

    def __init__(self, jobs: int) -> None:
        self.seconds = 0.0
        self._left = jobs
        self._started = 0.0

    def job_started(self) -> None:
        """Every handler calls this."""
        if not self._started:
            self._started = time.perf_counter()

    def job_ended(self) -> bool:
        """Whether it was the last one. Threads may call this: CPython does not switch threads within a decrement."""
        self._left -= 1
        if self._left == 0:
            self.stop()
        return self._left == 0

    def stop(self) -> None:
        """Stops the clock; for a queue that only reports that it is empty."""
        self.seconds = time.perf_counter() - self._started
