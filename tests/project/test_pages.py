"""README says what is so: its example runs as printed, and the files, targets and variables that it names exist."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Collection

from beequeue import Job, Queue
from config import Config
from tests import ROOT
from tests.conftest import MakeQueue
from tests.faults.scenarios import FAULTS
from tests.faults.test_proxy import FRONTS
from tests.harness.test_harness_faults import FAULTS as HARNESS_FAULTS
from tests.project.test_example import public

README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def as_program(example: str, url: str, name: str) -> list[str]:
    """What runs an example, on our server and a queue of its own."""
    assert "redis://127.0.0.1:6379" in example
    assert 'Queue("add"' in example
    example = example.replace("redis://127.0.0.1:6379", url).replace('Queue("add"', f'Queue("{name}"')
    return [sys.executable, "-W", "error", "-c", example]


async def test_the_example_runs_as_printed(url: str, name: str, make_queue: MakeQueue) -> None:
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 12
    make_queue(auto_connect=False)  # whose keys are deleted at the end
    command = as_program(EXAMPLES[0], url, name)
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.stdout, ended.stderr) == ("5\n", "")


async def test_the_example_without_a_loop_runs_as_printed(url: str, name: str, make_queue: MakeQueue) -> None:
    make_queue().process(lambda job: job.data["x"] + job.data["y"])
    command = as_program(EXAMPLES[1], url, name)
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.stdout, ended.stderr) == ("5\n", "")
    assert len(EXAMPLES) == 2


def table(heading: str, first: str) -> list[list[str]]:
    """The rows of the table below a heading whose first column is called so."""
    section = README.split(heading, 1)[1]
    rows = section[section.index(f"| {first} |") :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_table_of_names_has_them_all() -> None:
    ours = " ".join(row[1] + " " + row[2] for row in table("### bee-queue's names", "bee-queue"))
    for owner in (Queue, Job):
        for name in public(owner):
            assert re.search(rf"\b{name}\b", ours), f"{owner.__name__}.{name} is not in README"
    for name in re.findall(
        r"(?:^|`)(?:await )?(?:queue\.)?(\w+)\(",
        " ".join(row[1] for row in table("### bee-queue's names", "bee-queue") if "queue." in row[1]),
    ):
        assert hasattr(Queue, name), name
    for name in re.findall(r"\bjob\.(\w+)", ours):
        assert hasattr(Job, name) or name in Job.__slots__, name


def test_the_table_of_events_has_them_all() -> None:
    emitted = set()
    for source in (ROOT / "beequeue").glob("*.py"):
        emitted |= set(re.findall(r'emit\((?:self\.emit, )?"([a-z :]+)"', source.read_text()))
    listed = {event for row in table("### bee-queue's names", "event") for event in re.findall(r"`([^`]+)`", row[0])}
    assert emitted - {"job "} <= listed


PARAMETERS: dict[str, Collection[str]] = {
    "test_alone": FAULTS,
    "test_it_lives_on": HARNESS_FAULTS,
    "test_all_work_again": FRONTS,
}


def promises() -> list[tuple[str, str, str | None]]:
    """The tests that the promises name: module, function, parameter."""
    rows = table("### What is promised under which fault", "fault")
    found = [re.findall(r"`(\w+\.py)::(\w+)(?:\[([\w-]+)\])?`", row[-1]) for row in rows]
    assert all(found)
    return [(module, function, parameter or None) for named in found for module, function, parameter in named]


def test_each_promise_names_a_test() -> None:
    for module, function, parameter in promises():
        path = next((ROOT / "tests").rglob(module))
        assert re.search(rf"^(async )?def {function}\(", path.read_text(), re.MULTILINE), function
        if parameter is not None:
            assert parameter in PARAMETERS[function], parameter


def test_each_fault_has_a_promise() -> None:
    all_of_them = {(function, parameter) for function, parameters in PARAMETERS.items() for parameter in parameters}
    assert all_of_them == {(function, parameter) for _, function, parameter in promises() if parameter is not None}


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
