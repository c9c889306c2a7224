"""The package's structure: imports go one way, and each script's header tells the truth."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from beequeue.store import KEYS, SCRIPTS

PACKAGE = Path(__file__).parent.parent / "beequeue"
ORDER = [
    "__main__",
    "fsck",
    "sync",
    "__init__",
    "queue",
    "producer",
    "saving",
    "consumer",
    "heart",
    "strangers",
    "intake",
    "threads",
    "run",
    "maintenance",
    "decisions",
    "tracker",
    "sharing",
    "fsck_store",
    "store",
    "connection",
    "address",
    "url",
    "link",
    "supervised",
    "forks",
    "calls",
    "job",
    "events",
    "settings",
    "errors",
    "shown",
]


def imported(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.add(node.module or "")
            if node.module == "beequeue":
                names |= {f"beequeue.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module: str) -> None:
    below = {f"beequeue.{name}" for name in ORDER[ORDER.index(module) + 1 :]}
    own = {name for name in imported(module) if name.split(".")[0] == "beequeue"}
    assert own <= below


def test_one_module_imports_the_driver() -> None:
    drivers = {module for module in ORDER if any(name.split(".")[0] == "redis" for name in imported(module))}
    assert drivers == {"address"}


@pytest.mark.parametrize("script", sorted(PACKAGE.glob("lua/*.lua")), ids=lambda path: path.stem)
def test_headers(script: Path) -> None:
    text = script.read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("--"))
    code = "\n".join(line.split("--")[0] for line in text.splitlines() if not line.startswith("--"))
    assert "Returns" in header
    assert "Why:" in header
    keys = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", header)}
    assert keys == set(range(1, len(keys) + 1))
    assert {int(number) for number in re.findall(r"KEYS\[(\d+)\]", code)} == keys
    used = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", code)}
    listed = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", header)}
    assert used == listed or ("ARGV[1..n]" in header and "ipairs(ARGV)" in code)
    assert ("..n]" in header) == ("ipairs(ARGV)" in code or "#ARGV" in code)


@pytest.mark.parametrize("name", SCRIPTS)
def test_headers_name_keys_and_channels_of_a_queue(name: str) -> None:
    """calls pass what stands there, below the queue's prefix"""
    assert SCRIPTS[name].keys
    assert {*SCRIPTS[name].keys} <= {*KEYS, "events", "earlierDelayed"} | ({"ended"} if name == "clean" else set())
