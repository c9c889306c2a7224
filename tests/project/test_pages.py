"""README and the pages say what is so: examples run as printed, and what they name exists, with the defaults that they give."""

from __future__ import annotations

import asyncio
import inspect
import json
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import pytest

from beequeue import Job, Queue, QueueSettings, linear_backoff
from beequeue.fsck.findings import KINDS
from beequeue.settings import Backoff, Duration, QueueOptions
from config import Config
from harness import original
from harness.install import NotInstalled
from tests import ROOT
from tests.conftest import MakeQueue, skip
from tests.faults.scenarios import FAULTS
from tests.faults.test_proxy import FRONTS
from tests.harness.test_harness_faults import FAULTS as HARNESS_FAULTS
from tests.pages import PAGES, anchors, code_lines, section, tables
from tests.public import public

README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())

EXAMPLES = [
    pytest.param(example, id=f"{page} {number}")
    for page, text in PAGES.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
]


# --- form ------------------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_no_code_is_wider_than_a_window(page: str) -> None:
    assert [line for line in code_lines(PAGES[page]) if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[page]):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (ROOT / target).exists(), f"{page} links to {path}"
        if anchor:
            assert anchor in anchors(PAGES[target]), f"{page} links to {path}#{anchor}"


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", README))
    assert {*PAGES} - linked == {"README.md", *(page for page in PAGES if page.startswith("docs/reference/"))}


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES)
async def test_an_example_runs_as_printed(example: str, url: str, name: str, make_queue: MakeQueue) -> None:
    """on our server, and on a queue of its own"""
    assert "redis://127.0.0.1:6379" in example
    assert 'Queue("add"' in example
    queue = make_queue(auto_connect="sync" in example)  # its keys are deleted at the end
    if "sync" in example:
        queue.process(lambda job: job.data["x"] + job.data["y"])
    example = example.replace("redis://127.0.0.1:6379", url).replace('Queue("add"', f'Queue("{name}"')
    command = [sys.executable, "-W", "error", "-c", example]
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.stdout, ended.stderr) == ("5\n", "")


async def test_the_producer_on_node_runs_as_printed(url: str, make_queue: MakeQueue) -> None:
    """with a worker of ours"""
    (example,) = re.findall(r"```js\n(.*?)```", PAGES["docs/library.md"], re.DOTALL)
    try:
        node = await asyncio.to_thread(original.install)
    except NotInstalled as reason:
        skip(str(reason))
        raise
    assert "'redis://127.0.0.1:6379'" in example
    assert "Queue('add'" in example
    queue = make_queue()
    queue.process(lambda job: job.data["x"] + job.data["y"])
    server = json.dumps({"path": urlsplit(url).path} if url.startswith("unix:") else url)
    example = example.replace("'redis://127.0.0.1:6379'", server).replace("Queue('add'", f"Queue('{queue.name}'")
    command = [node, "-e", example]
    run = partial(subprocess.run, cwd=original.DIRECTORY, capture_output=True, text=True, timeout=30, check=False)
    ended = await asyncio.to_thread(run, command)
    assert (ended.stdout, ended.stderr) == ("5\n", "")


def test_readmes_example_is_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_table_of_names_has_them_all() -> None:
    rows = tables(section("docs/library.md", "bee-queue's names"), "bee-queue")
    ours = " ".join(row[1] + " " + row[2] for row in rows)
    for owner in (Queue, Job):
        for name in public(owner):
            assert re.search(rf"\b{name}\b", ours), f"{owner.__name__}.{name} is not in the table"
    calls = " ".join(row[1] for row in rows if "queue." in row[1])
    for name in re.findall(r"(?:^|`)(?:await )?(?:queue\.)?(\w+)\(", calls):
        assert hasattr(Queue, name), name
    for name in re.findall(r"\bjob\.(\w+)", ours):
        assert hasattr(Job, name) or name in Job.__slots__, name


def test_the_table_of_events_has_them_all() -> None:
    emitted = set()
    for source in (ROOT / "beequeue").rglob("*.py"):
        emitted |= set(re.findall(r'emit(?:\(|, )"([a-z :]+)"', source.read_text()))
    rows = tables(section("docs/library.md", "Events"), "event")
    listed = {event for row in rows for event in re.findall(r"`([^`]+)`", row[0])}
    assert {"ready", "stalled", "raised jobs", "failed:fatal"} <= emitted  # each of another folder
    assert emitted - {"job "} <= listed


def test_the_modules_of_the_library_are_on_the_map() -> None:
    rows = tables(section("docs/architecture.md", "The library"), "module")
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    package = ROOT / "beequeue"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert listed == modules | {f"{path.relative_to(package).as_posix()}/" for path in package.rglob("lua")}


def test_the_three_ways_name_functions() -> None:
    """where a step says that something happens, it is defined"""
    rows = tables(section("docs/architecture.md", "Three ways through"), "step")
    assert len(rows) > 10
    for _, where, _ in rows:
        module, *functions = re.findall(r"`([^`]+)`", where)
        source = (ROOT / "beequeue" / module).read_text()
        assert functions
        for name in functions:
            assert re.search(rf"^ *(async )?def {name.split('.')[-1]}\(", source, re.MULTILINE), f"{module}: {name}"


