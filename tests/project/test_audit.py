"""`make audit`: its lines and exit code for pip-audit's answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.audit import judged

WELL = {"name": "redis", "version": "8.1.0", "vulns": []}
BAD = {
    "name": "orjson",
    "version": "3.9.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.9.15"]}, {"id": "X", "fix_versions": []}],
}
SKIPPED = {"name": "uvloop", "skip_reason": "Dependency not found on PyPI"}
UNKNOWN = "could not be audited, because the index knows nothing about them: "


@pytest.mark.parametrize(
    ("packages", "lines", "code"),
    [
        ([WELL], ["0 known vulnerabilities in 1 packages"], 0),
        ([SKIPPED, SKIPPED], [f"0 known vulnerabilities in 0 packages; 2 {UNKNOWN}uvloop, uvloop"], 0),
        (
            [WELL, BAD, SKIPPED],
            [
                "orjson 3.9.0: PYSEC-1, fixed in 3.9.15",
                "orjson 3.9.0: X, fixed in no version",
                f"2 known vulnerabilities in 2 packages; 1 {UNKNOWN}uvloop",
            ],
            1,
        ),
    ],
)
def test_findings_alone_are_a_failure(packages: list[Any], lines: list[str], code: int) -> None:
    assert judged(json.dumps({"dependencies": packages, "fixes": []}), "") == (lines, code)


@pytest.mark.parametrize(
    ("out", "errors", "why"),
    [
        ("", "Traceback …\nConnectionError: no route\n", "ConnectionError: no route"),
        ("[]", "", "it printed nothing"),
        ("{}", "No module named pip_audit", "No module named pip_audit"),
    ],
)
def test_where_it_cannot_run_one_line_says_so(out: str, errors: str, why: str) -> None:
    assert judged(out, errors) == ([f"nothing was audited: pip-audit could not run here: {why}"], 0)
