"""`python -m harness COMMAND`."""

from __future__ import annotations

import argparse
import asyncio
import sys

import config
from harness import chart, local
from harness.children import stop_with_parent
from harness.install import NotInstalled
from harness.server import NoServer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("local", help="run the client and WORKERS workers as processes on a real Redis")
    run.add_argument("--with-parent", action="store_true", help="end when the parent process ends")
    picture = commands.add_parser("chart", help="draw saved logs: the counters, the loss, jobs/s, the client's memory")
    picture.add_argument("logs", nargs="+", metavar="LOG", help="a file, or NAME=file; several share one picture")
    picture.add_argument("--output", default="chart.png", metavar="FILE", help="a .png or .svg (default: chart.png)")
    picture.add_argument("--interval", default="3", metavar="SECONDS", help="the run's STATS_INTERVAL (default: 3)")
    contest = commands.add_parser("compare", help="run both orderings in turn; report the race and the cure")
    contest.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of each (default: 5)")
    contest.add_argument("--seconds", type=int, default=8, metavar="N", help="length of a run (default: 8)")
    contest.add_argument("--node", action="store_true", help="also run the original, on Node")
    contest.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.command == "chart":
        return draw(arguments)
    if arguments.command == "compare":
        return judge(arguments)
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


def judge(arguments: argparse.Namespace) -> int:
    try:
        from harness import compare
    except ModuleNotFoundError as error:
        config.fail(f"{error.name} is not installed: make compare, or pip install -e '.[compare]'", code=2)
    for name, least in (("rounds", 1), ("seconds", 2)):
        if (value := getattr(arguments, name)) < least:
            config.fail(f"--{name} must be at least {least}, not {value}", code=2)
    plan = compare.Plan(arguments.rounds, arguments.seconds, arguments.node, arguments.json)
    try:
        return asyncio.run(compare.run(plan, config.load(), config.variables()))
    except (compare.NotCompared, NoServer, NotInstalled) as error:
        config.fail(str(error), code=2)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
