"""What `fsck` says to Redis: a queue read key by key, and one script for each kind of damage.

The keys, and what they hold, are told in `store.py`. Reading goes page by page, so that a long queue does not hold Redis up;
the pages are not of one moment. Each script looks once more at the ids that it is given, all at one moment, and repairs what it
finds wrong in that same step, if it is asked to. It walks the two lists once for all its ids.
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
"""One for each kind of damage."""

PAGE = 1_000
"""How many ids or entries one read asks for; a scan may return some more."""
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


class Verdict(NamedTuple):
    """What a script says of one id. Both are empty when it is well."""

    where: str
    """The places where it stands, with spaces between; empty also for one that stands nowhere."""
    remedy: str
    """The places that it is taken out of, or the one that it comes to."""


class FsckStore:
    """One queue's data in Redis, as a whole. Nothing is repeated when the connection is lost: a scan does not outlive it.

    Every method raises `RedisFailure`, `QueueClosed`; those that read one key, `BeeQueueError` when that key
    has another type than it should.
    """

    def __init__(self, key_prefix: str, commands: Connection) -> None:
        self._commands = commands
        self._prefix = key_prefix
        self._heads = {name: script.head(self._key) for name, script in SCRIPTS.items()}

    def _key(self, suffix: str) -> str:
        return self._prefix + suffix

    async def load_scripts(self) -> None:
        """Makes Redis know the scripts (`SCRIPT LOAD`)."""
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
        """All of `jobs` (`HSCAN`): ids and their entries. One may come twice."""
        async for page in self._scan("jobs"):
            for index in range(0, len(page), 2):
                yield id_as_text(page[index]), page[index + 1]

    async def ids_in(self, kind: str) -> AsyncIterator[str]:
        """All ids in a list (`LRANGE`), a set (`SSCAN`) or `delayed` (`ZSCAN`). In a list that changes one may come twice."""
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
        # from the left, where ids come in: what is pushed meanwhile shifts ids into later pages, never past the reader
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

    async def entries_of(self, job_ids: Sequence[str]) -> list[bytes | None]:
        """The entries of some ids (`HMGET jobs`)."""
        entries: list[bytes | None] = await self._commands.call(b"HMGET", self._key("jobs"), *map(id_as_bytes, job_ids))
        return entries

    async def failed_of(self, job_ids: Sequence[str]) -> list[bool]:
        """Whether each of some ids is in `failed` (`SISMEMBER`)."""
        failed = self._key("failed")
        replies = await asyncio.gather(*(self._commands.call(b"SISMEMBER", failed, id_as_bytes(job_id)) for job_id in job_ids))
        return [reply == 1 for reply in replies]

    async def ghosts(self, job_ids: Sequence[str], *, repair: bool) -> list[Verdict]:
        """Ids without data; takes them out of every list and set."""
        return await self._run("ghosts", repair, job_ids)

    async def orphans(self, job_ids: Sequence[str], *, repair: bool) -> list[Verdict]:
        """Ids with data that stand nowhere; puts them in `waiting`, `delayed`, `succeeded` or `failed`."""
        return await self._run("orphans", repair, job_ids, now_ms())

    async def doubles(self, job_ids: Sequence[str], *, repair: bool) -> list[Verdict]:
        """Ids that stand in two states or twice in one list; leaves them in one place."""
        return await self._run("doubles", repair, job_ids)

    async def silent(self, job_ids: Sequence[str], created_until: int | None, *, repair: bool) -> list[Verdict]:
        """Ids in `active` that no worker reports, or whose jobs were created until then (epoch ms); moves them to `waiting`."""
        return await self._run("silent", repair, job_ids, "" if created_until is None else created_until)

    async def _run(self, script: str, repair: bool, job_ids: Sequence[str], *args: Any) -> list[Verdict]:
        mode = b"repair" if repair else b"look"
        command = (*self._heads[script], mode, *args, *map(id_as_bytes, job_ids))
        reply = [text.decode() for text in await self._commands.call(*command, script=SCRIPTS[script].text)]
        return [Verdict(*reply[index : index + 2]) for index in range(0, len(reply), 2)]
