"""The Lua scripts: read from `lua/`, known to Redis by their SHA-1. Each file's header names its keys; calls pass those."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from beequeue.wire.link import Link


class Script(NamedTuple):
    """A Lua script; `sha` is how Redis knows it. `keys` are those of its header, below the queue's prefix, in order."""

    text: str
    sha: str
    keys: tuple[str, ...]

    def head(self, key: Callable[[str], str]) -> tuple[bytes, ...]:
        """A call of it (EVALSHA) up to its arguments, encoded once; `key` gives a key's full name."""
        return (b"EVALSHA", self.sha.encode(), str(len(self.keys)).encode(), *(key(name).encode() for name in self.keys))


def _read(path: Path) -> Script:
    text = path.read_text(encoding="utf-8")
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(text, sha, tuple(re.findall(r"^-- KEYS\[\d+\] (\w+)", text, re.MULTILINE)))


def scripts_beside(file: str) -> dict[str, Script]:
    """The scripts in the folder `lua` beside a source file, by name."""
    return {path.stem: _read(path) for path in sorted((Path(file).parent / "lua").glob("*.lua"))}


SCRIPTS = scripts_beside(__file__)
"""What producers, workers and the two clocks run."""


async def load_scripts(link: Link) -> None:
    """Makes the server know every script (`SCRIPT LOAD`), in one round trip."""
    await asyncio.gather(*(link.call(b"SCRIPT", b"LOAD", script.text) for script in SCRIPTS.values()))
