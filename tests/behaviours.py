"""Which of bee-queue's behaviours the tests cover: `python -m tests.behaviours`, `-v` for all of them.

`behaviours.txt` lists them and says how it is written. A test covers those that its docstring names: the function's own, on
the top level of a `test_*.py` below `tests/`. Sources are read, not imported, so nothing has to run for this.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LINE = re.compile(r"([A-Z]{1,3}-\d\d) +(?:(n/a)(?: +|$))?(.*)")


class Behaviour(NamedTuple):
    """One line of the list."""

    id: str
    section: str
    applies: bool
    text: str
    """What the port promises; of a behaviour that does not apply, why."""


class Coverage(NamedTuple):
    """What the tests name, as `file::function` for each ID."""

    behaviours: list[Behaviour]
    tests: dict[str, list[str]]
    unknown: dict[str, list[str]]
    """IDs that the list does not have."""

    @property
    def missing(self) -> list[Behaviour]:
        """The behaviours that apply and that no test names."""
        return [behaviour for behaviour in self.behaviours if behaviour.applies and behaviour.id not in self.tests]


def parse(text: str) -> list[Behaviour]:
    """Reads the list; raises `ValueError` naming a line that is not as it should be, or whose ID came before."""
    behaviours: dict[str, Behaviour] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        found = LINE.fullmatch(line)
        if found is None or not found[3].strip():
            raise ValueError(f"line {number} has no ID, or nothing behind it: {line!r}")
        if found[1] in behaviours:
            raise ValueError(f"line {number} repeats {found[1]}")
        behaviours[found[1]] = Behaviour(found[1], section, found[2] is None, found[3].strip())
    return list(behaviours.values())


def named(source: str, file: str, prefixes: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each ID with one of `prefixes` that a test function of `source` names, and the function as `file::function`."""
    pattern = re.compile(rf"\b(?:{'|'.join(prefixes)})-\d\d\b")
    for node in ast.parse(source, file).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            for behaviour_id in dict.fromkeys(pattern.findall(ast.get_docstring(node) or "")):
                yield behaviour_id, f"{file}::{node.name}"


def cover(behaviours: list[Behaviour], sources: Mapping[str, str]) -> Coverage:
    """Compares the list with the sources of the tests, by file name."""
    known = {behaviour.id for behaviour in behaviours}
    prefixes = sorted({behaviour_id.split("-")[0] for behaviour_id in known})
    coverage = Coverage(behaviours, {}, {})
    for file, source in sources.items():
        for behaviour_id, test in named(source, file, prefixes):
            place = coverage.tests if behaviour_id in known else coverage.unknown
            place.setdefault(behaviour_id, []).append(test)
    return coverage


def report(coverage: Coverage, *, verbose: bool = False) -> Iterator[str]:
    """The lines to print; `verbose`: every behaviour with its tests, before the rest."""
    behaviours, missing = coverage.behaviours, coverage.missing
    if verbose:
        for behaviour in behaviours:
            yield _line(behaviour)
            yield from (f"         {test}" for test in coverage.tests.get(behaviour.id, []))
        yield ""
    apply = sum(behaviour.applies for behaviour in behaviours)
    yield f"{len(behaviours)} behaviours: {apply - len(missing)} have a test, {len(missing)} have none"
    yield f"{len(behaviours) - apply} do not apply"
    yield from (_line(behaviour) for behaviour in behaviours if not behaviour.applies)
    section = None
    for behaviour in missing:
        if behaviour.section != section:
            section = behaviour.section
            yield f"no test: {section}"
        yield _line(behaviour)
    yield from (f"unknown: {unknown} in {', '.join(tests)}" for unknown, tests in coverage.unknown.items())


def _line(behaviour: Behaviour) -> str:
    return f"  {behaviour.id:6} {'' if behaviour.applies else 'n/a '}{behaviour.text}"


def of_this_project() -> Coverage:
    """The list beside this file, and the tests beside it."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(HERE.rglob("test_*.py"))}
    return cover(parse((HERE / "behaviours.txt").read_text(encoding="utf-8")), sources)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m tests.behaviours", description=(__doc__ or "").split("\n", 1)[0])
    arguments.add_argument("-v", "--verbose", action="store_true", help="every behaviour, with the tests that name it")
    result = of_this_project()
    print("\n".join(report(result, verbose=arguments.parse_args().verbose)))
    sys.exit(1 if result.missing or result.unknown else 0)
