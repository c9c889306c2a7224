"""The event loop that the tests run on: asyncio's own, or uvloop with TEST_LOOP=uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

LOOPS = ("asyncio", "uvloop")


def use_loop(environment: Mapping[str, str]) -> None:
    """Makes every new event loop of this process be of the kind that TEST_LOOP names."""
    named = environment.get("TEST_LOOP") or "asyncio"
    if named not in LOOPS:
        pytest.exit(f"TEST_LOOP must be one of {', '.join(LOOPS)}, not {named!r}", returncode=2)
    if named == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
