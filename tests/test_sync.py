"""The synchronous producer: every method, threads, forks, and the interpreter's exit."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import redis as sync_redis

import beequeue.sync
from beequeue import (
    BeeQueueError,
    ConnectionLost,
    ConnectionRefused,
    Health,
    Job,
    JobFailed,
    OutcomeUnknown,
    QueueClosed,
)
from beequeue.sync import Queue
from harness.server import Server, find_server, running_server
from tests import ROOT
from tests.conftest import MakeQueue, sync_threads
from tests.observe import freeze, thaw

STRICT = ("-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning")  # forks with threads are meant

MakeSync = Callable[..., Queue]

pytestmark = pytest.mark.usefixtures("own_thread")


@pytest.fixture
def make_sync(make_queue: MakeQueue) -> MakeSync:
    """Makes synchronous queues, usually with the test's name."""

    def make(name: str | None = None, redis: Any = None, **settings: Any) -> Queue:
        if redis is None:
            make_queue(name, auto_connect=False)  # has the keys deleted at the end
        return Queue(name or make_queue.name, redis or make_queue.url, **settings)

    return make


def until(condition: Callable[[], Any], deadline_s: float = 10) -> None:
    """Polls a condition that nothing signals to a thread."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


async def handler(job: Job) -> Any:
    if job.data == "fails":
        raise ValueError("as it should")
    return job.data


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_save_and_look_up(make_sync: MakeSync, name: str) -> None:
    queue = make_sync()
    job = queue.create_job({"to": "x"}).retries(2)
    assert queue.save(job) is job
    assert (job.id, job.options["retries"]) == ("1", 2)
    assert queue.get_job(1) is job
    assert queue.get_job("2") is None
    assert queue.get_jobs("waiting") == [job]
    assert queue.get_jobs("failed") == []
    assert queue.check_health() == Health(waiting=1, active=0, succeeded=0, failed=0, delayed=0, newest_job=1)
    assert queue.remove_job("1") is queue
    assert queue.get_job("1") is None
    assert queue.name == name


def test_save_all(make_sync: MakeSync) -> None:
    queue = make_sync()
    jobs = [queue.create_job(number) for number in range(10)]
    bad = queue.create_job(object())
    errors = queue.save_all(job for job in (*jobs, bad))
    assert [type(error) for error in errors.values()] == [TypeError]
    assert list(errors) == [bad]
    assert [job.id for job in jobs] == [str(number) for number in range(1, 11)]
    assert [job.data for job in queue.get_jobs("waiting", 0, 2)] == [9, 8, 7]


def test_an_id_in_use(make_sync: MakeSync) -> None:
    queue = make_sync()
    assert queue.save(queue.create_job().set_id("mine")).id == "mine"
    assert queue.save(queue.create_job().set_id("mine")).id is None


async def test_results(make_sync: MakeSync, make_queue: MakeQueue) -> None:
    """From a worker that runs in another loop."""
    queue = make_sync()
    make_queue(get_events=False).process(handler)

    def use() -> None:
        assert queue.result(queue.save(queue.create_job([1, "ü"]))) == [1, "ü"]
        assert queue.result(queue.save(queue.create_job("soon")), timedelta(seconds=10)) == "soon"
        failing = queue.save(queue.create_job("fails"))
        with pytest.raises(JobFailed, match="^as it should$"):
            queue.result(failing, 10_000)
        with pytest.raises(JobFailed, match="^as it should$"):  # it is remembered
            queue.result(failing, 10_000)

    await asyncio.to_thread(use)


def test_results_that_do_not_come(make_sync: MakeSync) -> None:
    queue = make_sync()
    job = queue.save(queue.create_job())
    with pytest.raises(TimeoutError):
        queue.result(job, 20)
    with pytest.raises(ValueError, match="timeout must be at least 0 ms, not -1"):
        queue.result(job, -1)
    assert job.id is not None
    queue.remove_job(job.id)
    with pytest.raises(OutcomeUnknown):
        queue.result(job, 10_000)
    with pytest.raises(BeeQueueError, match="saved or fetched"):
        queue.result(queue.create_job())
    deaf = make_sync(get_events=False)
    with pytest.raises(BeeQueueError, match="get_events"):
        deaf.result(deaf.save(deaf.create_job()))


def test_what_cannot_be_stored_raises(make_sync: MakeSync) -> None:
    queue = make_sync()
    with pytest.raises(TypeError):
        queue.save(queue.create_job(object()))
    assert queue.check_health().newest_job == 0


@pytest.mark.parametrize("wrong", [5, None, {"x": 2}], ids=str)
def test_what_is_no_job_is_refused(make_sync: MakeSync, wrong: Any) -> None:
    queue = make_sync()
    for use in (queue.save, queue.result, lambda job: queue.save(job, 5_000), lambda job: queue.save_all([job])):
        with pytest.raises(TypeError, match=f"^job must be a Job, not {re.escape(repr(wrong))}$"):
            use(wrong)
    assert queue.check_health().newest_job == 0


def test_a_job_of_another_queue_is_refused(make_sync: MakeSync, make_queue: MakeQueue, name: str) -> None:
    queue, other = make_sync(), make_sync(f"{name}-other")
    for job in (other.create_job(), other.save(other.create_job()), make_queue(auto_connect=False).create_job()):
        for use in (queue.save, queue.result, lambda job: queue.save_all([job])):
            with pytest.raises(ValueError, match="^<Job .* created> was created by another queue$"):
                use(job)
    assert queue.check_health().waiting == 0


def test_strategies_of_ones_own(make_sync: MakeSync) -> None:
    queue = make_sync()
    with pytest.raises(ValueError, match="unknown strategy"):
        queue.create_job().backoff("slowly", 5)
    queue.backoff_strategies["slowly"] = lambda job: 5
    job = queue.save(queue.create_job().backoff("slowly", 5))
    assert job.backoff("slowly", 6).options["backoff"] == {"strategy": "slowly", "delay": 6}


def test_a_listener_cannot_call_a_queue(make_sync: MakeSync) -> None:
    """It runs in the thread that would do the work."""
    queue, other = make_sync(), make_sync()
    heard = []

    def listener(error: Exception) -> None:
        for call in (queue.check_health, other.check_health, other.close):
            try:
                call()
            except BeeQueueError as error:
                heard.append((threading.current_thread(), str(error)))

    job = queue.create_job().set_id("mine")
    job.on("unknown", listener)
    queue.save(job)
    queue.remove_job("mine")
    message = "a listener cannot call a synchronous queue: the call would wait for the listener"
    assert heard == [(*sync_threads(), message)] * 3
    assert other.check_health().waiting == 0  # it was not closed


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_listener_that_exits_ends_nothing(
    make_sync: MakeSync, name: str, url: str, caplog: pytest.LogCaptureFixture, raised: BaseException
) -> None:
    def listener(result: object) -> None:
        raise raised

    queue = make_sync()
    job = queue.create_job()
    job.on("succeeded", listener)
    queue.save(job)
    with sync_redis.Redis.from_url(url) as client:
        client.publish(f"bq:{name}:events", '{"id":"1","event":"succeeded","data":"done"}')
    assert queue.result(job, 10_000) == "done"
    assert queue.check_health().waiting == 1
    assert f"a listener raised {raised!r} in the thread of the synchronous queues, which continues" in caplog.messages


# --- threads ---------------------------------------------------------------------------------------------------------


def test_nothing_starts_before_the_first_call(make_sync: MakeSync) -> None:
    queue = make_sync()
    queue.create_job()
    queue.close()
    assert sync_threads() == []
    with pytest.raises(QueueClosed, match="^closed$"):
        queue.check_health()
    assert sync_threads() == []


async def test_nothing_connects_in_the_callers_loop(make_sync: MakeSync) -> None:
    make_sync().create_job()
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("beequeue")] == []


def test_all_queues_share_one_thread(make_sync: MakeSync, name: str) -> None:
    one, other = make_sync(), make_sync(f"{name}-other")
    assert one.save(one.create_job(1)).id == other.save(other.create_job(2)).id == "1"
    assert len(sync_threads()) == 1
    assert sync_threads()[0].daemon


def test_many_threads_at_once(make_sync: MakeSync) -> None:
    queue = make_sync()
    together = threading.Barrier(8)

    def save_many(number: int) -> list[str | None]:
        together.wait()
        return [queue.save(queue.create_job([number, count])).id for count in range(100)]

    with ThreadPoolExecutor(8) as pool:
        ids = [job_id for some in pool.map(save_many, range(8)) for job_id in some]
    assert sorted(map(int, filter(None, ids))) == list(range(1, 801))
    assert len({tuple(job.data) for job in queue.get_jobs("waiting", 0, -1)}) == 800
    assert len(sync_threads()) == 1


def test_an_interrupt_cancels_the_call(make_sync: MakeSync) -> None:
    queue = make_sync()
    job = queue.save(queue.create_job())

    def interrupt() -> None:
        until(lambda: job.ended is not None)  # somebody waits for its end
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        queue.result(job)
    helper.join()
    assert queue.check_health().waiting == 1  # by now the thread has seen to the cancellation
    assert job.ended is None


# --- settings, opening, closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (
            ("q",),
            {"is_worker": True},
            "is_worker must be False: jobs are processed by a beequeue.Queue",
        ),
        (("q",), {"auto_connect": False}, "auto_connect must be True: a synchronous queue connects at its first call"),
        (
            ("q",),
            {"quit_command_client": False},
            "quit_command_client must not be False: nobody else uses a synchronous queue's connection",
        ),
        (("",), {}, "name must be a non-empty string, not ''"),
        (("a\udcff",), {}, r"name must be text that UTF-8 can carry, not 'a\udcff'"),
        (("q", "http://x"), {}, "redis must be a URL that begins with redis://, rediss://, valkey://, valkeys:// or unix://"),
        (("q",), {"stall_interval": 0}, "stall_interval must be at least 1 ms, not 0"),
    ],
)
def test_wrong_arguments(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Queue(*arguments, **settings)


def test_a_closed_queue(make_sync: MakeSync) -> None:
    with make_sync() as queue:
        job = queue.save(queue.create_job())
        assert repr(queue).endswith(f" {queue.name}>")
    assert repr(queue).endswith(f" {queue.name} closed>")
    queue.close()
    calls: list[Callable[[], Any]] = [
        lambda: queue.save(job),
        lambda: queue.save_all([job]),
        lambda: queue.result(job),
        lambda: queue.get_job("1"),
        lambda: queue.get_jobs("waiting"),
        lambda: queue.remove_job("1"),
        queue.check_health,
        queue.__enter__,
    ]
    for call in calls:
        with pytest.raises(QueueClosed, match="^closed$"):
            call()
    with pytest.raises(ValueError, match="timeout must be at least 0 ms, not -1"):
        queue.close(-1)


def test_closing_ends_the_waits_for_results(make_sync: MakeSync) -> None:
    queue = make_sync()
    job = queue.save(queue.create_job())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.result, job)
        until(lambda: job.ended is not None)  # it waits
        queue.close(1_000)
        with pytest.raises(QueueClosed, match="^closed$"):
            waiting.result(10)


def test_closing_leaves_no_connection(own_server: Server, make_sync: MakeSync) -> None:
    with sync_redis.Redis.from_url(own_server.url) as client:
        with make_sync(redis=own_server.url) as queue:
            queue.save(queue.create_job())
            assert len(client.client_list()) == 3
        assert beequeue.sync._background.queues == {}
        until(lambda: len(client.client_list()) == 1)


def test_a_refusal(make_sync: MakeSync) -> None:
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        queue = make_sync(redis=server.url)
        with pytest.raises(ConnectionRefused):
            queue.save(queue.create_job())
        with pytest.raises(ConnectionRefused):
            queue.close()
        queue.close()


def test_a_redis_that_is_not_up_yet(own_server: Server, make_sync: MakeSync, caplog: pytest.LogCaptureFixture) -> None:
    own_server.stop()
    queue = make_sync(redis=own_server.url, reconnect=lambda attempt: 10)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(queue.save, queue.create_job())
        until(lambda: any("next attempt" in message for message in caplog.messages))
        assert not saving.done()
        own_server.start()
        assert saving.result(10).id == "1"
    queue.close()


def test_a_save_with_a_time_out_while_redis_is_down(own_server: Server, make_sync: MakeSync) -> None:
    """Before the queue has ever been connected, and later: nothing is sent, not even once Redis is back."""
    own_server.stop()
    queue = make_sync(redis=own_server.url, reconnect=lambda attempt: 10)
    first, second = queue.create_job("first"), queue.create_job("second")
    for _ in range(2):
        with pytest.raises(
            ConnectionLost, match="^Redis could not be reached within the time-out; the job was not saved$"
        ) as lost:
            queue.save(first, timeout=50)
        assert not lost.value.maybe_applied
    own_server.start()
    assert queue.save(first, timeout=timedelta(seconds=10)).id == "1"
    own_server.stop()
    until(lambda: not is_up(queue))
    with pytest.raises(ConnectionLost) as lost:
        queue.save(second, timeout=50)
    assert not lost.value.maybe_applied
    bad = queue.create_job(object())
    errors = queue.save_all([second, bad, *(queue.create_job() for _ in range(2_500))], timeout=50)
    assert [type(error) for error in errors.values() if not isinstance(error, ConnectionLost)] == [TypeError]
    assert len(errors) == 2_502
    assert not any(error.maybe_applied for error in errors.values() if isinstance(error, ConnectionLost))
    own_server.start()
    assert queue.check_health().waiting == 0  # the server kept nothing, and nothing was sent meanwhile
    assert queue.save(second).id == "1"
    queue.close()


def test_a_save_with_a_time_out_while_redis_is_silent(own_server: Server, make_sync: MakeSync) -> None:
    """The job was sent, and is stored once Redis goes on; nobody can tell before."""
    queue = make_sync(redis=own_server.url)
    queue.check_health()
    jobs = [queue.create_job(number) for number in range(3)]
    freeze(own_server)
    with pytest.raises(ConnectionLost, match="^Redis did not answer within the time-out; the job may have been saved$") as lost:
        queue.save(jobs[0], timeout=50)
    assert lost.value.maybe_applied
    began_at = time.monotonic()
    errors = queue.save_all(jobs[1:], timeout=50)
    assert 0.05 <= time.monotonic() - began_at < 0.9
    assert [isinstance(error, ConnectionLost) and error.maybe_applied for error in errors.values()] == [True, True]
    with pytest.raises(BeeQueueError, match="is being saved already"):
        queue.save(jobs[0])
    thaw(own_server)
    until(lambda: [job.id for job in jobs] == ["1", "2", "3"])
    assert queue.check_health().waiting == 3
    assert queue.save(jobs[0], timeout=5_000) is jobs[0]
    freeze(own_server)
    for read in (lambda: queue.get_job("1", timeout=20), lambda: queue.check_health(timeout=20)):
        with pytest.raises(ConnectionLost, match="^Redis did not answer within the time-out$") as lost:
            read()
        assert not lost.value.maybe_applied
    with pytest.raises(
        ConnectionLost, match="^Redis did not answer within the time-out; the job may have been removed$"
    ) as lost:
        queue.remove_job("1", timeout=20)
    assert lost.value.maybe_applied
    thaw(own_server)
    until(lambda: queue.check_health().waiting == 2)
    queue.close()


def test_closing_while_threads_save(own_server: Server, make_sync: MakeSync) -> None:
    """Jobs that were sent are answered; a call that had to wait for its turn raises `closed`."""
    queue = make_sync(redis=own_server.url)
    queue.check_health()
    jobs = [queue.create_job(number) for number in range(20)]
    freeze(own_server)
    with ThreadPoolExecutor(len(jobs) + 1) as threads:
        saving = [threads.submit(queue.save, job) for job in jobs]
        (opened,) = beequeue.sync._background.queues.values()
        until(lambda: opened._host.calls.count == len(jobs))
        closing = threads.submit(queue.close)
        until(lambda: "closed" in repr(opened))
        thaw(own_server)
        assert [saved.result() for saved in saving] == jobs
        closing.result()
    assert sorted(int(job.id or 0) for job in jobs) == [*range(1, 21)]


def test_a_synchronous_queue_without_events_keeps_no_job(make_sync: MakeSync) -> None:
    with make_sync(get_events=False) as queue:
        assert queue.save_all(queue.create_job(number) for number in range(10)) == {}
        queue.save(queue.create_job())
        (opened,) = beequeue.sync._background.queues.values()
        assert opened.jobs == {}


def test_other_calls_with_a_time_out_while_redis_is_down(own_server: Server, make_sync: MakeSync) -> None:
    """Before the queue has ever been connected, and later: nothing is sent, not even once Redis is back."""
    queue = make_sync(redis=own_server.url, reconnect=lambda attempt: 10)
    calls: list[Callable[[], Any]] = [
        lambda: queue.get_job("a", timeout=20),
        lambda: queue.get_jobs("failed", timeout=20),
        lambda: queue.remove_job("a", timeout=20),
        lambda: queue.check_health(timeout=timedelta(milliseconds=20)),
    ]
    for _ in range(2):
        own_server.stop()
        until(lambda: not queue_is_open(queue) or not is_up(queue))
        for call in calls:
            with pytest.raises(
                ConnectionLost, match="^Redis (did not answer|could not be reached) within the time-out"
            ) as lost:
                call()
            assert not lost.value.maybe_applied
        own_server.start()
        assert queue.save(queue.create_job().set_id("a")).id == "a"
        assert [job.id for job in queue.get_jobs("waiting", timeout=10_000)] == ["a"]
        with sync_redis.Redis.from_url(own_server.url, decode_responses=True) as onlooker:
            assert not {"cmdstat_sscan", "cmdstat_llen"} & onlooker.info("commandstats").keys()
    with pytest.raises(ValueError, match="timeout must be at least 0 ms, not -1"):
        queue.check_health(timeout=-1)
    queue.close()


def queue_is_open(queue: Queue) -> bool:
    return queue in beequeue.sync._background.queues


def is_up(queue: Queue) -> bool:
    """Whether the connection for saves is up."""
    (opened,) = [each for mine, each in beequeue.sync._background.queues.items() if mine is queue]
    assert opened._connections.events is not None
    return opened._connections.events.link is not None


def test_closing_while_it_opens(own_server: Server, make_sync: MakeSync) -> None:
    own_server.stop()
    queue = make_sync(redis=own_server.url)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(queue.save, queue.create_job())
        until(sync_threads)
        queue.close()
        with pytest.raises(QueueClosed):
            saving.result(10)


# --- forks -----------------------------------------------------------------------------------------------------------


class Script:
    """A separate program, with warnings as errors; its forks end with it."""

    def __init__(self, source: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *STRICT, "-c", source, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, said: str = "") -> tuple[int, list[str], str]:
        """Returns its exit code, the remaining lines of stdout, and stderr; `said` goes to its stdin.

        Leaves out the lines in which asyncio's debug mode names slow callbacks: they only tell that the machine is busy.
        """
        try:
            out, err = self.process.communicate(said, timeout=30)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all of it has ended
        told = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("Executing <"))
        return self.process.returncode, out.splitlines(), told


FORK = """
import os, sys, time
from beequeue.errors import BeeQueueError
from beequeue.sync import Queue

