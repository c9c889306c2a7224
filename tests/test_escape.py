"""Text from others controls no terminal and starts no line, wherever the library, the command line or the harness shows it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import beequeue.errors
import config
from beequeue import BeeQueueError, JobFailed
from beequeue.command.arguments import Parser
from beequeue.command.check import as_lines
from beequeue.escape import OneLine, escape, one_line
from beequeue.fsck.findings import Finding, Report
from harness import program
from harness.member import Member
from tests import ROOT
from tests.conftest import MakeQueue, Seen
from tests.observe import soon

HOSTILE = "a\x1b[2Jb\nc\rd\x00e\x7ff\x9bg\u2028h\u2029i\u202ej\u2066k\u200bl\x85m\ttab"
ENCODABLE = "\x1b[2J\n\u2028\u202e\x9b"


def assert_safe(text: str) -> None:
    """Checks that `text` is printable, and that no line of it starts with a part of the hostile text."""
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith(("c\\r", "[2J", "\\u2028"))


def test_escape() -> None:
    assert escape(HOSTILE).isprintable()
    assert escape("é ü 漢字 😀 \\n") == "é ü 漢字 😀 \\n"
    assert escape("a\nb\x1b\u2028\ud800") == "a\\nb\\x1b\\u2028\\ud800"
    assert escape(5) == "5"


KINDS = [kind for kind in vars(beequeue.errors).values() if isinstance(kind, type) and issubclass(kind, BeeQueueError)]
AS_IS = (JobFailed, beequeue.errors.JobTimeout, beequeue.errors.JobStalled)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "__init__" not in vars(kind)])
def test_the_text_of_an_error(kind: type[BeeQueueError]) -> None:
    """one line, except that the error a job failed with keeps its worker's text"""
    error = kind(HOSTILE)
    assert str(error) == (HOSTILE if kind in AS_IS else escape(HOSTILE))
    assert error.args == (HOSTILE,)
    lost = beequeue.errors.ConnectionLost(HOSTILE, maybe_applied=True)
    assert str(lost) == str(beequeue.errors.CommandError(HOSTILE)) == escape(HOSTILE)


def _raise_two() -> None:
    try:
        raise KeyError(HOSTILE)
    except KeyError as error:
        raise JobFailed(HOSTILE) from error


LOGGED: dict[str, Callable[[logging.Logger], object]] = {
    "arguments": lambda log: log.warning("%s of %r: %d", HOSTILE, HOSTILE, 5),
    "a dict": lambda log: log.warning("%(id)s", {"id": HOSTILE}),
    "the message": lambda log: log.warning(f"{HOSTILE} 100%"),
    "an error": lambda log: log.warning("%s", JobFailed(HOSTILE)),
    "a traceback": lambda log: _logged_with_traceback(log),
}


def _logged_with_traceback(log: logging.Logger) -> None:
    try:
        _raise_two()
    except JobFailed:
        log.exception("queue %s", HOSTILE)


@pytest.mark.parametrize("case", LOGGED)
def test_log_records_of_the_library(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """safe by themselves, whichever handler prints them"""
    LOGGED[case](logging.getLogger("beequeue"))
    assert caplog.records
    for record in caplog.records:
        assert_safe(logging.Formatter("%(levelname)s %(message)s").format(record))
        assert "\\x1b[2Jb\\nc" in logging.Formatter().format(record)
        assert bool(record.exc_info) == (case == "a traceback")
    if case == "a traceback":
        assert "_raise_two" in str(caplog.records[0].exc_text)
        assert "KeyError" in str(caplog.records[0].exc_text)


def test_a_log_call_with_wrong_arguments_is_left_to_the_handler() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "%d", ("x",), None)
    assert OneLine().filter(record)


async def test_the_log_of_a_queue(make_queue: MakeQueue, name: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """with a hostile id, message and payload, and no listener of `error`"""
    queue = beequeue.Queue(f"{name}{ENCODABLE}", url, reconnect=soon)
    queue.on("job succeeded", lambda job_id, result: (_ for _ in ()).throw(RuntimeError(f"{job_id} {result}")))
    await queue.ready()
    ended = Seen()
    queue.on("job failed", ended)
    for event, data in (("succeeded", ENCODABLE), ("failed", ENCODABLE)):
        message = json.dumps({"id": ENCODABLE, "event": event, "data": data})
        await queue.client.connection.call("PUBLISH", queue.to_key("events"), message)
        await queue.client.connection.call("PUBLISH", queue.to_key("events"), ENCODABLE)
    await ended.reaches(1)
    assert ended.calls[0][0] == ENCODABLE
    assert str(ended.calls[0][1]) == ENCODABLE  # text for programs stays as it was written
    queue._host.report(beequeue.errors.LateFinish(f"job {ENCODABLE}"))
    await queue.destroy()
    await queue.close()
    assert len(caplog.records) >= 4
    for record in caplog.records:
        assert_safe(logging.Formatter("%(message)s").format(record))


# --- the command line -------------------------------------------------------------------------------------------------

APP = """
async def work(job):
    raise ValueError(job.data)
"""


async def test_the_output_of_a_worker(make_queue: MakeQueue, name: str, url: str, tmp_path: Path) -> None:
    """`-v` prints a job's id and its message"""
    (tmp_path / "app.py").write_text(APP)
    queue = make_queue()
    ended = Seen()
    queue.on("job failed", ended)
    await queue.ready()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "beequeue", "worker", "app:work", "--queue", name, "--redis", url, "-v",
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await queue.create_job(ENCODABLE).set_id(f"id{ENCODABLE}").save()
        await ended.reaches(1, 20)
    finally:
        process.terminate()
        _, said = await process.communicate()
    assert process.returncode == 0
    assert "failed after" in said.decode()
    assert "id\\x1b[2J" in said.decode()
    assert_safe(said.decode())


def test_the_output_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert_safe(one_line(HOSTILE))
    with pytest.raises(SystemExit):
        Parser(prog="p").error(HOSTILE)
    assert_safe(capsys.readouterr().err)
    finding = Finding("ghost", HOSTILE, ("active",), ("active",))
    report = Report(exists=True, jobs=1, findings=[finding])
    for line in (*as_lines(HOSTILE, None, report), *as_lines(HOSTILE, report, report)):
        assert_safe(line)


# --- the harness ------------------------------------------------------------------------------------------------------


def test_the_output_of_the_harness(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        config.fail(HOSTILE)
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    monkeypatch.setattr(logging.Logger, "root", logging.root)
    program.log_to_stderr()
    logging.root.warning("worker: job %s had lost its worker", HOSTILE)
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert_safe(said)


@pytest.mark.parametrize("member", ["client", "worker_1"])
async def test_output_that_the_harness_passes_on(
    member: str, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """from a member that prints control characters"""
    from harness import local

    class Printing(Member):
        def __init__(self, name: str, command: Any) -> None:
            code = f"import sys; print({HOSTILE!r}, file=sys.stderr); print({HOSTILE!r})"
            super().__init__(name, [sys.executable, "-c", code])

    monkeypatch.setattr(local, "Member", Printing)
    await local.run(1, {**os.environ, "REDIS_URL": url, "PYTHONIOENCODING": "utf-8"})
    out, err = capsys.readouterr()
    assert "\\x1b[2J" in out + err
    for line in (out + err).split("\n"):
        assert line.isprintable()
