"""The credential provider of the field's producer and workers, which fails when a test says so.

One file holds the password and, if the provider must fail, the name of the exception. Another file records each failure.
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
    """Returns the password, or fails."""

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
    """Controls the providers."""

    def __init__(self, path: Path, password: str) -> None:
        self.path = path
        self._password = password
        self.heal()

    def fail(self, kind: type[BaseException]) -> None:
        """From now on the providers raise this exception."""
        self._write(kind.__name__)

    def heal(self) -> None:
        """From now on the providers work."""
        self._write("")

    def _write(self, failure: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(f"{self._password}\n{failure}")
        new.replace(self.path)

    def failures(self) -> Counter[int]:
        """How often the providers have failed, by process id."""
        failed = Path(f"{self.path}.failed")
        return Counter(map(int, failed.read_text().split())) if failed.exists() else Counter()


def with_provider(url: str, path: Path) -> dict[str, Any]:
    """redis-py's connection arguments for a URL, with the provider."""
    return {**redis.asyncio.connection.parse_url(url), "credential_provider": Provider(path)}