def ask(data):
    print(queue.result(queue.save(queue.create_job(data)), 20_000), flush=True)

queue = Queue(*sys.argv[1:])
closed = Queue(*sys.argv[1:])
closed.check_health()
closed.close()
ask("parent")
created_before = queue.create_job("created before")
saved_before = queue.save(queue.create_job("saved before"))
in_an_hour = queue.save(queue.create_job().delay_until(time.time() * 1000 + 3_600_000))
from_child, to_parent = os.pipe()
from_parent, to_child = os.pipe()
child = os.fork()
if child == 0:
    queue.save(created_before)
    print(queue.result(created_before, 20_000), flush=True)
    print(queue.get_job(saved_before.id) is saved_before, flush=True)
    for call in (closed.check_health, lambda: queue.result(in_an_hour)):
        try:
            call()
        except BeeQueueError as error:
            print(error, flush=True)
    os.write(to_parent, b".")
    os.read(from_parent, 1)
    ask("child")
    sys.exit(7)
os.read(from_child, 1)
ask("parent, beside the child")
os.write(to_child, b".")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(queue.result(saved_before, 20_000), flush=True)
ask("parent, after the child")
"""


async def test_a_fork(make_queue: MakeQueue) -> None:
    """The child has its own connections and does not disturb the parent; both end in silence."""
    make_queue(get_events=False).process(handler)
    code, out, err = await asyncio.to_thread(Script(FORK, make_queue.name, make_queue.url).end)
    assert err == ""
    assert out == [
        "parent",
        "created before",
        "False",
        "closed",
        "result() is for a job that this queue has saved or fetched",
        "parent, beside the child",
        "child",
        "saved before",
        "parent, after the child",
    ]
    assert code == 0


FORK_AMONG_THREADS = """
import os, sys, threading
from beequeue.sync import Queue

