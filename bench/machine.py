"""The head of the table: the machine, the interpreters and the server that were measured."""

from __future__ import annotations

import json
import os
import platform
import time

import redis

from bench import interpreter
from harness.machine import processor
from harness.member import ROOT
from harness.original import NODE_MODULES


def describe(url: str, node: str | None, arguments: list[str]) -> dict[str, str]:
    """Values by label. `url` is a running server, `node` the path of Node or None."""
    with redis.Redis.from_url(url) as client:
        info = client.info()
    kind = info.get("server_name", "redis")
    described = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python -m bench", *arguments]),
        "commit": interpreter.output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": interpreter.described(),
        "server": f"{kind} {info.get('valkey_version', info['redis_version'])}, {info['mem_allocator']}",
        "sockets": "unix, for all" if url.startswith("unix:") else "TCP over the loopback, for all",
        "redis-py": redis.__version__,
    }
    if node is not None:
        described["Node"] = interpreter.output(node, "--version") or "unknown"
        described["bee-queue"] = json.loads((NODE_MODULES / "bee-queue" / "package.json").read_text())["version"]
    return described
