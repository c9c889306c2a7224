"""JSON as Node writes and reads it: what orjson does at once, and what `json` does where orjson refuses."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from beequeue.errors import UnreadableData
from beequeue.wire.node_json import dump_json, load_json
from tests.observe import nested


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"ü": ["\ud83d\u2028", 5]}, '{"ü":["\\ud83d\u2028",5]}'),
        (["\udc00", datetime(2020, 1, 1, tzinfo=UTC)], '["\\udc00","2020-01-01T00:00:00+00:00"]'),
        (float("nan"), "null"),
        (["\ud800", math.nan], '["\\ud800",null]'),
        (["\ud800", math.inf], '["\\ud800",null]'),
    ],
)
def test_values_are_written_as_node_writes_them(value: Any, written: str) -> None:
    assert dump_json(value) == written.encode()


def test_nan_and_infinity_are_null_beside_lone_surrogates_too() -> None:
    """strings that read like one of them stay as they are"""
    value = {
        "\ud800": [math.nan, math.inf, {"a": -math.inf}],
        "NaN": "-Infinity",
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "big": 2**70,
    }
    told = b'{"\\ud800":[null,null,{"a":null}],"NaN":"-Infinity","at":"2026-01-02T00:00:00+00:00","big":1180591620717411303424}'
    assert dump_json(value) == told
    circle: list[Any] = ["\ud800", math.nan]
    circle.append(circle)
    with pytest.raises(TypeError, match="^JSON cannot carry it: Circular reference detected$"):
        dump_json(circle)


def test_deep_values_are_carried_and_circles_are_refused() -> None:
    deep = nested(500)
    assert load_json(dump_json(deep), "test") == deep
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="JSON cannot carry it: Circular reference detected"):
        dump_json(circle)


def test_values_that_json_cannot_carry_are_refused() -> None:
    with pytest.raises(TypeError, match="^Type is not JSON serializable: object$"):
        dump_json(object())
    with pytest.raises(TypeError, match="^Dict key must be str$"):
        dump_json({1: 2})
    with pytest.raises(TypeError, match="^JSON cannot carry it: "):
        dump_json(nested(100_000))


def test_text_that_orjson_refuses_is_read() -> None:
    assert load_json(b'[100000000000000000000,-9223372036854775808,"\\ud83d"]', "test") == [1e20, -(2**63), "\ud83d"]


@pytest.mark.parametrize(
    ("number", "kind"), [(2**64 - 1, int), (2**64, float), (-(2**63), int), (-(2**63) - 1, float), (0, int)]
)
def test_a_lone_surrogate_changes_no_number(number: int, kind: type) -> None:
    """beyond 64 bits a number is a float, whichever of the two readers reads it"""
    for text in (f"[{number}]", f'[{number},"\\ud83d"]'):
        (read, *_) = load_json(text.encode(), "test")
        assert type(read) is kind
        assert read == kind(number)


def test_an_error_quotes_only_the_beginning() -> None:
    text = b'{"a":' + b"x" * 1000
    with pytest.raises(UnreadableData) as caught:
        load_json(text, "test")
    quoted = repr(text[:200])
    assert str(caught.value) == f"a test is not JSON (Expecting value: line 1 column 6 (char 5)): {quoted}"


def test_the_frame_of_an_error_holds_no_text() -> None:
    """A caller may keep the error; its own frame is the caller's business."""
    with pytest.raises(UnreadableData) as caught:
        load_json(b"[", "test")
    assert "text" not in caught.traceback[-1].frame.f_locals
