"""`python -m harness COMMAND`."""

from __future__ import annotations

import argparse
import asyncio
import sys

import config
from harness import local
from harness.children import stop_with_parent
from harness.server import NoServer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("local", help="run the client and WORKERS workers as processes on a real Redis")
    run.add_argument("--with-parent", action="store_true", help="end when the parent process ends")
    arguments = parser.parse_args()
    if arguments.with_parent:
        stop_with_parent()
    settings = config.load()
    try:
        return asyncio.run(local.run(settings.workers, config.variables()))
    except NoServer as error:
        config.fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
