"""The errors as values."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import beequeue.errors
from beequeue import BeeQueueError, CommandError, ConnectionLost

SAMPLES: dict[type[BeeQueueError], BeeQueueError] = {
    ConnectionLost: ConnectionLost("lost", maybe_applied=True),
    CommandError: CommandError("OOM command not allowed"),
}
KINDS = [kind for _, kind in inspect.getmembers(beequeue.errors, inspect.isclass) if issubclass(kind, BeeQueueError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_can_be_copied_and_pickled(kind: type[BeeQueueError]) -> None:
    """for a pool of processes, and where each of many jobs has an error of its own"""
    error = SAMPLES.get(kind) or (kind() if "__init__" in vars(kind) else kind("why"))
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert again is not error
        assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))
