"""`python -m beequeue worker`, as a process: jobs, signals, and messages about wrong arguments."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import beequeue.command.worker
from beequeue import JobFailed
from beequeue.command.arguments import load_handler
from harness.server import Server, find_server, running_server
from tests import ROOT
from tests.conftest import MakeQueue, Seen, until
from tests.observe import clients, freeze, thaw

APP = """
import asyncio, os, time


async def work(job):
    match job.data:
        case "fails":
            raise ValueError("in\\ntwo lines")
        case "fails once" if job.options["retries"]:
            raise RuntimeError
        case "waits":
            await job.report_progress(1)
            while not os.path.exists("go"):
                await asyncio.sleep(0.005)
        case "blocks":
            await job.report_progress(1)
            while True:
                pass
        case "takes long":
            await asyncio.sleep(60)
        case "saves":
            await job.queue.create_job("x").save()
            return len(job.queue.jobs)
    return job.data


def plain(job):
    if job.data == "fails":
        raise ValueError("in\\ntwo lines")
    if job.data == "blocks":
        print("begins")
        open("begun", "w").close()
        time.sleep(60)
    return job.data


class Handlers:
    class Inner:
        @staticmethod
        async def work(job):
            return job.data


number = 3
"""


class Worker:
    """A running `python -m beequeue worker`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.printed = ""

    async def says(self, text: str) -> str:
        """Reads stderr up to a line that contains `text`; returns that line without its time."""
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode().rstrip("\n"):
            self.lines.append(re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line))
            if text in line:
                return self.lines[-1]
        pytest.fail(f"ended without {text!r}: {self.lines}")

    async def end(self, number: signal.Signals | None = None) -> int:
        """Sends a signal, if any, and returns the exit code; `lines` then has all of stderr."""
        if number is not None:
            self.process.send_signal(number)
        out, err = await self.process.communicate()
        self.printed = out.decode()
        self.lines += [re.sub(r"^\S+ \S+,\d{3} ", "", line) for line in err.decode().splitlines()]
        assert self.process.returncode is not None
        return self.process.returncode