queue = Queue(*sys.argv[1:])
stop = threading.Event()

def save():
    while not stop.is_set():
        queue.save(queue.create_job("thread"))

savers = [threading.Thread(target=save) for _ in range(4)]
for saver in savers:
    saver.start()
for number in range(20):
    child = os.fork()
    if child == 0:
        queue.save(queue.create_job("child"))
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for saver in savers:
    saver.join()
print(len([job for job in queue.get_jobs("waiting", 0, -1) if job.data == "child"]))
"""


def test_forks_while_threads_save(make_sync: MakeSync, name: str, url: str) -> None:
    make_sync()
    assert Script(FORK_AMONG_THREADS, name, url).end() == (0, ["20"], "")


MULTIPROCESSING = """
import multiprocessing, sys
from beequeue.sync import Queue

queue = Queue(*sys.argv[1:])

def save(number):
    return queue.save(queue.create_job(number)).id

if __name__ == "__main__":
    save(0)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        ids = pool.map(save, range(20), chunksize=1)
    ids.append(save(0))
    print(sorted(map(int, ids)) == list(range(2, 23)))
"""


def test_a_pool_of_processes(make_sync: MakeSync, name: str, url: str) -> None:
    make_sync()
    assert Script(MULTIPROCESSING, name, url).end() == (0, ["True"], "")


HOLDING_CHILD = """
import os, sys
from beequeue.sync import Queue

