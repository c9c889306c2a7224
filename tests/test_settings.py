"""Settings: a message names every wrong value, and none is silently replaced."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from beequeue import QueueSettings, linear_backoff
from beequeue.settings import QueueOptions, milliseconds, whole_number


def test_defaults() -> None:
    """bee-queue's own, and the port's five"""
    settings = dataclasses.asdict(QueueSettings())
    assert settings == {
        "prefix": "bq",
        "is_worker": True,
        "get_events": True,
        "send_events": True,
        "store_jobs": True,
        "ensure_scripts": True,
        "activate_delayed_jobs": False,
        "stall_interval": 5000,
        "near_term_window": 1_200_000,
        "delayed_debounce": 1000,
        "remove_on_success": False,
        "remove_on_failure": False,
        "quit_command_client": None,
        "redis_scan_count": 100,
        "auto_connect": True,
        "initial_redis_failure_retry_delay": 1000,
        "ordered_events": True,
        "stalled_check_interval": None,
        "max_stalls": None,
        "reconnect": linear_backoff,
        "max_event_bytes": 16_000_000,
    }


def test_the_typed_arguments_are_the_settings() -> None:
    assert set(QueueOptions.__annotations__) == {field.name for field in dataclasses.fields(QueueSettings)}


def test_durations_may_be_timedeltas() -> None:
    assert QueueSettings(stall_interval=timedelta(seconds=2)).stall_interval == 2000  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["", None])
def test_an_empty_prefix_is_the_default(prefix: Any) -> None:
    """C-09"""
    assert QueueSettings(prefix=prefix).prefix == "bq"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_worker", 1, "is_worker must be True or False, not 1"),
        ("get_events", "false", "get_events must be True or False, not 'false'"),
        ("quit_command_client", 0, "quit_command_client must be True or False, not 0"),
        ("prefix", 5, "prefix must be a string, not 5"),
        ("prefix", "a\udcff", r"prefix must be text that UTF-8 can carry, not 'a\udcff'"),
        ("stall_interval", 0, "stall_interval must be at least 1 ms, not 0"),
        ("stall_interval", 1.5, "stall_interval must be an int of milliseconds or a timedelta, not 1.5"),
        ("near_term_window", -5, "near_term_window must be at least 1 ms, not -5"),
        (
            "near_term_window",
            2**53,
            "near_term_window must be less than 2**53 ms, the limit of JavaScript's integers, not 9007199254740992",
        ),
        ("delayed_debounce", -1, "delayed_debounce must be at least 0 ms, not -1"),
        ("stalled_check_interval", True, "stalled_check_interval must be an int of milliseconds or a timedelta, not True"),
        ("initial_redis_failure_retry_delay", 0, "initial_redis_failure_retry_delay must be at least 1 ms, not 0"),
        ("redis_scan_count", 0, "redis_scan_count must be at least 1, not 0"),
        ("max_event_bytes", 0, "max_event_bytes must be at least 1, not 0"),
        ("redis_scan_count", timedelta(1), "redis_scan_count must be an int, not datetime.timedelta(days=1)"),
        ("max_stalls", -1, "max_stalls must be at least 0, not -1"),
        pytest.param("max_stalls", 10**5000, "max_stalls must fit in 64 bits, not an int of 16610 bits", id="5001 digits"),
        ("max_stalls", True, "max_stalls must be an int, not True"),
        ("max_stalls", timedelta(1), "max_stalls must be an int, not datetime.timedelta(days=1)"),
        ("reconnect", 5, "reconnect must be a function from attempt to milliseconds, not 5"),
    ],
)
def test_wrong_values(name: str, value: Any, message: str) -> None:
    """C-10, C-11, QK-10"""
    with pytest.raises((TypeError, ValueError)) as caught:
        QueueSettings(**{name: value})
    assert str(caught.value) == message


def test_a_prefix_is_kept() -> None:
    assert QueueSettings(prefix="ü").prefix == "ü"


def test_settings_are_one_frozen_value() -> None:
    settings = QueueSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.prefix = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        QueueSettings("bq")  # type: ignore[call-arg]
    assert not QueueOptions.__total__


@pytest.mark.parametrize("get_events", [True, False])
@pytest.mark.parametrize("ordered_events", [True, False])
def test_commands_go_on_the_event_connection_where_there_is_one(get_events: bool, ordered_events: bool) -> None:
    settings = QueueSettings(get_events=get_events, ordered_events=ordered_events)
    assert settings.ordered is (get_events and ordered_events)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("delayed_debounce", 0),
        ("stalled_check_interval", 0),
        ("near_term_window", 1),
        ("max_stalls", 0),
        ("redis_scan_count", 1),
        ("max_event_bytes", 1),
    ],
)
def test_the_least_value(name: str, least: int) -> None:
    assert getattr(QueueSettings(**{name: least}), name) == least  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{name} must be at least {least}( ms)?, not {least - 1}$"):
        QueueSettings(**{name: least - 1})  # type: ignore[arg-type]


def test_a_duration_may_be_0() -> None:
    assert milliseconds("n", 0) == 0
    with pytest.raises(ValueError, match="^n must be at least 0 ms, not -1$"):
        milliseconds("n", -1)


def test_the_longest_duration() -> None:
    assert QueueSettings(near_term_window=2**53 - 1).near_term_window == 2**53 - 1


def test_whole_numbers_fit_in_64_bits() -> None:
    assert [whole_number("n", number) for number in (-(2**63), 2**63 - 1)] == [-(2**63), 2**63 - 1]
    for number in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=f"^n must fit in 64 bits, not {number}$"):
            whole_number("n", number)


def test_the_back_off_is_linear_and_capped() -> None:
    assert [linear_backoff(attempt) for attempt in (1, 2, 59, 60, 61, 1000)] == [250, 500, 14_750, 15_000, 15_000, 15_000]
