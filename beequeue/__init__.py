"""bee-queue 2.0.0's job queue for asyncio, on the same keys and messages in Redis."""

from beequeue.connections import connect
from beequeue.errors import (
    BeeQueueError,
    CommandError,
    ConnectionLost,
    ConnectionRefused,
    JobFailed,
    JobStalled,
    JobTimeout,
    LateFinish,
    ListenerFailed,
    NotConnected,
    OperationTimedOut,
    OutcomeNotRecorded,
    OutcomeUnknown,
    QueueClosed,
    RedisFailure,
    TaskFailed,
    UnreadableData,
    WrongLoop,
)
from beequeue.job import Job
from beequeue.queue import Queue
from beequeue.settings import QueueSettings, linear_backoff
from beequeue.store.store import Health
from beequeue.wire.address import check_redis_url
from beequeue.wire.client import Client

__all__ = [
    "BeeQueueError",
    "Client",
    "CommandError",
    "ConnectionLost",
    "ConnectionRefused",
    "Health",
    "Job",
    "JobFailed",
    "JobStalled",
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
    "RedisFailure",
    "TaskFailed",
    "UnreadableData",
    "WrongLoop",
    "check_redis_url",
    "connect",
    "linear_backoff",
]
