"""`make docs` fails where it must. Runs where MkDocs is installed; `.ci/run` builds the pages before the tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip("mkdocs")

FAULTS = {
    "README.md": "[gone](docs/gone.md) [gone](gone.txt)",
    "docs/race.md": "[gone](library.md#gone) ![elsewhere](https://example.org/picture.png)",
    "docs/outside.md": "# A page outside the navigation",
}


@pytest.mark.timeout(240)
def test_the_build_is_strict(tmp_path: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("beequeue", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "public.py", tmp_path / "tests")
    for name, fault in FAULTS.items():
        with (tmp_path / name).open("a") as page:
            page.write(f"\n{fault}\n")
    without_docstring(tmp_path / "beequeue" / "queue.py", "is_running")
    reference = tmp_path / "docs" / "reference" / "settings.md"
    reference.write_text(reference.read_text().replace("::: beequeue.linear_backoff\n", ""))

    (command,) = re.findall(r"-m (mkdocs build.*)", (ROOT / "Makefile").read_text())
    built = subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
    warnings = re.findall(r"WARNING +- +(.*)", built.stderr)
    assert built.returncode == 1, built.stderr
    for expected in (
        "'index.md' contains a link 'gone.md'",
        "'index.md' contains a link 'gone.txt'",
        "'race.md' contains a link 'library.md#gone'",
        'not included in the "nav"',
        "race.html loads https://example.org/picture.png",
        "beequeue.Queue.is_running has no docstring",
        "beequeue.linear_backoff has no docstring, or is on no page of the reference",
    ):
        assert [expected in warning for warning in warnings].count(True) == 1, (expected, warnings)


def without_docstring(module: Path, function: str) -> None:
    source, times = re.subn(rf'(def {function}\(.*:\n) +""".*"""\n', r"\1", module.read_text())
    assert times == 1
    module.write_text(source)
