"""README says what is so: its example runs as printed, and the files, targets and variables that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed(url: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", example.replace("redis://127.0.0.1:6379", url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == ("5\n", "")


def test_the_files_that_it_lists_exist() -> None:
    code = README.split("## Code", 1)[1].split("\n\n", 2)[1]
    listed = {name.strip() for row in code.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    modules = {path.name for path in (ROOT / "beequeue").glob("*.py")} - {"__init__.py"}
    assert modules <= listed
    for name in listed - modules:
        assert (ROOT / name).exists() or (ROOT / "beequeue" / name).exists(), name


def test_the_targets_that_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z][\w-]+)", README)) <= targets


def test_the_variables_that_it_names_have_these_defaults() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^`|;]+?)`?[ ;|]", README, re.MULTILINE))
    defaults = Config()
    assert {name.lower() for name in rows} == {*Config.__dataclass_fields__} - {"workers"}
    for name, shown in rows.items():
        default = getattr(defaults, name.lower())
        assert shown.strip() == (str(default).lower() if isinstance(default, bool) else str(default)), name
