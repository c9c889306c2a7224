"""Which faults the tests do not notice: `make mutants`, MODULES="events settings" for some of them.

Each mutant is one module without I/O with one fault put in: cosmic-ray's operators, and a statement left out. It runs in a
copy of the project, against the test files that see the module. One that no test fails on is printed, unless
`mutants.txt` says why nobody could notice it. Ends with 1 when a module has fewer than 95 % noticed.
"""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

from harness.server import redis_url

ROOT = Path(__file__).parent.parent
MODULES = {
    "decisions": "test_decisions",
    "settings": "test_settings",
    "events": "test_events test_job_events",
    "saving": "test_jobs test_queue test_lookup test_connection",
    "tracker": "test_job_events test_race test_lookup test_connection test_orders",
    "fsck": "test_fsck",
}
"""The modules, and the tests that see each: the soonest to notice first."""
OPERATORS = [
    "core/AddNot",
    "core/ExceptionReplacer",
    "core/NumberReplacer",
    "core/ReplaceAndWithOr",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Div_Mul",
    "core/ReplaceBinaryOperator_FloorDiv_Mul",
    "core/ReplaceBinaryOperator_Mul_Div",
    "core/ReplaceBinaryOperator_Pow_Mul",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_GtE_Gt",
    "core/ReplaceComparisonOperator_Gt_GtE",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_LtE_Lt",
    "core/ReplaceComparisonOperator_Lt_LtE",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceUnaryOperator_USub_UAdd",
    "core/ZeroIterationForLoop",
]
NEEDED = 0.95
LONGEST_S = 300
"""How long the tests of one mutant may take; after that it is noticed."""
PRELOADED = "hiredis hypothesis orjson pytest_asyncio pytest_timeout redis.asyncio xdist.plugin".split()  # noqa: SIM905
OPTIONS = ["-qx", "--timeout", "20", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Mutant(NamedTuple):
    """A module's text with one fault, and the line before and after."""

    text: str
    line: int
    change: str


def mutants(text: str) -> Iterator[Mutant]:
    """All of a module, those that do not differ from it left out."""
    for name in OPERATORS:
        operator = get_operator(name)()
        places = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(get_ast(text)))
        for place in range(places):
            try:
                mutated = mutate_code(text, operator, place)
            except AttributeError:  # `except module.Error`, which cosmic-ray cannot replace
                continue
            if mutated is None or mutated == text:
                continue
            mutant = Mutant(mutated, *difference(text, mutated))
            if " /, " not in mutant.change:  # the bare * of a signature, taken for a product
                yield mutant
    yield from without_a_statement(text)


def difference(text: str, mutated: str) -> tuple[int, str]:
    for number, (before, after) in enumerate(zip(text.splitlines(), mutated.splitlines(), strict=False), 1):
        if before != after:
            return number, f"{before.strip()} → {after.strip()}"
    raise AssertionError("no line differs")


def without_a_statement(text: str) -> Iterator[Mutant]:
    """Each statement that does something becomes `pass`."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        is_set = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
        if is_call or is_set or isinstance(node, ast.AugAssign | ast.Delete | ast.Raise | ast.Return):
            assert isinstance(node, ast.stmt)
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            before, after = lines[first][: node.col_offset], lines[last - 1][node.end_col_offset :]
            mutated = "".join([*lines[:first], before, "pass", after, *lines[last:]])
            yield Mutant(mutated, node.lineno, f"{lines[first].strip()} → pass")


class Copy:
    """The project, to put a fault in."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        ignore = shutil.ignore_patterns("__pycache__", "node_modules", ".*", "*.egg-info", "build")
        shutil.copytree(ROOT, directory, ignore=ignore)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.mutants import serve; serve()"],
            cwd=directory,
            env={**os.environ, "REDIS_URL": url, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def passes(self, module: str, text: str) -> bool:
        """Whether the module's tests pass with this text."""
        file = self._directory / "beequeue" / f"{module}.py"
        whole = file.read_text()
        file.write_text(text)
        try:
            return self._run(module)
        finally:
            file.write_text(whole)

    def _run(self, module: str) -> bool:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*(f"tests/{name}.py" for name in MODULES[module].split()), file=self._process.stdin, flush=True)
        return self._process.stdout.readline() == "0\n"

    def close(self) -> None:
        """Ends its process."""
        self._process.communicate()


def serve() -> None:
    """In a copy: runs the test files of each line of stdin, in a fork that has the imports; prints its exit code."""
    for package in PRELOADED:
        importlib.import_module(package)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nothing, number)
            os._exit(pytest.main([*OPTIONS, *line.split()]))
        deadline, ended = time.monotonic() + LONGEST_S, 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(status), flush=True)


def explained() -> set[tuple[str, str]]:
    """Module and change of the mutants that nobody could notice; `mutants.txt` gives a reason above each group."""
    lines = (ROOT / "tests" / "mutants.txt").read_text().splitlines()
    return {(line.split(": ", 1)[0], line.split(": ", 1)[1]) for line in lines if line and not line.startswith("#")}


def judge(module: str, copies: SimpleQueue[Copy], pool: ThreadPoolExecutor) -> bool:
    """Runs a module's mutants and says what they show."""
    text = (ROOT / "beequeue" / f"{module}.py").read_text()

    def survives(mutated: str) -> bool:
        copy = copies.get()
        try:
            return copy.passes(module, mutated)
        finally:
            copies.put(copy)

    if not survives(text):
        sys.exit(f"{module}: its tests fail without any fault")
    made = list(mutants(text))
    known = explained()
    equivalent = [mutant for mutant in made if (module, mutant.change) in known]
    asked = [mutant for mutant in made if mutant not in equivalent]
    survived = []
    for mutant, alive in zip(asked, pool.map(lambda mutant: survives(mutant.text), asked), strict=True):
        if alive:
            survived.append(mutant)
            print(f"{module}:{mutant.line}: {mutant.change}", flush=True)
    noticed = len(asked) - len(survived)
    print(
        f"{module}: {noticed} of {len(asked)} noticed, {noticed / len(asked):.1%}; {len(equivalent)} more equivalent",
        flush=True,
    )
    return noticed >= NEEDED * len(asked)


def main() -> int:
    chosen = os.environ.get("MODULES", "").split() or list(MODULES)
    for module in chosen:
        if module not in MODULES:
            sys.exit(f"MODULES must name some of {', '.join(MODULES)}; not {module!r}")
    processes = int(os.environ.get("PROCESSES") or os.cpu_count() or 1)
    with (
        redis_url(os.environ) as url,
        tempfile.TemporaryDirectory(prefix="mutants") as directory,
        ThreadPoolExecutor(processes) as pool,
    ):
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(processes):
            copies.put(Copy(Path(directory) / str(number), url))
        enough = [judge(module, copies, pool) for module in chosen]
        while not copies.empty():
            copies.get().close()
        return 0 if all(enough) else 1


if __name__ == "__main__":
    sys.exit(main())
