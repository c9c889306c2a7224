"""The errors that a caller of beequeue can catch.

They share one root, `BeeQueueError`. Those that Redis or the connection to it causes share the parent `RedisFailure`. The
first line of each docstring says when the error is raised. Wrong arguments raise `ValueError` or `TypeError`, which name the
argument.
"""

from __future__ import annotations

from typing import Any

from beequeue.escape import escape


class BeeQueueError(Exception):
    """The root of all errors that beequeue defines. Each of them can be copied and pickled.

    Its text is one line that is safe to show, even if it quotes ids and replies that others wrote; `args` holds them
    unchanged.
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
    """A queue with `auto_connect=False` was used before `connect()`."""


class WrongLoop(BeeQueueError):
    """A queue was used from another event loop, thread or process than the one that opened it."""


class OperationTimedOut(BeeQueueError):
    """`close()` ran past its time-out; the message is `Operation timed out.`, as in bee-queue.

    `abandoned` counts the handlers that had not ended, which were cancelled, or left in their threads. It is 0 when only Redis
    was late.
    """

    def __init__(self, abandoned: int = 0) -> None:
        super().__init__("Operation timed out.")
        self.abandoned = abandoned


class RedisFailure(BeeQueueError):
    """Redis refused something or could not be reached.

    Catch this class to handle `ConnectionRefused`, `ConnectionLost` and `CommandError` alike. It is not related to redis-py's
    `RedisError`; redis-py's own exceptions never reach a caller.
    """


class ConnectionRefused(RedisFailure):
    """Redis refused the connection: wrong password, missing permission, unknown database, bad certificate, or no RESP3."""


class ConnectionLost(RedisFailure):
    """The connection went down before Redis answered, or Redis did not answer within a time-out.

    `maybe_applied` is False when the command certainly had no effect, and True when it may have had one.
    """

    def __init__(self, message: str, *, maybe_applied: bool) -> None:
        super().__init__(message)
        self.maybe_applied = maybe_applied


class CommandError(RedisFailure):
    """Redis refused a command; `code` is the first word of its reply, such as `OOM` or `NOPERM`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


class JobFailed(BeeQueueError):
    """A job failed on its worker; the message is the worker's error message, unchanged."""

    __str__ = Exception.__str__


class JobTimeout(BeeQueueError):
    """A handler ran longer than its job's `timeout`; the job fails with this message."""

    __str__ = Exception.__str__


class JobStalled(BeeQueueError):
    """A job lost its worker more often than `max_stalls` allows; the job failed with this message."""

    __str__ = Exception.__str__


class OutcomeUnknown(BeeQueueError):
    """A job has ended or its entry is gone, and nothing says how it ended."""


class LateFinish(BeeQueueError):
    """A handler ended after its job had been settled, removed or given to another worker; nothing was written."""


class OutcomeNotRecorded(BeeQueueError):
    """A job's outcome could not be written to Redis. If the job is still in `active`, the stall check brings it back."""


class UnreadableData(BeeQueueError):
    """A stored job or a received message is not in bee-queue's format; it was set aside."""


class ListenerFailed(BeeQueueError):
    """A listener raised an exception, which is the `__cause__`."""


class TaskFailed(BeeQueueError):
    """A background task of the library raised an unexpected exception, which is the `__cause__`; the task starts again."""


def with_cause(error: BaseException) -> str:
    """The text of `error`, then that of the beequeue error that caused it, unless the first quotes the second already."""
    cause = error.__cause__
    adds_something = isinstance(cause, BeeQueueError) and str(cause) not in str(error)
    return f"{error}: {cause}" if adds_something else str(error)
