"""The commands that `fsck` sends to Redis: pages of each key, and a script for each kind of finding except `unreadable`.

`store/store.py` describes the keys. A key is read page by page, so that a long queue does not block Redis; the pages come from
different moments. Each script looks again at the ids that it is given, all at one moment, and on request repairs the damaged
ones in the same atomic step. It walks each of the two lists once for all its ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from beequeue.errors import BeeQueueError, CommandError
from beequeue.job import id_as_bytes, id_as_text, now_ms
from beequeue.store.scripts import scripts_beside
from beequeue.store.store import KEYS
from beequeue.wire.connection import Connection

SCRIPTS = scripts_beside(__file__)
"""By kind of finding, with an underscore in place of the hyphen."""

PAGE = 1_000
"""How many ids or entries one read asks for; a scan may return a few more."""
TYPES = {
    "jobs": "hash",
    "succeeded": "set",
    "failed": "set",
    "delayed": "sorted set",
    "stalling": "set",
    "active": "list",
    "waiting": "list",
}
_SCANS = {"set": b"SSCAN", "sorted set": b"ZSCAN", "hash": b"HSCAN"}


class Damage(NamedTuple):
    """The damage to one id, and its repair."""

    where: tuple[str, ...]
    """The keys that hold the id, a list once for each copy; empty for an orphan."""
    remedy: tuple[str, ...]
    """The keys that the repair removes it from, or the one that holds it after the repair."""


class FsckStore:
    """All of one queue's data in Redis. No command is repeated when the connection is lost: a scan does not survive that.

    Every method raises `RedisFailure`, `QueueClosed`. Methods that read one key also raise `BeeQueueError` when that key has
    the wrong type. Methods named after a kind of finding return the damaged ids among `job_ids`; with `repair` they also
    repair them.
    """

    def __init__(self, key_prefix: str, commands: Connection) -> None:
        self._commands = commands
        self._prefix = key_prefix
        self._heads = {name: script.head(self._key) for name, script in SCRIPTS.items()}

    def _key(self, suffix: str) -> str:
        return self._prefix + suffix

    async def load_scripts(self) -> None:
        """Loads the scripts into Redis (`SCRIPT LOAD`)."""
        await asyncio.gather(*(self._commands.call(b"SCRIPT", b"LOAD", script.text) for script in SCRIPTS.values()))

    async def exists(self) -> bool:
        """Whether the queue has any key (`EXISTS`)."""
        there: int = await self._commands.call(b"EXISTS", *map(self._key, KEYS))
        return there > 0

    async def is_guarded(self) -> bool:
        """Whether the last stall check was less than its interval ago (`EXISTS stallBlock`)."""
        there: int = await self._commands.call(b"EXISTS", self._key("stallBlock"))
        return there == 1

    async def entries(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yields every id in `jobs` with its entry (`HSCAN`). An id may come twice."""
        async for page in self._scan("jobs"):
            for index in range(0, len(page), 2):
                yield id_as_text(page[index]), page[index + 1]

    async def ids_in(self, kind: str) -> AsyncIterator[str]:
        """Yields every id in a list (`LRANGE`), a set (`SSCAN`) or `delayed` (`ZSCAN`). An id may come twice."""
        step = 2 if kind == "delayed" else 1
        async for page in self._pages(kind) if TYPES[kind] == "list" else self._scan(kind):
            for index in range(0, len(page), step):
                yield id_as_text(page[index])

    async def _scan(self, kind: str) -> AsyncIterator[list[bytes]]:
        cursor = None
        while cursor != b"0":
            cursor, page = await self._read(kind, _SCANS[TYPES[kind]], cursor or b"0", b"COUNT", PAGE)
            yield page

    async def _pages(self, kind: str) -> AsyncIterator[list[bytes]]:
        # From the left, where ids are pushed: a push in between shifts ids into later pages, never past the reader.
        start = 0
        while page := await self._read(kind, b"LRANGE", start, start + PAGE - 1):
            yield page
            start += PAGE

    async def _read(self, kind: str, command: bytes, *args: Any) -> Any:
        try:
            return await self._commands.call(command, self._key(kind), *args)
        except CommandError as error:
            if error.code != "WRONGTYPE":
                raise
            raise BeeQueueError(f"the key {self._key(kind)!r} is not a {TYPES[kind]}, as it must be") from None

    async def entries_of(self, job_ids: Sequence[str]) -> dict[str, bytes]:
        """The entries of those ids that have one (`HMGET jobs`)."""
        entries = await self._commands.call(b"HMGET", self._key("jobs"), *map(id_as_bytes, job_ids))
        return {job_id: entry for job_id, entry in zip(job_ids, entries, strict=True) if entry is not None}

    async def failed_of(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the ids that are in `failed` (`SISMEMBER`)."""
        failed = self._key("failed")
        replies = await asyncio.gather(*(self._commands.call(b"SISMEMBER", failed, id_as_bytes(job_id)) for job_id in job_ids))
        return {job_id for job_id, is_there in zip(job_ids, replies, strict=True) if is_there}

    async def ghost(self, job_ids: Sequence[str], *, repair: bool) -> dict[str, Damage]:
        """Ids without an entry; the repair removes them from every list and set."""
        return await self._run("ghost", repair, job_ids)

    async def orphan(self, job_ids: Sequence[str], *, repair: bool) -> dict[str, Damage]:
        """Ids with an entry and in no state; the repair moves them to `waiting`, `delayed`, `succeeded` or `failed`."""
        return await self._run("orphan", repair, job_ids, now_ms())

    async def two_states(self, job_ids: Sequence[str], *, repair: bool) -> dict[str, Damage]:
        """Ids in two states, or twice in one list; the repair leaves one copy."""
        return await self._run("two_states", repair, job_ids)

    async def too_old(self, job_ids: Sequence[str], created_until: int | None, *, repair: bool) -> dict[str, Damage]:
        """Ids in `active` that no worker reports, or of jobs created by `created_until` (epoch ms); the repair moves them to
        `waiting`.
        """
        return await self._run("too_old", repair, job_ids, "" if created_until is None else created_until)

    async def _run(self, script: str, repair: bool, job_ids: Sequence[str], *args: Any) -> dict[str, Damage]:
        mode = b"repair" if repair else b"look"
        command = (*self._heads[script], mode, *args, *map(id_as_bytes, job_ids))
        reply = [tuple(words.decode().split()) for words in await self._commands.call(*command, script=SCRIPTS[script].text)]
        damages = [Damage(*reply[index : index + 2]) for index in range(0, len(reply), 2)]
        return {job_id: damage for job_id, damage in zip(job_ids, damages, strict=True) if any(damage)}
