"""`python -m beequeue`: runs one of the commands in `beequeue.command`."""

from __future__ import annotations

import sys

from beequeue.command import arguments, check, worker
from beequeue.signals import end_at_once


def main(given: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; `given` are the arguments, by default those of the process."""
    end_at_once()  # also while the handler's module is imported
    options = arguments.parse(given)
    code: int = {"worker": worker.run, "check": check.run}[options.command](options)
    return code


if __name__ == "__main__":
    sys.exit(main())