queue = Queue("q", sys.argv[1])
queue.save(queue.create_job())
from_parent, to_child = os.pipe()
if os.fork() == 0:
    os.close(to_child)
    os.read(from_parent, 1)  # until the parent has ended
    os._exit(0)
queue.close()
print("closed", flush=True)
sys.stdin.read()
"""


def test_a_child_does_not_hold_what_its_parent_has_closed(own_server: Server) -> None:
    script = Script(HOLDING_CHILD, own_server.url)
    with sync_redis.Redis.from_url(own_server.url) as client:
        assert script.line() == "closed"
        try:
            until(lambda: len(client.client_list()) == 1)
        finally:
            ended = script.end()
    assert ended == (0, [], "")


# --- the interpreter's exit ------------------------------------------------------------------------------------------

EXIT = """
import asyncio, atexit, redis, sys, threading, time
from beequeue.errors import ConnectionRefused, QueueClosed
from beequeue.sync import Queue

def print_if_closed():
    for late in (queue, other):
        try:
            late.check_health()
        except QueueClosed as error:
            print(error)
    print(threading.active_count())
    with redis.Redis.from_url(sys.argv[3]) as client:
        while len(client.client_list()) > 1:
            time.sleep(0.005)

queue = Queue(*sys.argv[2:])
other = Queue(*sys.argv[2:])
waits = threading.Event()
tasks = []

