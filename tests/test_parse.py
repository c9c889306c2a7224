"""Values given as text: each is parsed, or refused with a reason."""

from __future__ import annotations

import pytest

from beequeue.parse import text, whole_number


@pytest.mark.parametrize(("value", "number"), [("1", 1), ("007", 7), ("9" * 15, 10**15 - 1)])
def test_whole_numbers(value: str, number: int) -> None:
    assert whole_number(value) == number


@pytest.mark.parametrize("value", ["", "0", "00", "-1", "+1", " 1", "1.0", "1_000", "٣", "one"])
def test_no_whole_numbers(value: str) -> None:
    with pytest.raises(ValueError, match="^must be a whole number of at least 1, not ") as refused:
        whole_number(value)
    assert str(refused.value).endswith(repr(value))


def test_the_least_whole_number() -> None:
    assert whole_number("0", at_least=0) == 0
    with pytest.raises(ValueError, match="^must be a whole number of at least 3, not '2'$"):
        whole_number("2", at_least=3)


@pytest.mark.parametrize("digits", [16, 5_000], ids=["16 digits", "more than int() reads"])
def test_numbers_that_are_too_long(digits: int) -> None:
    with pytest.raises(ValueError, match="^must have at most 15 digits, not '9+'$"):
        whole_number("9" * digits)


def test_text() -> None:
    assert text("é 日") == "é 日"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "must not be empty"),
        ("a\0b", r"must not contain NUL, unlike 'a\x00b'"),
        ("a\udcff", r"must be text that UTF-8 can carry, not 'a\udcff'"),
    ],
)
def test_no_text(value: str, reason: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the whole text is compared
        text(value)
    assert str(refused.value) == reason
