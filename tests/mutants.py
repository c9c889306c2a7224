"""Finds the faults that the tests do not notice: `make mutants`, or MODULES="events settings" for some modules.

A mutant is one module with one fault: cosmic-ray's operators make them, and one more that leaves a statement out. It runs in a
copy of the project, against the tests of the module. A mutant that passes all of them is printed, unless `mutants.txt` explains
why no test can notice it. The exit code is 1 when fewer than 95 % of a module's mutants are noticed.

`.mutants` remembers each verdict as long as the library and its tests stay the same, so an interrupted run continues.
SAMPLE=80 tries that many mutants of each module, the same ones each time. PROCESSES sets how many run at once; the default is
one for each core.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import random
import re
import resource
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

from tests import ROOT

MODULES = {
    "worker.outcome": "worker/test_outcome",
    "settings": "test_settings",
    "events": "test_events producer/test_job_events wire/test_hostile::test_a_failure_with_a_deep_message_cuts_nothing",
    "wire.node_json": "wire/test_node_json",
    "producer.saver": "producer/test_saver producer/test_jobs producer/test_calls"
    " test_sync::test_a_save_with_a_time_out_while_redis_is_down"
    " test_sync::test_a_save_with_a_time_out_while_redis_is_silent wire/test_connection test_queue"
    " wire/test_alive::test_a_refused_save_that_is_cancelled_is_not_made"
    " wire/test_alive::test_a_bulk_save_that_is_cancelled_is_not_made",
    "producer.guard": "producer/test_guard producer/test_tracker"
    " wire/test_sizes::test_a_job_whose_result_is_too_large_is_looked_up"
    " wire/test_sizes::test_messages_that_cannot_be_read_are_counted",
    "producer.tracker": "producer/test_tracker producer/test_orders producer/test_job_events producer/test_race"
    " producer/test_kept wire/test_hostile producer/test_lookup wire/test_connection"
    " wire/test_sizes::test_a_job_whose_result_is_too_large_is_looked_up",
    "fsck.findings": "fsck/test_fsck",
}
"""The modules, and the test files or tests of each: first those that notice most faults soonest."""
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
LONGEST_S, LONGEST = 30, 5
"""The tests of one mutant may take 30 s and five times as long as without a fault; past that the mutant counts as noticed."""
MEMORY_BYTES = 2**31
"""How much memory the tests of one mutant may use."""
TRIES = 3
SEED = 189
JOURNAL = ROOT / ".mutants"
PRELOADED = "hiredis hypothesis orjson pytest_asyncio pytest_timeout redis.asyncio xdist.plugin".split()  # noqa: SIM905
OPTIONS = ["-qx", "--assert", "plain", "--timeout", "8", "-p", "no:cacheprovider"]


class Mutant(NamedTuple):
    """A module's text with one fault; the number of the faulty line, and the line before and after."""

    text: str
    line: int
    change: str


def mutants(text: str) -> Iterator[Mutant]:
    """Yields all mutants of a module that differ from it."""
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
            # cosmic-ray replaces both names of `asyncio.CancelledError` and drops the dot
            mutated = re.sub(r"\w*(CosmicRayTestingException)\w*", r"\1", mutated)
            mutant = Mutant(mutated, *difference(text, mutated))
            if " /, " not in mutant.change:  # cosmic-ray takes the bare * of a signature for a product
                yield mutant
    yield from without_a_statement(text)


def difference(text: str, mutated: str) -> tuple[int, str]:
    for number, (before, after) in enumerate(zip(text.splitlines(), mutated.splitlines(), strict=False), 1):
        if before != after:
            return number, f"{before.strip()} → {after.strip()}"
    raise AssertionError("no line differs")


def without_a_statement(text: str) -> Iterator[Mutant]:
    """Yields a mutant for each statement with an effect, which becomes `pass`."""
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
    """A copy of the project to put faults into, and a process that runs tests there."""

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
            start_new_session=True,  # Ctrl-C must not look like a failed test
        )

    def passes(self, module: str, text: str, longest_s: float) -> bool:
        """Whether the module's tests pass in time with this text."""
        file = self._directory / source_of(module)
        whole = file.read_text()
        file.write_text(text)
        try:
            return self._run(longest_s, tests_of(module))
        finally:
            file.write_text(whole)

    def _run(self, longest_s: float, tests: list[str]) -> bool:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([longest_s, tests]), file=self._process.stdin, flush=True)
        code = self._process.stdout.readline()
        assert code, "a copy has ended"
        return code == "0\n"

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def tests_of(module: str) -> list[str]:
    """Pytest's arguments for a module."""
    return [re.sub(r"^([\w/]+)", r"tests/\1.py", name) for name in MODULES[module].split()]


def source_of(module: str) -> Path:
    """A module's file, relative to the project."""
    return Path("beequeue", *module.split(".")).with_suffix(".py")


def serve() -> None:
    """Runs in a copy: for each line of stdin, runs its tests in a fork that has the imports; prints 0 if they pass.

    A failed test must fail once more, alone; otherwise all tests start again. On a busy machine one may fail by chance.
    """
    for package in PRELOADED:
        importlib.import_module(package)
    assert not {"beequeue", "harness"} & sys.modules.keys()  # a fork would not import the fault
    for line in sys.stdin:
        longest_s, tests = json.loads(line)
        for _ in range(TRIES):
            code, failed = run_forked(longest_s, tests)
            if code == 0 or not failed or run_forked(longest_s, [failed])[0] != 0:
                break
            code = 0
        print(code, flush=True)


