"""Values given as text, on a command line or in the environment. Each function raises `ValueError` with a text that says what
the value must be; the caller puts the name of the argument or variable in front of it.
"""

from __future__ import annotations

MOST_DIGITS = 15
"""As many as Node reads exactly."""


def whole_number(value: str, *, at_least: int = 1, at_most: int | None = None) -> int:
    """An int."""
    if not (value.isascii() and value.isdigit() and int(value[:MOST_DIGITS]) >= at_least):
        raise ValueError(f"must be a whole number of at least {at_least}, not {value!r}")
    if len(value) > MOST_DIGITS:
        raise ValueError(f"must have at most {MOST_DIGITS} digits, not {value!r}")
    if at_most is not None and int(value) > at_most:
        raise ValueError(f"must be at most {at_most:,}, not {value!r}")
    return int(value)


def text(value: str) -> str:
    """The text itself; a byte that is not UTF-8 reaches Python as a lone surrogate, which Redis cannot be sent."""
    if not value:
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError(f"must not contain NUL, unlike {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must be text that UTF-8 can carry, not {value!r}") from None
    return value
