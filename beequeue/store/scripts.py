"""The Lua scripts: files in `lua/`, which Redis knows by their SHA-1. A file's header names the keys that a call passes."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from beequeue.wire.link import Link


class Script(NamedTuple):
    """A Lua script."""

    text: str
    sha: str
    """The SHA-1 by which Redis knows it."""
    keys: tuple[str, ...]
    """The keys that its header names, below the queue's prefix, in order."""

    def head(self, key: Callable[[str], str]) -> tuple[bytes, ...]:
        """Returns a call of the script (EVALSHA) up to its arguments, encoded; `key` returns a key's full name."""
        return (b"EVALSHA", self.sha.encode(), str(len(self.keys)).encode(), *(key(name).encode() for name in self.keys))


def _read(path: Path) -> Script:
    text = path.read_text(encoding="utf-8")
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(text, sha, tuple(re.findall(r"^-- KEYS\[\d+\] (\w+)", text, re.MULTILINE)))


def scripts_beside(file: str) -> dict[str, Script]:
    """Reads the scripts in the folder `lua` beside a source file; returns them by name."""
    return {path.stem: _read(path) for path in sorted((Path(file).parent / "lua").glob("*.lua"))}


SCRIPTS = scripts_beside(__file__)
"""The scripts of producers, workers and the two clocks."""


async def load_scripts(link: Link) -> None:
    """Loads every script into the server (`SCRIPT LOAD`), in one round trip."""
    await asyncio.gather(*(link.call(b"SCRIPT", b"LOAD", script.text) for script in SCRIPTS.values()))
