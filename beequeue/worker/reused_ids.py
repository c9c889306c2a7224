"""Ids that have become another job's: what a worker asks when a connection is back, before it says anything else.

A Redis that has come back empty gives its ids anew. A run from before would then settle a job that it has never seen, and
Redis could not tell. So the entries of all ids that are held are compared with those that were taken. It takes a loss of the
connection to lose a Redis, and costs nothing but then.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Protocol, TypeVar

from beequeue.errors import CommandError, UnreadableData
from beequeue.store.store import Store
from beequeue.wire.link import Link
from beequeue.wire.node_json import load_json

log = logging.getLogger("beequeue")


class Held(Protocol):
    """A job in the worker's hands."""

    id: str
    entry: bytes


AnyHeld = TypeVar("AnyHeld", bound=Held)


async def reused_ids(store: Store, link: Link, held: Collection[AnyHeld]) -> list[AnyHeld]:
    """Those of `held` whose job is gone, or another one's; none when Redis refuses to tell. Raises `ConnectionLost`."""
    try:
        entries = await store.entries_on(link, [each.id for each in held])
    except CommandError as refused:
        log.warning("whether the jobs that run are still the same could not be asked: %s", refused)
        return []
    return [each for each, stored in zip(held, entries, strict=True) if not is_same_job(stored, each.entry)]


def is_same_job(stored: bytes | None, taken: bytes) -> bool:
    """Whether an entry of `jobs` is that of the job which was taken: by the time at which it was created.

    The rest may have changed, as with an attempt that another worker has made.
    """
    return stored is not None and (stored == taken or _created_at(stored) == _created_at(taken))


def _created_at(entry: bytes) -> Any:
    try:
        return load_json(entry, "stored job")["options"]["timestamp"]
    except (UnreadableData, LookupError, TypeError):
        return None
