"""The list of licences matches the packages that requirements.txt installs, and their metadata."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from tests import ROOT
from tests.pages import section, tables

LISTED = {row[0].split(",")[0]: row[1] for row in tables(section("docs/operations.md", "Licences"), "package")}
PINNED = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def test_all_that_is_needed_is_listed() -> None:
    """including what those packages need in turn, on every Python"""
    needed = {*PINNED}
    for name in PINNED:
        for requirement in importlib.metadata.requires(name) or []:
            if "extra ==" not in requirement:
                needed.add(re.split(r"[^\w-]", requirement)[0])
    assert {*LISTED} == needed


@pytest.mark.parametrize("name", PINNED)
def test_the_licence_is_the_packages_own(name: str) -> None:
    told = importlib.metadata.metadata(name).json
    assert told["version"] == PINNED[name]
    assert LISTED[name] == (told.get("license_expression") or told.get("license"))
