"""JSON as Node writes and reads it.

Python values become the bytes that `JSON.stringify` writes: NaN and Infinity as null, lone surrogates as escapes. orjson does
nearly all of the work; the standard library's `json` takes the values and texts that orjson refuses. This module knows
nothing about jobs or messages.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from beequeue.errors import UnreadableData


def dump_json(value: Any) -> bytes:
    """Writes `value` as Node does, lone surrogates too (as escapes); raises `TypeError` when JSON cannot carry it."""
    try:
        return orjson.dumps(value)
    except TypeError as refused:
        if not str(refused).endswith(("surrogates not allowed", "Recursion limit reached")):
            raise
    try:
        text = _dump(value)
        if "NaN" in text or "Infinity" in text:  # possibly inside a string
            text = _dump(json.loads(text, parse_constant=lambda name: None))
    except (ValueError, RecursionError) as error:
        raise TypeError(f"JSON cannot carry it: {error}") from None
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text).encode()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_as_plain)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _as_plain(value: Any) -> Any:
    """Converts a value that `json` does not know as orjson would write it."""
    return orjson.loads(orjson.dumps(value))


def load_json(text: bytes, what: str) -> Any:
    """Reads JSON as Node writes it, lone surrogates too; raises `UnreadableData` naming `what`.

    The error holds only the beginning of `text`, so that keeping the error does not keep the text in memory.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text, parse_int=_int_or_float)
    except (ValueError, RecursionError) as error:
        unreadable = UnreadableData(f"a {what} is not JSON ({error}): {text[:200]!r}")
    del text
    # raised outside the handlers: the decoder's own error holds the whole text and would become the context
    raise unreadable


def _int_or_float(digits: str) -> int | float:
    """Reads a number as orjson does: as a float beyond 64 bits. Node reads every number as one."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)
