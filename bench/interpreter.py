"""Which Python measures: its version, who built it, and how. One without profile-guided and link-time optimisation (PGO, LTO)
is a quarter slower than those that distributions, Docker's images and uv ship.
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
    """Who built a Python, and how: `options` are those of its configure script, `package` is the distribution's, if it has one.

    A distribution's own recipe adds PGO and LTO, and its options do not show them.
    """
    if package:
        return f"package {package}"
    found = [name for option, name in OPTIMISATIONS.items() if option in options]
    return f"compiled with {', '.join(found)}" if found else SLOW


def described() -> str:
    """The Python that runs this."""
    options = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    built = build(options, package_of(Path(sys.executable).resolve()))
    return f"{platform.python_implementation()} {platform.python_version()}, {built}"


def package_of(executable: Path) -> str | None:
    """Name and version of the Debian or Ubuntu package that has installed a program; None: no package has."""
    owner = _output("dpkg-query", "--search", str(executable)).partition(":")[0]
    version = owner and _output("dpkg-query", "--show", "--showformat=${Version}", owner)
    return f"{owner} {version}" if version else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - ours
    except (OSError, subprocess.CalledProcessError):
        return ""
