"""The calls that wait for an answer of Redis: `close()` waits for them before it cuts their connections."""

from __future__ import annotations

import asyncio


class Calls:
    """Counts the calls that are under way: `with calls:` around what waits for an answer."""

    __slots__ = ("_over", "count")

    def __init__(self) -> None:
        self.count = 0
        self._over: asyncio.Future[None] | None = None

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if self._over is not None and not self.count and not self._over.done():
            self._over.set_result(None)

    def over(self) -> asyncio.Future[None]:
        """Completes when no call is under way; for one caller."""
        self._over = asyncio.get_running_loop().create_future()
        if not self.count:
            self._over.set_result(None)
        return self._over