def wait_for_result():
    job = queue.save(queue.create_job())
    threading.Thread(target=queue.result, args=(job,), daemon=True).start()
    while job.ended is None:
        pass

def save_all_the_time():
    while True:
        queue.save(queue.create_job())
        waits.set()

match sys.argv[1]:
    case "unused":
        queue.create_job()
    case "used":
        queue.save(queue.create_job())
        other.check_health()
    case "closed":
        queue.save(queue.create_job())
        queue.close()
    case "waiting":
        wait_for_result()
    case "saving":
        for _ in range(3):
            threading.Thread(target=save_all_the_time, daemon=True).start()
        waits.wait()
    case "failing":
        queue.check_health()
        raise SystemExit("as it should")
    case "late":
        atexit.register(print_if_closed)  # and so called after the queue's own
        queue.check_health()
    case "refused":
        try:
            queue.check_health()
        except ConnectionRefused:
            print("refused")
    case "lost":
        queue.save(queue.create_job())
        print("ready", flush=True)
        sys.stdin.read()
    case "task":
        job = queue.create_job()
        job.on("unknown", lambda error: tasks.append(asyncio.get_running_loop().create_task(asyncio.sleep(3600))))
        queue.remove_job(queue.save(job).id)
    case "stuck":
        job = queue.create_job()
        job.on("unknown", lambda error: (waits.set(), threading.Event().wait()))
        queue.save(job)
        threading.Thread(target=queue.remove_job, args=(job.id,), daemon=True).start()
        waits.wait()
"""


@pytest.mark.parametrize("way", ["unused", "used", "closed", "waiting", "saving", "task", "stuck"])
def test_the_exit_is_quiet(make_sync: MakeSync, name: str, url: str, way: str) -> None:
    make_sync()
    assert Script(EXIT, way, name, url).end() == (0, [], "")


def test_the_exit_closes_what_is_open(own_server: Server) -> None:
    """A queue that is used after the exit began raises `closed`, also at its first use."""
    assert Script(EXIT, "late", "q", own_server.url).end() == (0, ["closed", "closed", "1"], "")


def test_the_exit_keeps_its_code(make_sync: MakeSync, name: str, url: str) -> None:
    make_sync()
    assert Script(EXIT, "failing", name, url).end() == (1, [], "as it should\n")


def test_the_exit_is_quiet_after_a_refusal() -> None:
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        assert Script(EXIT, "refused", "q", server.url).end() == (0, ["refused"], "")


def test_the_exit_needs_no_redis(own_server: Server) -> None:
    script = Script(EXIT, "lost", "q", own_server.url)
    assert script.line() == "ready"
    own_server.stop()
    code, out, err = script.end()
    assert (code, out) == (0, [])
    assert all("lost" in line or "next attempt" in line for line in err.splitlines()), err