def test_the_glossary_is_short() -> None:
    assert len(tables(section("docs/architecture.md", "Glossary"), "word")) <= 20


def test_the_files_that_pages_name_exist() -> None:
    named = set(re.findall(r"`((?:beequeue|bench|docs|harness|tests|\.ci)/[\w./-]*)`", EVERYTHING))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    |\t)make ([a-z][\w-]+)", EVERYTHING, re.MULTILINE)) <= targets


# --- settings, variables, options ------------------------------------------------------------------------------------


def test_the_variables_have_these_defaults() -> None:
    rows = {name.strip("`"): default.strip("`") for name, default, _ in tables(section("README.md", "Variables"), "variable")}
    defaults = Config()
    assert {name.lower() for name in rows} == {*Config.__dataclass_fields__}
    for name, shown in rows.items():
        default = getattr(defaults, name.lower())
        assert shown == (str(default).lower() if isinstance(default, bool) else str(default)), name


def in_camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


TYPES = {bool: "bool", int: "int", str: "str", Duration: "ms", Backoff: "function"}
OUR_OWN = list(QueueSettings.__dataclass_fields__)[-5:]


def test_the_settings_are_all_there() -> None:
    """with type, default and bee-queue's name"""
    rows = {
        row[0].split("`")[1]: [*row[0].split("<br>")[1:], "", *row[1:]] for row in tables(PAGES["docs/settings.md"], "setting")
    }
    hints = get_type_hints(QueueOptions)
    assert {*rows} == {*hints} == {*QueueSettings.__dataclass_fields__}
    for name, (upstream, *_, kind, default, meaning) in rows.items():
        value = QueueSettings.__dataclass_fields__[name].default
        assert default == f"`{'linear_backoff' if value is linear_backoff else value}`", name
        alternatives = [hints[name]] if hints[name] in TYPES else [a for a in hints[name].__args__ if a is not type(None)]
        expected = "ms" if timedelta_in(alternatives) else TYPES[alternatives[0]]
        expected = "bytes" if name.endswith("_bytes") else expected
        assert kind == expected + (" or None" if value is None else ""), name
        assert upstream == ("" if name in OUR_OWN else f"`{in_camel_case(name)}`"), name
        assert meaning


def timedelta_in(alternatives: list[Any]) -> bool:
    return any(getattr(each, "__name__", "") == "timedelta" for each in alternatives)


def test_the_setters_of_a_job_are_all_there() -> None:
    rows = [row[0] for row in tables(PAGES["docs/settings.md"], "setter")]
    methods = {name: method for name in public(Job) if inspect.isfunction(method := getattr(Job, name))}
    setters = {
        name
        for name, method in methods.items()
        if not inspect.iscoroutinefunction(method) and inspect.signature(method).return_annotation == "Job"
    }
    assert {row.split("(")[0].removeprefix("`job.") for row in rows} == setters > {"retries"}


@pytest.mark.parametrize("row", tables(PAGES["docs/settings.md"], "call"), ids=lambda row: row[0].split("`")[1])
def test_the_arguments_of_calls_have_these_defaults(row: list[str]) -> None:
    owner, name, arguments = re.match(r"`(queue|job)\.(\w+)\((.*)\)`", row[0]).groups()  # type: ignore[union-attr]
    call: Callable[..., Any] = getattr({"queue": Queue, "job": Job}[owner], name)
    parameters = inspect.signature(call).parameters
    assert {*arguments.split(", ")} == {*parameters} - {"self"}
    defaults = [parameter.default for parameter in parameters.values() if parameter.default is not inspect.Parameter.empty]
    assert row[2] == ", ".join(f"`{default}`" for default in defaults)


@pytest.mark.parametrize("command", ["worker", "check"])
def test_the_options_of_the_command_line_are_all_there(command: str) -> None:
    told = subprocess.run([sys.executable, "-m", "beequeue", command, "--help"], cwd=ROOT, capture_output=True, text=True)
    options = set(re.findall(r"--[a-z][a-z-]+", told.stdout)) - {"--help"}
    assert "--redis" in options
    assert {option for option in options if f"`{option}" not in PAGES["docs/operations.md"]} == set()


def test_the_findings_of_a_check_are_all_there() -> None:
    rows = tables(section("docs/operations.md", "Check and repair a queue"), "finding")
    assert [row[0] for row in rows] == [*KINDS]


# --- faults ----------------------------------------------------------------------------------------------------------

PARAMETERS: dict[str, Collection[str]] = {
    "test_alone": FAULTS,
    "test_it_lives_on": HARNESS_FAULTS,
    "test_all_work_again": FRONTS,
}


def promises() -> list[tuple[str, str, str | None]]:
    """The tests that the promises name: module, function, parameter."""
    found = [re.findall(r"`(\w+\.py)::(\w+)(?:\[([\w-]+)\])?`", row[-1]) for row in tables(PAGES["docs/faults.md"], "fault")]
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
