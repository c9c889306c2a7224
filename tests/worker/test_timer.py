"""The eager timer, on a clock that the test moves (ET-01 to ET-18)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from beequeue.worker.clocks import EagerTimer

START = 10


class Clock:
    """A clock that a test moves, with the `call_later` of an event loop."""

    def __init__(self) -> None:
        self.now = float(START)
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.early_by = 0.0

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        entry = (self.now + delay_s * 1000 - self.early_by, callback)
        self.timers.append(entry)
        timers = self.timers

        class Handle:
            def cancel(self) -> None:
                if entry in timers:
                    timers.remove(entry)

        return Handle()  # type: ignore[return-value]

    def advance_to(self, when: float) -> None:
        while due := sorted(entry for entry in self.timers if entry[0] <= when + 1e-6):
            entry = due[0]
            self.timers.remove(entry)
            self.now = max(self.now, entry[0])
            entry[1]()
        self.now = when


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def triggered() -> list[float]:
    return []


@pytest.fixture
def timer(clock: Clock, triggered: list[float]) -> EagerTimer:
    return EagerTimer(500, lambda: triggered.append(round(clock.now)), clock=clock, call_later=clock.call_later)


def test_triggers_once_at_the_time(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-01, ET-03: and again after the maximum delay"""
    timer.schedule(START + 200)
    clock.advance_to(START + 199)
    assert triggered == []
    clock.advance_to(START + 699)
    assert triggered == [START + 200]
    clock.advance_to(START + 700)
    assert triggered == [START + 200, START + 700]


def test_waits_no_longer_than_the_maximum(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-02, ET-03"""
    timer.schedule(START + 600)
    clock.advance_to(START + 1000)
    assert triggered == [START + 500, START + 1000]


def test_an_earlier_time_wins(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-04"""
    timer.schedule(START + 300)
    timer.schedule(START + 200)
    clock.advance_to(START + 699)
    assert triggered == [START + 200]
    clock.advance_to(START + 700)
    assert triggered == [START + 200, START + 700]


def test_an_earlier_time_wins_later(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-05"""
    timer.schedule(START + 300)
    clock.advance_to(START + 5)
    timer.schedule(START + 200)
    clock.advance_to(START + 700)
    assert triggered == [START + 200, START + 700]


@pytest.mark.parametrize("later", [START + 300, START + 1000, None])
def test_a_later_time_is_dropped(timer: EagerTimer, clock: Clock, triggered: list[float], later: float | None) -> None:
    """ET-06, ET-07, ET-12"""
    timer.schedule(START + 20)
    timer.schedule(later)
    clock.advance_to(START + 519)
    assert triggered == [START + 20]
    clock.advance_to(START + 520)
    assert triggered == [START + 20, START + 520]


@pytest.mark.parametrize("when", [-1, None, math.nan])
def test_no_time_means_the_maximum(timer: EagerTimer, clock: Clock, triggered: list[float], when: float | None) -> None:
    """ET-08, ET-09, ET-11"""
    timer.schedule(when)
    clock.advance_to(START + 500)
    assert triggered == [START + 500]


@pytest.mark.parametrize("when", [START - 5, START])
def test_a_time_that_has_passed_triggers_at_once(timer: EagerTimer, clock: Clock, triggered: list[float], when: float) -> None:
    """ET-13"""
    timer.schedule(when)
    assert triggered == [START]
    clock.advance_to(START + 500)
    assert triggered == [START, START + 500]


def test_stop(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-14, ET-15, ET-16, CL-25"""
    timer.schedule(START + 50)
    clock.advance_to(START + 25)
    timer.stop()
    timer.schedule(START)
    timer.schedule(START + 100)
    assert clock.timers == []
    clock.advance_to(START + 2000)
    assert triggered == []


@pytest.mark.parametrize("maximum", [-1, math.nan, math.inf, 1.5, 0])
def test_the_maximum_is_checked(maximum: float, clock: Clock) -> None:
    """ET-17"""
    with pytest.raises(ValueError, match="maximum delay must be a positive integer"):
        EagerTimer(maximum, lambda: None, clock=clock, call_later=clock.call_later)  # type: ignore[arg-type]


def test_a_timer_that_fires_early_waits_for_the_rest(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    """ET-18"""
    clock.early_by = 30
    timer.schedule(START + 200)
    clock.early_by = 0
    clock.advance_to(START + 180)
    assert triggered == []
    clock.advance_to(START + 200)
    assert triggered == [START + 200]


def test_a_clock_set_back_delays_by_the_maximum_at_most(timer: EagerTimer, clock: Clock, triggered: list[float]) -> None:
    timer.schedule(START + 200)
    _, fire = clock.timers.pop()
    clock.now = START - 3_600_000
    fire()
    assert triggered == []
    clock.advance_to(START - 3_600_000 + 500)
    assert triggered == [START - 3_600_000 + 500]
