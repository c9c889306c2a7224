"""What a producer and a worker ask of the queue that they belong to."""

from __future__ import annotations

from typing import Any, Protocol

from beequeue.job import Owner
from beequeue.settings import QueueSettings
from beequeue.store.store import Store
from beequeue.tasks import Calls


class Host(Owner, Protocol):
    """The queue, as its parts see it; the owner of the jobs that they decode."""

    name: str
    settings: QueueSettings
    _calls: Calls

    async def _usable(self) -> Store:
        """The store, when the queue is ready; raises when the queue is closed or belongs to another loop."""

    def _job_is_due(self, when: float) -> None:
        """Tells the clock of delayed jobs that one is due at `when`, epoch ms."""

    def _report(self, error: Exception) -> None:
        """Emits `error`."""

    def _listens_to(self, event: str) -> bool:
        """Whether `event` has a listener."""

    def emit(self, event: str, *args: Any) -> bool:
        """Calls the listeners of `event`; returns whether there were any."""
