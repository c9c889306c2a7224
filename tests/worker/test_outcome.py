"""A worker's decisions as plain functions: whether and when a failed job runs again, and what its settlement writes."""

from __future__ import annotations

import json
import math
from types import TracebackType
from typing import Any

import pytest

from beequeue import Job, JobTimeout, QueueSettings
from beequeue.job import BUILT_IN_STRATEGIES, Strategy
from beequeue.store.store import Settlement
from beequeue.worker.outcome import fail, fail_for_good, fail_unread, message_of, retry_delay, stack_trace, succeed


class NoQueue:
    """A job's owner that can do nothing."""

    _saver: Any = None
    _producer: Any = None

    def __init__(self) -> None:
        self.backoff_strategies: dict[str, Strategy] = dict(BUILT_IN_STRATEGIES)

    def _listener_failed(self, event: str, error: BaseException) -> None: ...
    def _listener_awaits(self, event: str, result: Any) -> None: ...


@pytest.fixture
def job() -> Job:
    return Job(NoQueue(), {"n": 1}, job_id="7", options={"timestamp": 1700000000000, "stacktraces": []})


def test_without_retries_the_first_failure_is_final(job: Job) -> None:
    """B-13"""
    assert retry_delay(job, BUILT_IN_STRATEGIES) is None
    assert retry_delay(job.retries(0), BUILT_IN_STRATEGIES) is None


def test_without_backoff_a_retry_is_immediate(job: Job) -> None:
    """B-07"""
    assert retry_delay(job.retries(1), BUILT_IN_STRATEGIES) == 0


def test_fixed_keeps_its_delay(job: Job) -> None:
    """B-04"""
    job.retries(2).backoff("fixed", 100)
    assert [retry_delay(job, BUILT_IN_STRATEGIES) for _ in range(2)] == [100, 100]
    assert job.options["backoff"] == {"strategy": "fixed", "delay": 100}


def test_exponential_doubles_its_delay(job: Job) -> None:
    """B-06"""
    job.retries(3).backoff("exponential", 30)
    assert [retry_delay(job, BUILT_IN_STRATEGIES) for _ in range(3)] == [30, 60, 120]
    assert job.options["backoff"] == {"strategy": "exponential", "delay": 240}


@pytest.mark.parametrize(("returned", "delay"), [(0, 0), (2.1, 3), (-1, None), (math.nan, None), (None, None)])
def test_a_custom_strategy_decides(job: Job, returned: Any, delay: int | None) -> None:
    """B-08, QK-56: a negative number, NaN or nothing means final failure; a fraction is rounded up"""
    strategies: dict[str, Strategy] = {"own": lambda job: returned}
    job.retries(1).options["backoff"] = {"strategy": "own", "delay": 1}
    assert retry_delay(job, strategies) == delay


def test_a_strategy_that_the_worker_lacks_is_final(job: Job) -> None:
    """B-08"""
    job.retries(1).options["backoff"] = {"strategy": "unheard of", "delay": 1}
    assert retry_delay(job, BUILT_IN_STRATEGIES) is None


def test_success(job: Job) -> None:
    """the wire: the entry and the message of a success"""
    settlement = succeed(job, {"a": 1}, QueueSettings())
    assert settlement.status == "succeeded"
    assert settlement.entry == (
        b'{"data":{"n":1},"options":{"timestamp":1700000000000,"stacktraces":[]},"status":"succeeded","progress":0}'
    )
    assert settlement.message == b'{"id":"7","event":"succeeded","data":{"a":1}}'


def test_success_without_a_result(job: Job) -> None:
    """the wire: the message has no member `data`"""
    assert succeed(job, None, QueueSettings()).message == b'{"id":"7","event":"succeeded"}'


def test_success_removed_and_silent(job: Job) -> None:
    """RO-01, PS-02"""
    settlement = succeed(job, 1, QueueSettings(remove_on_success=True, send_events=False))
    assert settlement.entry is None
    assert settlement.message == b""


def test_a_result_that_json_cannot_carry(job: Job) -> None:
    """QK-20"""
    with pytest.raises(TypeError):
        succeed(job, object(), QueueSettings())


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_final_failure(job: Job) -> None:
    """P-05"""
    settlement = fail(job, raised(ValueError("fail!")), None, 1000, QueueSettings())
    assert settlement.status == "failed"
    assert settlement.message == b'{"id":"7","event":"failed","data":"fail!"}'
    entry = json.loads(settlement.entry or b"")
    assert list(entry) == ["data", "options", "status", "progress"]
    assert entry["status"] == "failed"
    assert len(entry["options"]["stacktraces"]) == 1
    assert entry["options"]["stacktraces"][0].endswith("ValueError: fail!\n")


