"""Child processes that end when their parent does, even if it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` with which the kernel kills the child when its parent dies (Linux; None elsewhere)."""
    if _libc is None:
        return None
    parent = os.getpid()

    def in_child() -> None:
        assert _libc is not None
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the kernel was asked
            os._exit(1)

    return in_child


def stop_with_parent() -> None:
    """Makes the kernel send this process SIGTERM when its own parent dies (Linux)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
