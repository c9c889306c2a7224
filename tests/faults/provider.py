"""Where producer and workers of the field get their password from, and how it fails when a test says so.

A file holds the password, and the name of the exception to raise, if any. Each time that it is raised goes to a second file.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from redis.credentials import CredentialProvider

FAILURES: tuple[type[BaseException], ...] = (RuntimeError, TypeError, TimeoutError, asyncio.CancelledError)


class Provider(CredentialProvider):
    """Tells the password, or fails."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_credentials(self) -> tuple[str]:
        password, _, failure = self._path.read_text().partition("\n")
        if failure:
            with open(f"{self._path}.failed", "a") as failed:
                failed.write(f"{os.getpid()}\n")
            raise {kind.__name__: kind for kind in FAILURES}[failure]("the token service is down")
        return (password,)

    async def get_credentials_async(self) -> tuple[str]:
        return self.get_credentials()


class Moods:
    """What the providers do."""

    def __init__(self, path: Path, password: str) -> None:
        self.path = path
        self._password = password
        self.heal()

    def fail(self, kind: type[BaseException]) -> None:
        """From now on they raise this."""
        self._write(kind.__name__)

    def heal(self) -> None:
        """From now on they work."""
        self._write("")

    def _write(self, failure: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(f"{self._password}\n{failure}")
        new.replace(self.path)

    def failures(self) -> Counter[int]:
        """How often they have failed, by process."""
        failed = Path(f"{self.path}.failed")
        return Counter(map(int, failed.read_text().split())) if failed.exists() else Counter()


def with_provider(url: str, path: Path) -> dict[str, Any]:
    """redis-py's connection arguments."""
    return {**redis.asyncio.connection.parse_url(url), "credential_provider": Provider(path)}
