"""`python -m bench`: compares beequeue with bee-queue on Node and with Python's other queues, on one machine.

Starts its own Redis servers (REDIS_SERVER, else the installed redis-server; REDIS_URL is not used). Prints tables or JSON;
progress goes to stderr. Exits with 0 if everything was measured, with 1 if not, and with 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import redis

from beequeue.command.arguments import Parser, argument
from beequeue.parse import whole_number
from bench import growth, machine, paired, peers, table
from bench.interpreter import SLOW
from bench.measures import MEASURES, QUICK, Sizes
from bench.programs import Failed
from harness import original
from harness.install import NotInstalled
from harness.server import NoServer, find_server


def measures(text: str) -> list[str]:
    """The named measures, in the order of `MEASURES`."""
    named = text.split(",")
    for name in named:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(MEASURES)}, not {name!r}")
    return [name for name in MEASURES if name in named]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rounds", type=argument(whole_number), metavar="N", help="runs of each side (default: 5)")
    parser.add_argument("--only", type=measures, metavar="MEASURE,…", help=f"some of: {', '.join(MEASURES)}")
    parser.add_argument("--unix", action="store_true", help="connect by a unix socket instead of TCP over the loopback")
    parser.add_argument("--no-peers", action="store_true", help="leave out the other queues")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, for a trial; the numbers mean little")
    return parser.parse_args(arguments)


def check_server(setup: paired.Setup, arguments: list[str]) -> dict[str, str]:
    """Describes the set-up; raises `NoServer` for a server whose speed means nothing."""
    with paired.own_server(setup) as url:
        with redis.Redis.from_url(url) as client:
            allocator = client.info("memory")["mem_allocator"]
        if not allocator.startswith("jemalloc"):
            raise NoServer(f"bench needs a redis-server built with jemalloc, as Debian's is; {setup.server} uses {allocator}")
        described = machine.describe(url, setup.node, arguments)
    if described["Python"].endswith(SLOW):
        print(f"warning: {described['Python']}", file=sys.stderr)
    return described


def run(options: argparse.Namespace, arguments: list[str]) -> table.Results:
    """Runs the chosen measures; raises `NoServer`."""
    left_out = {}
    node = None
    try:
        node = original.install()
    except NotInstalled as reason:
        left_out["bee-queue on Node"] = str(reason)
    sizes = QUICK if options.quick else Sizes()
    setup = paired.Setup(
        find_server(os.environ), sizes, options.rounds or (1 if options.quick else 5), node, tcp=not options.unix
    )
    results = table.Results(check_server(setup, arguments), setup.rounds, left_out=left_out)
    for name in options.only or MEASURES:
        try:
            if name == "growth":
                results.growth = growth.run(setup)
            elif name != "peers":
                results.samples |= paired.measure(setup, name)
            elif not options.no_peers:
                results.peers, missing = peers.run(setup)
                left_out |= missing
        except (Failed, NotInstalled) as reason:
            results.failed[name] = str(reason)  # the other measures still run
    return results


def main() -> int:
    arguments = sys.argv[1:]
    options = parse(arguments)
    try:
        results = run(options, arguments)
    except NoServer as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(table.as_json(results), indent=2) if options.json else table.render(results))
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
