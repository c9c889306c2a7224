"""What the numbers were measured on: the head of the table."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import redis

from bench import interpreter
from harness.member import ROOT
from harness.original import NODE_MODULES


def cpu_model() -> str:
    """As Linux tells it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def describe(url: str, node: str | None, arguments: list[str]) -> dict[str, str]:
    """Label to value; `url` is a running server, `node` the path of Node or None."""
    with redis.Redis.from_url(url) as client:
        info = client.info()
    kind = info.get("server_name", "redis")
    described = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python -m bench", *arguments]),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": interpreter.described(),
        "server": f"{kind} {info.get('valkey_version', info['redis_version'])}, {info['mem_allocator']}",
        "sockets": "unix, for all" if url.startswith("unix:") else "TCP over the loopback, for all",
        "redis-py": redis.__version__,
    }
    if node is not None:
        described["Node"] = _output(node, "--version")
        described["bee-queue"] = json.loads((NODE_MODULES / "bee-queue" / "package.json").read_text())["version"]
    return described


def _output(*command: str) -> str:
    """The first line that a command prints; `unknown` when it cannot run."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return "unknown"
    return ran.stdout.strip()