Start = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start(name: str, url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts workers in a directory that contains `app.py`, on the test's queue unless the options name another."""
    (tmp_path / "app.py").write_text(APP)
    started: list[Worker] = []

    async def start(*options: str, queue: bool = True, **environment: str) -> Worker:
        arguments = ["worker", *options, *(["--queue", name] if queue else [])]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "beequeue",
            *arguments,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", "REDIS_URL": url, **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(Worker(process))
        return started[-1]

    yield start
    for worker in started:
        if worker.process.returncode is None:
            worker.process.kill()
        await worker.process.communicate()


async def keys_of(redis: Any, prefix: str) -> set[str]:
    return {key.removeprefix(prefix) async for key in redis.scan_iter(f"{prefix}*")}


# --- a worker's life -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["app:work", "app:plain", "app:Handlers.Inner.work"])
async def test_jobs_are_processed(make_queue: MakeQueue, redis: Any, start: Start, name: str, handler: str) -> None:
    worker = await start(handler)
    queue = make_queue(is_worker=False)
    jobs = [queue.create_job(number) for number in range(20)]
    await queue.save_all(jobs)
    assert [await job.result(10_000) for job in jobs] == list(range(20))
    assert await worker.end(signal.SIGTERM) == 0
    where = make_queue.url.removeprefix("unix://").removeprefix("redis://")
    assert worker.lines == [
        f"INFO starting: queue {name} at {where}/0, concurrency 1",
        "INFO connected",
        "INFO closing: waiting up to 5000 ms for 0 running jobs",
        "INFO closed",
    ]
    assert await redis.scard(queue.to_key("succeeded")) == 20
    assert await redis.exists(queue.to_key("active"), queue.to_key("waiting"), queue.to_key("stalling")) == 0


@pytest.mark.parametrize("handler", ["app:work", "app:plain"])
async def test_verbose_logs_each_attempt(make_queue: MakeQueue, start: Start, handler: str) -> None:
    worker = await start(handler, "-v")
    queue = make_queue(is_worker=False)
    first, second = await queue.create_job("x").save(), await queue.create_job("fails").retries(1).save()
    assert await first.result(10_000) == "x"
    with pytest.raises(JobFailed):
        await second.result(10_000)
    assert await worker.end(signal.SIGINT) == 0
    said = [re.sub(r"\d+\.\d ms", "… ms", line) for line in worker.lines]
    assert [line for line in said if line.startswith("INFO job")] == [
        "INFO job 1 succeeded after … ms",
        "INFO job 2 retrying after … ms: in two lines",
        "INFO job 2 failed after … ms: in two lines",
    ]
    assert said[-2:] == ["INFO closing: waiting up to 5000 ms for 0 running jobs", "INFO closed"]


async def test_the_time_that_is_logged(make_queue: MakeQueue, start: Start, tmp_path: Path) -> None:
    """The handler's time only. For a job that timed out it ends at the time-out, even if its thread goes on."""
    queue = make_queue(is_worker=False)
    waiting = queue.create_job("waits")
    waiting.on("progress", begun := Seen())
    await waiting.save()
    worker = await start("app:work", "--verbose", "--concurrency", "2")
    await begun.reaches(1)
    await queue.create_job("takes long").timeout(100).save()
    line = await worker.says("job 2 failed")
    (tmp_path / "go").touch()
    waited = await worker.says("job 1 succeeded")
    assert await worker.end(signal.SIGTERM) == 0
    plain = await start("app:plain", "-v")
    await queue.create_job("blocks").timeout(100).save()
    in_thread = await plain.says("job 3 failed")
    times = [float(re.findall(r"([\d.]+) ms", text)[0]) for text in (line, waited, in_thread)]
    assert line.endswith(": Job 2 timed out (100 ms)")
    assert in_thread.endswith(": Job 3 timed out (100 ms)")
    assert min(times) >= 90
    assert max(times) < 10_000


async def test_the_times_of_jobs_that_never_end_are_dropped(
    make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Attempts that could not be settled must not fill the memory."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(beequeue.command.worker, "SPANS_KEPT", 2)
    queue = make_queue(auto_connect=False)
    handler = beequeue.command.worker.with_log(queue, lambda job: time.sleep(0.01))
    jobs = [queue.create_job().set_id(number) for number in range(4)]
    begin = time.perf_counter()
    for job in jobs:
        handler(job)
    for job in reversed(jobs):
        queue.emit("succeeded", job, None)
    passed_ms = (time.perf_counter() - begin) * 1000
    times = [float(re.findall(r"job \d succeeded after ([\d.]+) ms", message)[0]) for message in caplog.messages]
    assert [took >= 10 for took in times] == [True, True, True, False]
    assert sum(times) < passed_ms  # each until its own end


async def test_concurrency(make_queue: MakeQueue, start: Start, tmp_path: Path) -> None:
    queue = make_queue(is_worker=False)
    begun = Seen()
    queue.on("job progress", lambda job_id, value: begun(job_id))
    await queue.save_all(queue.create_job("waits") for _ in range(4))
    worker = await start("app:work", "--concurrency", "3")
    await begun.reaches(3)
    assert (await queue.check_health()).active == 3
    (tmp_path / "go").touch()
    await begun.reaches(4)
    assert await worker.end(signal.SIGTERM) == 0


async def test_prefix_redis_stall_interval_and_removal(make_queue: MakeQueue, redis: Any, start: Start, url: str) -> None:
    queue = make_queue(is_worker=False, prefix="mine")
    jobs = [queue.create_job("x"), queue.create_job("fails")]
    await queue.save_all(jobs)
    options = ("--prefix", "mine", "--redis", url, "--stall-interval", "60000", "--remove-on-success", "--remove-on-failure")
    worker = await start("app:work", *options, REDIS_URL="redis://127.0.0.1:1")
    assert await jobs[0].result(10_000) == "x"
    with pytest.raises(JobFailed):
        await jobs[1].result(10_000)
    assert 30_000 < await redis.pttl(queue.to_key("stallBlock")) <= 60_000
    assert await worker.end(signal.SIGTERM) == 0
    assert await keys_of(redis, queue.key_prefix) == {"id", "stallBlock"}


async def test_max_stalls(make_queue: MakeQueue, redis: Any, start: Start) -> None:
    """A dead worker has left a job behind that has stalled once before."""
    queue = make_queue(max_stalls=1)
    job = await queue.create_job("x").save()
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    for _ in range(2):
        await redis.delete(queue.to_key("stallBlock"))
        await queue.check_stalled_jobs()
    await redis.lmove(queue.to_key("waiting"), queue.to_key("active"), "RIGHT", "LEFT")
    await redis.sadd(queue.to_key("stalling"), str(job.id))
    await redis.delete(queue.to_key("stallBlock"))
    worker = await start("app:work", "--max-stalls", "1")
    with pytest.raises(JobFailed, match="^job 1 stalled more than 1 time$"):
        await job.result(10_000)
    assert await worker.end(signal.SIGTERM) == 0


async def test_jobs_that_a_handler_saves_are_not_tracked(make_queue: MakeQueue, start: Start) -> None:
    """The worker gets no events, so they would stay in memory."""
    job = await make_queue(is_worker=False).create_job("saves").save()
    worker = await start("app:work")
    assert await job.result(10_000) == 0
    assert await worker.end(signal.SIGTERM) == 0


async def test_delayed_jobs(make_queue: MakeQueue, redis: Any, start: Start) -> None:
    queue = make_queue(is_worker=False)
    channel = queue.to_key("earlierDelayed")
    without = await start("app:work", "--no-delayed")
    await without.says("connected")
    assert dict(await redis.pubsub_numsub(channel)) == {channel: 0}
    worker = await start("app:work")
    await worker.says("connected")
    assert dict(await redis.pubsub_numsub(channel)) == {channel: 1}
    events = queue.to_key("events")
    await queue.ready()
    assert dict(await redis.pubsub_numsub(events)) == {events: 1}  # the producer's
    job = await queue.create_job("x").delay_until(int((await redis.time())[0] * 1000) + 1_500).save()
    assert await job.result(20_000) == "x"


async def test_a_worker_waits_for_redis_and_reconnects(make_queue: MakeQueue, start: Start, own_server: Server) -> None:
    own_server.stop()
    worker = await start("app:work", "-v", REDIS_URL=own_server.url)
    await worker.says("next attempt in 250 ms")
    await asyncio.to_thread(own_server.start)
    assert await worker.says("connected") == "INFO connected"
    own_server.stop()
    assert "ConnectionLost" in await worker.says("connection to")
    await asyncio.to_thread(own_server.start)
    while "take connection" not in await worker.says("is back"):
        pass
    queue = make_queue(redis=own_server.url, is_worker=False)
    assert await (await queue.create_job("x").save()).result(10_000) == "x"
    assert await worker.end(signal.SIGTERM) == 0
    await queue.close()
    assert not any("Traceback" in line for line in worker.lines)


async def test_a_refusal_is_one_line(start: Start) -> None:
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        worker = await start("app:work", REDIS_URL=server.url)
        assert await worker.end() == 1
    starting, refused = worker.lines
    assert starting.startswith("INFO starting: queue ")
    assert refused.startswith("ERROR ")
    assert "NOAUTH" in refused or "Authentication required" in refused


async def test_a_module_may_set_up_logging_itself(start: Start, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import logging; from app import work; logging.basicConfig(format='own %(message)s')\n")
    worker = await start("own:work")
    await worker.says("own connected")
    assert await worker.end(signal.SIGTERM) == 0
    assert worker.lines[-1] == "own closed"


# --- signals ---------------------------------------------------------------------------------------------------------


async def test_a_running_job_may_end_after_a_signal(make_queue: MakeQueue, redis: Any, start: Start, tmp_path: Path) -> None:
    queue = make_queue(is_worker=False)
    job = queue.create_job("waits")
    job.on("progress", begun := Seen())
    await job.save()
    worker = await start("app:work")
    await begun.reaches(1)
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.says("closing") == "INFO closing: waiting up to 5000 ms for 1 running job"
    await queue.create_job("is not taken").save()
    (tmp_path / "go").touch()
    assert await job.result(10_000) == "waits"
    assert await worker.end() == 0
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["2"]
    assert await redis.exists(queue.to_key("active")) == 0


async def test_a_job_that_runs_past_the_time_out_is_handed_back(make_queue: MakeQueue, redis: Any, start: Start) -> None:
    queue = make_queue(is_worker=False)
    job = queue.create_job("waits")
    job.on("progress", begun := Seen())
    await job.save()
    worker = await start("app:work", "--timeout", "100")
    await begun.reaches(1)
    worker.process.send_signal(signal.SIGTERM)
    await worker.says("closing")
    closing = time.monotonic()
    await worker.says("cancelled")
    assert time.monotonic() - closing < 4  # and not the queue's own 5 s
    assert await worker.end() == 0
    assert worker.lines[-2:] == [
        "INFO closing: waiting up to 100 ms for 1 running job",
        "WARNING time-out: 1 handler had not ended and had to be cancelled",
    ]
    assert await redis.lrange(queue.to_key("waiting"), 0, -1) == ["1"]
    assert await redis.exists(queue.to_key("active")) == 0


async def test_another_worker_takes_jobs_that_are_handed_back(make_queue: MakeQueue, start: Start, tmp_path: Path) -> None:
    """Under load, and without a stall check: the interval is an hour."""
    hour = 3_600_000
    options = ("app:work", "--concurrency", "3", "--timeout", "100", "--stall-interval", str(hour), "-v")
    queue = make_queue(is_worker=False, stall_interval=hour)
    first = await start(*options)
    begun = Seen()
    held = [queue.create_job("waits") for _ in range(2)]
    for job in held:
        job.on("progress", begun)
    assert await queue.save_all(held) == {}
    await begun.reaches(2)
    second = await start(*options)
    await second.says("connected")
    load = [queue.create_job(number) for number in range(300)]
    saving = asyncio.gather(*(job.save() for job in load))
    first.process.send_signal(signal.SIGTERM)
    await begun.reaches(4)  # each has begun a second time
    await saving
    assert {await job.result(10_000) for job in load} == set(range(300))
    (tmp_path / "go").touch()
    assert [await job.result(10_000) for job in held] == ["waits"] * 2
    assert await first.end() == 0
    assert await second.end(signal.SIGTERM) == 0
    for job in held:
        assert not any(f"job {job.id} " in line for line in first.lines)
        assert any(f"job {job.id} " in line for line in second.lines)


async def test_a_thread_does_not_keep_the_process_alive(make_queue: MakeQueue, start: Start, tmp_path: Path) -> None:
    queue = make_queue(is_worker=False)
    await queue.create_job("blocks").save()
    worker = await start("app:plain", "--timeout", "100")
    await until((tmp_path / "begun").exists)
    async with asyncio.timeout(20):
        assert await worker.end(signal.SIGTERM) == 0
    assert worker.printed == "begins\n"
    assert worker.lines[-1] == (
        "WARNING time-out: 1 handler had not ended and had to be left in threads; the stall check brings such jobs back"
    )
    assert (await queue.check_health()).active == 1


async def takes(server: Server) -> bool:
    """Whether a worker waits for a job on this server."""
    return any("b" in client["flags"] for client in await clients(server))


async def test_redis_does_not_answer_while_a_worker_closes(start: Start, own_server: Server) -> None:
    """The warning names Redis. No handler was cancelled, since none ran."""
    worker = await start("app:work", "--timeout", "100", REDIS_URL=own_server.url)
    await until(lambda: takes(own_server))
    freeze(own_server)
    try:
        assert await worker.end(signal.SIGTERM) == 0
    finally:
        thaw(own_server)
    assert worker.lines[-2:] == [
        "INFO closing: waiting up to 100 ms for 0 running jobs",
        "WARNING time-out: Redis does not answer",
    ]


@pytest.mark.parametrize("data", ["waits", "blocks"])
async def test_a_second_signal_ends_the_process_at_once(make_queue: MakeQueue, start: Start, data: str) -> None:
    """even while a handler blocks the event loop"""
    queue = make_queue(is_worker=False)
    job = queue.create_job(data)
    job.on("progress", begun := Seen())
    await job.save()
    worker = await start("app:work", "--timeout", "60000")
    await begun.reaches(1)
    async with asyncio.timeout(20):
        worker.process.send_signal(signal.SIGINT)
        if data == "waits":
            await worker.says("closing")
        assert await worker.end(signal.SIGTERM) == 128 + signal.SIGTERM


async def test_a_signal_while_the_interpreter_ends(start: Start, tmp_path: Path) -> None:
    (tmp_path / "lingers.py").write_text(
        "import atexit, sys\nfrom app import work\n\n"
        "@atexit.register\ndef linger():\n    print('lingers', file=sys.stderr)\n    while True: pass\n"
    )
    worker = await start("lingers:work")
    await worker.says("connected")
    worker.process.send_signal(signal.SIGTERM)
    await worker.says("lingers")
    assert await worker.end(signal.SIGINT) == 128 + signal.SIGINT
    assert worker.lines[-2:] == ["INFO closed", "lingers"]


async def test_a_signal_during_the_import_of_the_handler(start: Start, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    worker = await start("slow:work")
    assert await worker.end() == 128 + signal.SIGINT
    assert worker.lines == []


# --- wrong arguments -------------------------------------------------------------------------------------------------

MODULES = {
    "raises": "import os\nos.environ['SURELY NOT SET']\n",
    "raises_deep": "import app\n\ndef load():\n    raise app.asyncio.InvalidStateError('a\\nb')\n\nload()\n",
    "syntax": "x = 1\ndef work(:\n",
    "needs": "import app\nimport surely_not.there\n",
    "in_library": "import pathlib\npathlib.Path('surely not').read_text()\n",
    "leaves": "import sys\n\nsys.exit(3)\n",
}
FORM = "argument module:handler: must be a module and a function, as in shop.mail:send, not"
NAME = "argument module:handler: must name a function, but"
WHOLE = "must be a whole number of at least 1, not"
URL = "argument --redis: (or REDIS_URL) must be a URL that begins with redis://, rediss://, valkey://, valkeys:// or unix://"
WRONG = [
    (["app"], f"{FORM} 'app'"),
    ([":work"], f"{FORM} ':work'"),
    (["app:"], f"{FORM} 'app:'"),
    ([".app:work"], f"{FORM} '.app:work'"),
    (["missing:work"], f"{NAME} 'missing:work' raises ModuleNotFoundError: No module named 'missing'"),
    (
        ["app.missing:work"],
        f"{NAME} 'app.missing:work' raises ModuleNotFoundError: No module named 'app.missing'; 'app' is not a package",
    ),
    (["app:missing"], f"{NAME} 'app:missing' raises AttributeError: module 'app' has no attribute 'missing'"),
    (
        ["app:Handlers.missing"],
        f"{NAME} 'app:Handlers.missing' raises AttributeError: type object 'Handlers' has no attribute 'missing'",
    ),
    (["app:number"], f"{NAME} 'app:number' is of type int"),
    (["raises:work"], f"{NAME} 'raises:work' raises KeyError: 'SURELY NOT SET' (DIR/raises.py, line 2)"),
    (["raises_deep:work"], f"{NAME} 'raises_deep:work' raises InvalidStateError: a b (DIR/raises_deep.py, line 4)"),
    (["syntax:work"], f"{NAME} 'syntax:work' raises SyntaxError: invalid syntax (DIR/syntax.py, line 2)"),
    (
        ["in_library:work"],
        f"{NAME} 'in_library:work' raises FileNotFoundError: [Errno 2] No such file or directory: 'surely not'"
        " (DIR/in_library.py, line 2)",
    ),
    (["needs:work"], f"{NAME} 'needs:work' raises ModuleNotFoundError: No module named 'surely_not' (DIR/needs.py, line 2)"),
    (["leaves:work"], f"{NAME} 'leaves:work' raises SystemExit: 3 (DIR/leaves.py, line 3)"),
    (["app:work", "--concurrency", "0"], f"argument --concurrency: {WHOLE} '0'"),
    (["app:work", "--concurrency", "two"], f"argument --concurrency: {WHOLE} 'two'"),
    (["app:work", "--stall-interval", "-1"], f"argument --stall-interval: {WHOLE} '-1'"),
    (["app:work", "--max-stalls", "0"], f"argument --max-stalls: {WHOLE} '0'"),
    (["app:work", "--concurrency", "9" * 16], f"argument --concurrency: must have at most 15 digits, not '{'9' * 16}'"),
    (["app:work", "--timeout", "1.5"], f"argument --timeout: {WHOLE} '1.5'"),
    (["app:work", "--prefix", ""], "argument --prefix: must not be empty"),
    (["app:work", "--queue", ""], "argument --queue: must not be empty"),
    (["app:work", "--queue", "a\udcff"], r"argument --queue: must be text that UTF-8 can carry, not 'a\udcff'"),
    (
        ["app:work", "--redis", "redis://h?a=5"],
        "argument --redis: (or REDIS_URL) must only have options of redis-py's connections",
    ),
    (["app:work", "--redis", "http://x"], URL),
    (["app:work", "--conc", "2"], "unrecognized arguments: --conc"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=[line[:60] for _, line in WRONG])
async def test_a_wrong_argument(start: Start, tmp_path: Path, arguments: list[str], line: str) -> None:
    for module, source in MODULES.items():
        (tmp_path / f"{module}.py").write_text(source)
    worker = await start("--queue", "q", *arguments, queue=False)
    assert await worker.end() == 2
    (said,) = worker.lines
    assert re.sub("^python -m beequeue( worker)?: ", "", said) == line.replace("DIR", str(tmp_path))


async def test_a_wrong_environment(start: Start) -> None:
    worker = await start("app:work", REDIS_URL="http://user:secret@x")
    assert await worker.end() == 2
    assert worker.lines == [f"python -m beequeue worker: {URL}"]


async def test_a_missing_argument(start: Start) -> None:
    worker = await start("app:work", queue=False)
    assert await worker.end() == 2
    assert worker.lines == ["python -m beequeue worker: the following arguments are required: --queue"]


def test_the_handler_is_looked_for_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """even where Python itself would not look: with -P, or when an installed command starts it"""
    (tmp_path / "in_the_current_directory.py").write_text("def work(job): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert load_handler("in_the_current_directory:work").__name__ == "work"
