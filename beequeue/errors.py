"""What a caller of beequeue can catch.

One root, `BeeQueueError`; the first docstring line of each class says when it is raised.
Wrong arguments are not here: they raise `ValueError` or `TypeError` that name the argument.
"""

from __future__ import annotations

from typing import Any

from beequeue.escape import escape


class BeeQueueError(Exception):
    """The root of every error that beequeue raises by itself. Each can be copied and pickled.

    Its text is one line that is safe to show, whatever ids and replies are in it; `args` has them as they are.
    """

    def __str__(self) -> str:
        return escape(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.args), self.__dict__


def _remake(kind: type[BeeQueueError], args: tuple[Any, ...]) -> BeeQueueError:
    return kind.__new__(kind, *args)


class QueueClosed(BeeQueueError):
    """The queue has been closed; the message is `closed`, as in bee-queue."""

    def __init__(self) -> None:
        super().__init__("closed")


class NotConnected(BeeQueueError):
    """A queue made with `auto_connect=False` was used before `connect()`."""


class WrongLoop(BeeQueueError):
    """A queue was used from another event loop, thread or process than the one that opened it."""


class OperationTimedOut(BeeQueueError):
    """`close()` ran past its time-out; the message is `Operation timed out.`, as in bee-queue."""

    def __init__(self) -> None:
        super().__init__("Operation timed out.")


class ConnectionRefused(BeeQueueError):
    """Redis answered, and said no: password, permission, database, certificate, or no RESP3."""


class ConnectionLost(BeeQueueError):
    """The connection went down before Redis answered.

    `maybe_applied` is False when the command certainly did not happen, True when it may have.
    """

    def __init__(self, message: str, *, maybe_applied: bool) -> None:
        super().__init__(message)
        self.maybe_applied = maybe_applied


class CommandError(BeeQueueError):
    """Redis refused a command; `code` is the first word of its reply, such as `OOM` or `NOPERM`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


class JobFailed(BeeQueueError):
    """A job failed on its worker; the message is the worker's error message, as it is."""

    __str__ = Exception.__str__


class JobTimeout(BeeQueueError):
    """A handler ran longer than its job's `timeout`; its job fails with this message."""

    __str__ = Exception.__str__


class JobStalled(BeeQueueError):
    """A job lost its worker more often than `max_stalls` allows; it failed with this message."""

    __str__ = Exception.__str__


class OutcomeUnknown(BeeQueueError):
    """A job has ended, or its entry is gone, and nobody can tell how."""


class LateFinish(BeeQueueError):
    """A handler ended, but its job had been settled, removed or handed on meanwhile; nothing was written."""


class OutcomeNotRecorded(BeeQueueError):
    """Redis could not be told what became of a job, or refused; what is still in `active` comes back by the stall check."""


class UnreadableData(BeeQueueError):
    """A stored job or a received message is not what bee-queue writes; it was set aside."""


class ListenerFailed(BeeQueueError):
    """A listener raised; `__cause__` is what it raised."""


class TaskFailed(BeeQueueError):
    """A background task of the library raised an error that its code does not expect, `__cause__`; it begins anew."""


def said(error: BaseException) -> str:
    """What an error says, and what Redis, or the connection to it, said that led to it."""
    cause = error.__cause__
    tells_more = isinstance(cause, BeeQueueError) and str(cause) not in str(error)
    return f"{error}: {cause}" if tells_more else str(error)
