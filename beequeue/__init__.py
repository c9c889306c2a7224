"""bee-queue 2.0.0's job queue for asyncio, on the same keys and messages in Redis."""

from beequeue.connection import check_redis_url
from beequeue.errors import (
    BeeQueueError,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    JobFailed,
    JobTimeout,
    LateFinish,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    OutcomeNotRecorded,
    OutcomeUnknown,
    QueueClosed,
    UnreadableData,
    WrongLoop,
)
from beequeue.job import Job
from beequeue.queue import Queue
from beequeue.settings import QueueSettings, linear_backoff

__all__ = [
    "BeeQueueError",
    "CommandError",
    "ConnectionLost",
    "ConnectionRefused",
    "Job",
    "JobFailed",
    "JobTimeout",
    "LateFinish",
    "ListenerFailed",
    "NotConnected",
    "OperationTimedOut",
    "OutcomeNotRecorded",
    "OutcomeUnknown",
    "Queue",
    "QueueClosed",
    "QueueSettings",
    "UnreadableData",
    "WrongLoop",
    "check_redis_url",
    "linear_backoff",
]
