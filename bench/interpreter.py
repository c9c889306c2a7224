"""Describes the Python that measures: its version, who built it, and how.

A Python built without profile-guided and link-time optimisation (PGO, LTO) is about a quarter slower than those that
distributions, Docker's images and uv ship.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

OPTIMISATIONS = {"--enable-optimizations": "PGO", "--with-lto": "LTO", "--enable-bolt": "BOLT"}
SLOW = "built without PGO and LTO, about a quarter slower than what users run; name another: BENCH_PYTHON=/usr/bin/python3"


def build(options: str, package: str | None) -> str:
    """Who built a Python, and how. `options` are those of its configure script; `package` is its package, if any.

    A distribution adds PGO and LTO by its own recipe, so its options do not show them.
    """
    if package:
        return f"package {package}"
    found = [name for option, name in OPTIMISATIONS.items() if option in options]
    return f"compiled with {', '.join(found)}" if found else SLOW


def described() -> str:
    """The description of the running Python."""
    options = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    built = build(options, package_of(Path(sys.executable).resolve()))
    return f"{platform.python_implementation()} {platform.python_version()}, {built}"


def package_of(executable: Path) -> str | None:
    """Name and version of the Debian or Ubuntu package that installed a program; None if none did."""
    owner = output("dpkg-query", "--search", str(executable)).partition(":")[0]
    version = owner and output("dpkg-query", "--show", "--showformat=${Version}", owner)
    return f"{owner} {version}" if version else None


def output(*command: str) -> str:
    """The output of a command, stripped; empty if the command fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - ours
    except (OSError, subprocess.CalledProcessError):
        return ""
