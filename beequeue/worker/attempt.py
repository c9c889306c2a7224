"""An attempt: one run of a handler for a job. And the handlers that a worker may be given. No I/O."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from beequeue.errors import UnreadableData
from beequeue.job import Job, is_same_job, stamp_of
from beequeue.store.store import Settlement
from beequeue.wire.link import Command
from beequeue.wire.node_json import load_json

Handler = Callable[[Job], Any]
"""An `async def`, or a plain function, which runs in a thread; its return value is the job's result."""


class Attempt:
    """One run of a handler for a job. Keyed by itself, not by id: one worker can hold an id twice."""

    __slots__ = (
        "abandoned",
        "call",
        "entry",
        "error",
        "finish",
        "id",
        "is_shortened",
        "job",
        "result",
        "reused",
        "settlement",
        "slots",
        "task",
        "under_way",
    )

    def __init__(self, job_id: str, entry: bytes) -> None:
        self.id = job_id
        self.entry = entry
        """The job's entry in `jobs` when it was taken."""
        self.job: Job | None = None
        """None while it is not decoded, and when it cannot be."""
        self.under_way = False
        """Whether its handler is about to run or runs, or its settlement waits for an answer."""
        self.abandoned = False
        """Whether a close has cancelled its handler."""
        self.task: asyncio.Task[None] | None = None
        """The task that runs the handler now."""
        self.call: Future[Any] | None = None
        """The call in a thread, when the handler is a plain function."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.settlement: Settlement | None = None
        self.finish: Command | None = None
        """The command that settles it, while that is unanswered."""
        self.is_shortened = False
        """Whether its settlement stands for one that was too large for Redis."""
        self.slots = 1
        """How many slots its end gives back: none while the thread of its handler runs on and keeps the slot."""
        self.reused = False
        """Whether Redis has given its id to another job, or lost the job: nothing is sent about it any more."""

    def is_stored_as(self, entry: bytes | None) -> bool:
        """Whether the entry that `jobs` holds now under its id belongs to its job.

        Another worker may have changed the rest of the entry, but not the time of creation.
        """
        if entry is None or entry == self.entry:
            return entry is not None
        try:
            return is_same_job(_stamp_in(entry), _stamp_in(self.entry))
        except (UnreadableData, LookupError, TypeError):
            return False


def _stamp_in(entry: bytes) -> str:
    return stamp_of(load_json(entry, "stored job")["options"].get("timestamp"))


def in_thread(handler: Handler, job: Job) -> Any:
    """Calls a plain handler, in a thread."""
    try:
        result = handler(job)
    except (StopIteration, GeneratorExit) as error:
        # a future cannot carry the first, and the second would close the coroutine that awaits it; Python names it so too
        raise RuntimeError(f"handler raised {type(error).__name__}") from error
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("a plain handler returned a coroutine: make the handler an async def")
    return result


def is_async(handler: Handler) -> bool:
    """Whether a handler is an `async def`, or an object whose class has an `async def __call__`."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))  # noqa: B004


def name_of(handler: Any) -> str:
    """The full name of a handler, or of its class."""
    named = handler if hasattr(handler, "__qualname__") else type(handler)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
