"""`python -m harness COMMAND`."""

from __future__ import annotations

import argparse
import asyncio
import sys

import config
from harness import chart, local
from harness.children import stop_with_parent
from harness.server import NoServer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("local", help="run the client and WORKERS workers as processes on a real Redis")
    run.add_argument("--with-parent", action="store_true", help="end when the parent process ends")
    picture = commands.add_parser("chart", help="draw saved stdout logs: the counters, the loss, jobs/s, the client's memory")
    picture.add_argument("logs", nargs="+", metavar="LOG", help="a file, or NAME=file; several are drawn over each other")
    picture.add_argument("--output", default="chart.png", metavar="FILE", help="a name in .png or .svg (default: chart.png)")
    picture.add_argument("--interval", default="3", metavar="SECONDS", help="the run's STATS_INTERVAL (default: 3)")
    arguments = parser.parse_args()
    if arguments.command == "chart":
        return draw(arguments)
    if arguments.with_parent:
        stop_with_parent()
    settings = config.load()
    try:
        return asyncio.run(local.run(settings.workers, config.variables()))
    except NoServer as error:
        config.fail(str(error))


def draw(arguments: argparse.Namespace) -> int:
    try:
        chart.run(arguments.logs, arguments.output, arguments.interval)
    except chart.NoChart as error:
        config.fail(str(error), code=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
