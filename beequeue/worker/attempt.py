"""A run: one job in a worker's hands; and the handlers that it may be given to. No I/O."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from beequeue.job import Job
from beequeue.store.store import Settlement
from beequeue.wire.link import Command

Handler = Callable[[Job], Any]
"""An `async def` or a plain function, which runs in a thread; what it returns is the job's result."""


class Attempt:
    """One job in a worker's hands. Keyed by itself, not by id: one worker can hold an id twice."""

    __slots__ = (
        "abandoned",
        "call",
        "entry",
        "error",
        "finish",
        "id",
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
        self.job: Job | None = None
        self.under_way = False
        """Whether its handler is to run or runs, or its settlement waits for its answer."""
        self.abandoned = False
        self.task: asyncio.Task[None] | None = None
        """What runs its handler now."""
        self.call: Future[Any] | None = None
        """Where the handler is a plain function: what its thread does."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.settlement: Settlement | None = None
        self.finish: Command | None = None
        self.slots = 1
        """How many slots its end gives back: none while the thread of its handler goes on and keeps its own."""
        self.reused = False
        """Its id is another job's now, or nobody's: nothing is said to Redis about it any more."""


def in_thread(handler: Handler, job: Job) -> Any:
    """Calls a plain handler, in a thread of its own."""
    try:
        result = handler(job)
    except (StopIteration, GeneratorExit) as error:
        # a future cannot carry the one, and the other would close the coroutine that awaits it; named as Python does it
        raise RuntimeError(f"handler raised {type(error).__name__}") from error
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError("a plain handler returned a coroutine: make the handler an async def")
    return result


def is_async(handler: Handler) -> bool:
    """Also for an object whose class has an `async def __call__`."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))  # noqa: B004


def name_of(handler: Any) -> str:
    """A handler's full name, or that of its class."""
    named = handler if hasattr(handler, "__qualname__") else type(handler)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
