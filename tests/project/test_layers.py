"""The package's structure: imports go one way, and each script's header tells the truth."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from beequeue.fsck import store as fsck_store
from beequeue.store.scripts import SCRIPTS
from beequeue.store.store import KEYS
from tests import ROOT

PACKAGE = ROOT / "beequeue"
FLOORS = [
    {"__main__", "command"},
    {"fsck", "sync"},
    {"__init__"},
    {"queue", "connections"},
    {"producer", "worker"},
    {"host"},
    {"store"},
    {"job", "events"},
    {"wire"},
    {"tasks"},
    {"settings", "errors", "escape", "parse", "signals"},
]
"""From the top: a unit may import from its own floor and from lower ones. `producer` and `worker` never import each other."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(module: Path) -> str:
    """`queue`, `wire.link`; a folder's `__init__` has the folder's name."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def unit(name: str) -> str:
    """The folder of a module, or the module itself."""
    return name.split(".")[0]


def imported(module: Path) -> set[str]:
    """The full names that a source file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.add(node.module or "")
            if node.module == "beequeue":
                names |= {f"beequeue.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def ours(module: Path) -> set[str]:
    """The units of the package that a module imports, without its own."""
    found = {name.split(".")[1] if "." in name else "__init__" for name in imported(module) if name.split(".")[0] == "beequeue"}
    units = {unit for floor in FLOORS for unit in floor}
    return {each if each in units else "__init__" for each in found} - {unit(name_of(module))}


def test_every_module_has_its_floor() -> None:
    assert {unit(name_of(module)) for module in MODULES} == {unit for floor in FLOORS for unit in floor}


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_go_down(module: Path) -> None:
    own = unit(name_of(module))
    level = next(level for level, floor in enumerate(FLOORS) if own in floor)
    allowed = set().union(*FLOORS[level:]) - {own}
    if own in ("producer", "worker"):
        allowed -= {"producer", "worker"}
    assert ours(module) <= allowed


def test_modules_import_no_circle() -> None:
    """within a floor and within a folder, too"""
    names = {name_of(module) for module in MODULES}
    needs = {
        name_of(module): {name.removeprefix("beequeue.") for name in imported(module) if name.startswith("beequeue.")} & names
        for module in MODULES
    }
    left = dict(needs)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_one_module_imports_the_driver() -> None:
    drivers = {name_of(module) for module in MODULES if any(name.split(".")[0] == "redis" for name in imported(module))}
    assert drivers == {"wire.driver"}


@pytest.mark.parametrize("script", sorted(PACKAGE.rglob("*.lua")), ids=lambda path: path.stem)
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


@pytest.mark.parametrize("name", [*SCRIPTS, *fsck_store.SCRIPTS])
def test_headers_name_keys_and_channels_of_a_queue(name: str) -> None:
    """a call passes the keys of the header, with the queue's prefix"""
    keys = (SCRIPTS | fsck_store.SCRIPTS)[name].keys
    assert keys
    assert {*keys} <= {*KEYS, "events", "earlierDelayed"} | ({"ended"} if name == "clean" else set())
