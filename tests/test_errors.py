"""The errors as values: their family, and their copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import beequeue.errors
from beequeue import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused, RedisFailure

SAMPLES: dict[type[BeeQueueError], BeeQueueError] = {
    ConnectionLost: ConnectionLost("lost", maybe_applied=True),
    CommandError: CommandError("OOM command not allowed"),
}
KINDS = [kind for _, kind in inspect.getmembers(beequeue.errors, inspect.isclass) if issubclass(kind, BeeQueueError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_can_be_copied_and_pickled(kind: type[BeeQueueError]) -> None:
    """a pool of processes pickles them, and a bulk save copies one error for each of its jobs"""
    error = SAMPLES.get(kind) or (kind() if "__init__" in vars(kind) else kind("why"))
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert again is not error
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_one_class_catches_every_failure_of_redis() -> None:
    assert {kind for kind in KINDS if issubclass(kind, RedisFailure)} == {
        RedisFailure,
        CommandError,
        ConnectionLost,
        ConnectionRefused,
    }