def run_forked(longest_s: float, tests: list[str]) -> tuple[int, str]:
    """Returns pytest's exit code, negative when the time was up, and the test that failed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        os._exit(pytest.main([*OPTIONS, *tests], plugins=[FirstFailure(writing)]))
    os.close(writing)
    deadline, ended = time.monotonic() + longest_s, 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    os.set_blocking(reading, False)  # a process that the tests started may still hold the other end
    with os.fdopen(reading, "rb", buffering=0) as failed:
        return os.waitstatus_to_exitcode(status), (failed.read(4096) or b"").decode()


class FirstFailure:
    """A pytest plugin that writes the first failed test to a file."""

    def __init__(self, file: int) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._file, report.nodeid.encode())
            self._file = os.open(os.devnull, os.O_WRONLY)


def explained() -> set[tuple[str, str]]:
    """Module and change of the mutants that no test can notice; `mutants.txt` gives a reason above each group."""
    lines = (ROOT / "tests" / "mutants.txt").read_text().splitlines()
    return {(line.split(": ", 1)[0], line.split(": ", 1)[1]) for line in lines if line and not line.startswith("#")}


class Journal:
    """The verdicts so far, by a digest of the mutant, the library and the tests."""

    def __init__(self) -> None:
        files = sorted(
            [*(ROOT / "beequeue").rglob("*.py"), *(ROOT / "beequeue").rglob("*.lua"), *(ROOT / "tests").rglob("*.py")]
        )
        self._base = hashlib.sha256(b"".join(file.read_bytes() for file in files if file != Path(__file__)))
        lines = JOURNAL.read_text().splitlines() if JOURNAL.exists() else []
        self._survives = {key: verdict == "survives" for key, verdict in (line.split() for line in lines)}

    def _key(self, module: str, text: str) -> str:
        digest = self._base.copy()
        digest.update(f"{MODULES[module]}\n{text}".encode())
        return digest.hexdigest()

    def survives(self, module: str, text: str) -> bool | None:
        """Whether a mutant survives; None when it has not been tried."""
        return self._survives.get(self._key(module, text))

    def add(self, module: str, text: str, survives: bool) -> None:
        with JOURNAL.open("a") as file:
            file.write(f"{self._key(module, text)} {'survives' if survives else 'noticed'}\n")


class Judge:
    """Runs mutants in the copies and counts the survivors."""

    def __init__(self, copies: SimpleQueue[Copy], pool: ThreadPoolExecutor) -> None:
        self._copies = copies
        self._pool = pool
        self._journal = Journal()

    def _passes(self, module: str, text: str, longest_s: float) -> bool:
        copy = self._copies.get()
        try:
            return copy.passes(module, text, longest_s)
        finally:
            self._copies.put(copy)

    def _longest_s(self, module: str, text: str) -> float:
        """How long a mutant may take. Ends the program when the tests fail without a fault, or pass with every fault."""
        began_at = time.monotonic()
        if not self._passes(module, text, 600):
            sys.exit(f"{module}: its tests fail without any fault")
        longest_s = LONGEST_S + LONGEST * (time.monotonic() - began_at)
        if self._passes(module, "raise SystemExit('a fault')\n", longest_s):
            sys.exit(f"{module}: its tests do not see the copy in which the faults are")
        return longest_s

    def _survives(self, module: str, mutant: Mutant, longest_s: float) -> bool:
        known = self._journal.survives(module, mutant.text)
        if known is not None:
            return known
        survives = self._passes(module, mutant.text, longest_s)
        self._journal.add(module, mutant.text, survives)
        return survives

    def is_enough(self, module: str, sample: int | None) -> bool:
        """Tries the mutants of a module; returns whether enough of them are noticed."""
        text = (ROOT / source_of(module)).read_text()
        longest_s = self._longest_s(module, text)
        made = list(mutants(text))
        known = {change for of, change in explained() if of == module}
        for change in known - {mutant.change for mutant in made}:
            sys.exit(f"tests/mutants.txt explains what is no mutant of {module}: {change}")
        asked = [mutant for mutant in made if mutant.change not in known]
        equivalent = len(made) - len(asked)
        if sample is not None and sample < len(asked):
            asked = [asked[index] for index in sorted(random.Random(SEED).sample(range(len(asked)), sample))]
        survived = 0
        answers = self._pool.map(lambda mutant: self._survives(module, mutant, longest_s), asked)
        for mutant, survives in zip(asked, answers, strict=True):
            if survives:
                survived += 1
                print(f"{module}:{mutant.line}: {mutant.change}", flush=True)
        noticed = len(asked) - survived
        enough = noticed >= NEEDED * len(asked)
        of = "" if len(asked) + equivalent == len(made) else f" (a sample of {len(made) - equivalent})"
        print(
            f"{module}: {noticed} of {len(asked)}{of} noticed, {noticed / len(asked):.1%}"
            f"{'' if enough else f', fewer than {NEEDED:.0%}'}; {equivalent} more equivalent",
            flush=True,
        )
        return enough


def main() -> int:
    from harness.server import redis_url  # not in the copies' processes: it imports the library

    chosen = os.environ.get("MODULES", "").split() or list(MODULES)
    for module in chosen:
        if module not in MODULES:
            sys.exit(f"MODULES must name some of {', '.join(MODULES)}; not {module!r}")
    processes = int(os.environ.get("PROCESSES") or os.cpu_count() or 1)
    sample = int(os.environ.get("SAMPLE") or 0) or None
    os.nice(19)
    with (
        redis_url(os.environ) as url,
        tempfile.TemporaryDirectory(prefix="mutants") as directory,
        ThreadPoolExecutor(processes) as pool,
    ):
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(processes):
            copies.put(Copy(Path(directory) / str(number), url))
        judge = Judge(copies, pool)
        enough = [judge.is_enough(module, sample) for module in chosen]
        while not copies.empty():
            copies.get().close()
        return 0 if all(enough) else 1


if __name__ == "__main__":
    sys.exit(main())
