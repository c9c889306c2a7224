"""The list of behaviours is well-formed, each that applies has a test, and the comparison can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT
from tests.behaviours import Behaviour, cover, named, of_this_project, parse, report

LIST = """\
# a comment

[One section]
A-01   what it promises
B-01   n/a callbacks: an `await` returns instead
[Another one]
B-02   something else
"""


def test_the_list_is_sound() -> None:
    behaviours = of_this_project().behaviours
    assert len({behaviour.id for behaviour in behaviours}) == len(behaviours) > 0
    assert all(behaviour.section and behaviour.text for behaviour in behaviours)


def test_no_test_names_an_unknown_behaviour() -> None:
    assert of_this_project().unknown == {}


def test_every_behaviour_has_a_test() -> None:
    assert [behaviour.id for behaviour in of_this_project().missing] == []


def test_reading_the_list() -> None:
    assert parse(LIST) == [
        Behaviour("A-01", "One section", True, "what it promises"),
        Behaviour("B-01", "One section", False, "callbacks: an `await` returns instead"),
        Behaviour("B-02", "Another one", True, "something else"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A-01   once more", "line 8 repeats A-01"),
        ("A-02", "line 8 has no ID, or nothing behind it: 'A-02'"),
        ("A-02   n/a", "line 8 has no ID, or nothing behind it: 'A-02   n/a'"),
        ("A-02   n/a  ", "line 8 has no ID, or nothing behind it: 'A-02   n/a  '"),
        ("A-2    one digit", "line 8 has no ID, or nothing behind it: 'A-2    one digit'"),
        ("and on it goes", "line 8 has no ID, or nothing behind it: 'and on it goes'"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="line 8") as caught:
        parse(LIST + line)
    assert str(caught.value) == message


def test_a_name_counts_in_a_tests_docstring_only() -> None:
    source = '''\
"""A-01"""
NAME = "A-02"
def helper(): "A-03"
def test_one():
    """A-04, B-05: and A-04 again, not UTF-16, A-6 or A-007"""
    "A-08"  # A-09
    def test_inner(): "A-10"
async def test_two(): "(B-11)"
def test_three(): pass
class TestFour:
    def test_method(self): "A-12"
'''
    found = [("A-04", "test_x.py::test_one"), ("B-05", "test_x.py::test_one"), ("B-11", "test_x.py::test_two")]
    assert list(named(source, "test_x.py", ["A", "B"])) == found


def test_what_is_missing_or_unknown_is_found() -> None:
    sources = {"test_x.py": 'def test_one(): "A-01, B-03"', "test_y.py": 'def test_two(): "A-01"'}
    coverage = cover(parse(LIST), sources)
    assert coverage.tests == {"A-01": ["test_x.py::test_one", "test_y.py::test_two"]}
    assert coverage.unknown == {"B-03": ["test_x.py::test_one"]}
    assert [behaviour.id for behaviour in coverage.missing] == ["B-02"]
    brief = [
        "3 behaviours: 1 have a test, 1 have none",
        "1 do not apply",
        "  B-01   n/a callbacks: an `await` returns instead",
        "no test: Another one",
        "  B-02   something else",
        "unknown: B-03 in test_x.py::test_one",
    ]
    assert list(report(coverage)) == brief
    in_full = list(report(coverage, verbose=True))
    assert in_full[:3] == ["  A-01   what it promises", "         test_x.py::test_one", "         test_y.py::test_two"]
    assert in_full[-len(brief) :] == brief


def test_nothing_is_missing_when_all_are_named() -> None:
    coverage = cover(parse(LIST), {"test_x.py": 'def test_one(): "A-01, B-02"'})
    assert (coverage.missing, coverage.unknown) == ([], {})


def test_the_command_says_by_its_status_whether_all_is_covered() -> None:
    command = [sys.executable, "-m", "tests.behaviours"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    coverage = of_this_project()
    assert ended.returncode == (1 if coverage.missing or coverage.unknown else 0)
    assert ended.stdout.splitlines() == list(report(coverage))
    assert ended.stderr == ""