def test_retry(job: Job) -> None:
    """EV-04, B-11, B-12: one retry fewer, the newest trace first, status `retrying`"""
    job.retries(2).options["stacktraces"] = ["older", "oldest"]
    settlement = fail(job, raised(ValueError("fail!")), 50, 1000, QueueSettings(remove_on_failure=True))
    assert settlement.status == "retrying"
    assert settlement.retry_at == 1050
    options = json.loads(settlement.entry or b"")["options"]
    assert options["retries"] == 1
    assert options["stacktraces"][0].endswith("ValueError: fail!\n")
    assert options["stacktraces"][1:] == ["older", "oldest"]
    assert fail(job, ValueError(), 0, 1000, QueueSettings()).retry_at is None


def test_an_error_without_text_is_named(job: Job) -> None:
    """QK-25"""
    settlement = fail(job, KeyError(), None, 0, QueueSettings())
    assert settlement.message == b'{"id":"7","event":"failed","data":"KeyError"}'


class Mute(Exception):
    """Its `__str__` raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Exits(Exception):
    """Its `__str__` ends the program."""

    def __str__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize("kind", [Mute, Exits])
def test_an_error_whose_text_raises_is_named(kind: type[Exception]) -> None:
    """QK-25"""
    assert message_of(kind()) == kind.__name__


class NoCause(Exception):
    """As a proxy that has lost its object."""

    @property
    def __cause__(self) -> BaseException | None:
        raise ReferenceError("weakly-referenced object no longer exists")

    @__cause__.setter
    def __cause__(self, cause: BaseException | None) -> None: ...


class NoTraceback(Exception):
    """As a proxy that has lost its object."""

    @property
    def __traceback__(self) -> TracebackType | None:
        raise SystemExit("weakly-referenced object no longer exists")

    @__traceback__.setter
    def __traceback__(self, frames: TracebackType | None) -> None: ...


UNFORMATTABLE = [
    (SyntaxError("bad", ("page.html", 3, 5, 17)), "SyntaxError: bad"),  # type: ignore[arg-type]
    (NoCause("mine"), "NoCause: mine"),
    (NoTraceback("mine"), "NoTraceback: mine"),
    (Mute(), "Mute: <exception str() failed>"),
]


@pytest.mark.parametrize(("error", "last_line"), UNFORMATTABLE)
def test_the_trace_of_an_error_that_python_cannot_format(job: Job, error: Exception, last_line: str) -> None:
    """its type and text, and where it was raised, if that can be read; so its job can be settled

    Python 3.13 can format the first one, without its place.
    """
    trace = stack_trace(raised(error))
    assert last_line in trace.splitlines()[-1]
    assert ("test_outcome.py" in trace) is not isinstance(error, NoTraceback)
    assert fail(job, error, None, 0, QueueSettings()).status == "failed"


def test_a_job_that_cannot_be_written_keeps_its_entry(job: Job) -> None:
    """its event tells why it failed"""
    error = ValueError("too deep")
    job.data = object()  # stands for lists that are nested too deeply
    settlement = fail_for_good(job, b"stored", error, QueueSettings())
    assert settlement == Settlement("failed", b"stored", b'{"id":"7","event":"failed","data":"too deep"}')
    silent = fail_for_good(job, b"stored", error, QueueSettings(remove_on_failure=True, send_events=False))
    assert silent == Settlement("failed", None, b"")


def test_a_job_that_fails_for_good_is_written(job: Job) -> None:
    settlement = fail_for_good(job.retries(3), b"stored", ValueError("fail!"), QueueSettings())
    assert settlement == Settlement("failed", job.encode(), b'{"id":"7","event":"failed","data":"fail!"}')
    assert job.status == "failed"
    assert job.options["retries"] == 3


def test_an_entry_that_cannot_be_read_stays() -> None:
    assert fail_unread(b"no job") == Settlement("failed", b"no job", b"")


def test_removed_on_failure(job: Job) -> None:
    """RO-02"""
    assert fail(job, ValueError("x"), None, 0, QueueSettings(remove_on_failure=True)).entry is None


def test_a_trace_names_where_it_was_raised() -> None:
    trace = stack_trace(raised(JobTimeout("Job 1 timed out (10 ms)")))
    assert trace.startswith("Traceback ")
    assert "test_outcome.py" in trace
    assert trace.endswith("Job 1 timed out (10 ms)\n")
