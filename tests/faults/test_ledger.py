"""The ledger itself: it accepts a run that adds up, and names each discrepancy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from beequeue import CommandError, ConnectionLost, JobFailed, OutcomeUnknown
from tests.faults.ledger import Ledger, Notes, Stored, discrepancies


class Books:
    """Three jobs that ended well: number 0 succeeded, 1 too, and 3 failed."""

    def __init__(self) -> None:
        self.ledger = Ledger(issued=4, saved={0: "1", 1: "2", 3: "3"}, refused={2})
        self.notes = Notes()
        self.stored = Stored(
            {"1": (0, "succeeded"), "2": (1, "succeeded"), "3": (3, "failed")},
            {"waiting": [], "active": [], "stalling": [], "delayed": [], "succeeded": ["1", "2"], "failed": ["3"]},
        )
        self.tracked = 0
        self.reconnects = 0
        for job_id, number in (("1", 0), ("2", 1), ("3", 3)):
            self.run(job_id, number)
            self.ledger.published[number] += 1
        self.ledger.tell(0, "succeeded", {"number": 0})
        self.ledger.tell(1, "succeeded", {"number": 1})
        self.ledger.tell(3, "failed", JobFailed("bad 3"))

    def run(self, job_id: str, number: int) -> None:
        self.notes.read(f"start {job_id} {number}")
        self.notes.read(f"finish {job_id} {number}")

    def found(self) -> list[str]:
        return discrepancies(self.ledger, self.notes, self.stored, tracked=self.tracked, reconnects=self.reconnects)


def test_books_that_add_up() -> None:
    assert Books().found() == []


def set_tracked(books: Books) -> None:
    books.tracked = 1


def move_back(books: Books) -> None:
    books.stored.places["succeeded"].remove("2")
    books.stored.places["waiting"].append("2")


def forget_entry(books: Books) -> None:
    del books.stored.jobs["2"]


def lose_job(books: Books) -> None:
    del books.stored.jobs["2"]
    books.stored.places["succeeded"].remove("2")


def not_run(books: Books) -> None:
    del books.notes.finished[1]


def unknown(books: Books) -> None:
    del books.ledger.told[1]
    books.ledger.tell(1, "unknown", OutcomeUnknown("gone"))


def revive(books: Books) -> None:
    unknown(books)
    books.ledger.removed.add(1)


def refuse(books: Books) -> None:
    del books.ledger.saved[1]
    del books.ledger.told[1]
    books.ledger.save_failed(1, CommandError("OOM command not allowed"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (set_tracked, ["1 bindings are left"]),
        (move_back, ["waiting still holds ['2']", "job 1 is in ['waiting'] as succeeded"]),
        (
            lambda books: books.stored.places["stalling"].append("2"),
            ["stalling still holds ['2']", "job 1 is in ['stalling', 'succeeded'] as succeeded"],
        ),
        (lambda books: books.stored.places["failed"].append("2"), ["job 1 is in ['succeeded', 'failed'] as succeeded"]),
        (forget_entry, ["job 1 was saved but is gone", "id 2 in succeeded has no entry"]),
        (lose_job, ["job 1 was saved but is gone"]),
        (lambda books: books.ledger.told.pop(1), ["job 1, id 2: its reported ends are []"]),
        (
            lambda books: books.ledger.tell(1, "succeeded", {"number": 1}),
            ["job 1, id 2: its reported ends are ['succeeded', 'succeeded']"],
        ),
        (
            lambda books: books.ledger.tell(1, "succeeded", {"number": 0}),
            [
                "job 1: its reported end is succeeded {'number': 0}",
                "job 1, id 2: its reported ends are ['succeeded', 'succeeded']",
            ],
        ),
        (
            not_run,
            [
                "job 1 was saved but no attempt at it ended; its reported ends are ['succeeded']",
                "the end of job 1 was published, but no attempt at it ended",
            ],
        ),
        (unknown, ["job 1 ended as unknown, although no connection was lost"]),
        (revive, ["job 1 was removed but is back"]),
        (refuse, ["job 1 is stored, although its save failed", "job 1 was run, although its save failed"]),
        (lambda books: books.ledger.published.update([1]), ["job 1 was settled 2 times"]),
        (lambda books: books.run("2", 1), ["job 1 ran 1 times too often, and no stall check brought it back"]),
    ],
)
def test_books_that_do_not_add_up(spoil: Callable[[Books], object], says: list[str]) -> None:
    books = Books()
    spoil(books)
    assert books.found() == says


def test_an_earlier_page_has_counted_its_jobs() -> None:
    books = Books()
    books.ledger.first = 1
    del books.ledger.saved[0]
    assert not [line for line in books.found() if "was run" in line]


def test_a_stall_check_explains_a_second_attempt() -> None:
    books = Books()
    books.run("2", 1)
    books.notes.read("stalled 2")
    assert books.found() == []
    books.run("2", 1)
    assert len(books.found()) == 1


def test_a_late_retry_of_a_stalled_attempt_explains_one_more() -> None:
    books = Books()
    books.ledger.saved[7] = "8"
    books.ledger.tell(7, "succeeded", {"number": 7})
    books.ledger.published[7] += 1
    books.stored.jobs["8"] = (7, "succeeded")
    books.stored.places["succeeded"].append("8")
    books.notes.read("stalled 8")
    for _ in range(4):
        books.run("8", 7)
    assert books.found() == []
    books.run("8", 7)
    assert books.found() == ["job 7 ran 3 times too often, and no stall check brought it back"]


@pytest.mark.parametrize("line", ["error ConnectionLost", "error OutcomeNotRecorded"])
def test_a_lost_reply_explains_a_second_attempt(line: str) -> None:
    books = Books()
    books.run("2", 1)
    books.notes.read(line)
    assert books.found() == []


def test_a_save_that_may_have_been_applied_may_be_stored_or_not() -> None:
    books = Books()
    del books.ledger.saved[1]
    del books.ledger.told[1]
    books.ledger.save_failed(1, ConnectionLost("cut", maybe_applied=True))
    assert books.found() == []
    lose_job(books)
    assert books.found() == []


def test_jobs_may_be_gone_after_redis_has_lost_its_data() -> None:
    books = Books()
    del books.ledger.told[1]
    books.ledger.redis_is_wiped()
    assert books.found() == ["job 1, id 2: its reported ends are []"]
    books.ledger.tell(1, "unknown", OutcomeUnknown("gone"))
    lose_job(books)
    books.notes.finished.pop(1)
    books.ledger.published.pop(1)
    assert books.found() == []


def with_a_killer() -> Books:
    """Job 4 has killed two workers, and failed for it."""
    books = Books()
    books.ledger.issued = 5
    books.ledger.killers.add(4)
    books.ledger.saved[4] = "4"
    books.notes.read("start 4 4")
    books.notes.read("stalled 4")
    books.notes.read("start 4 4")
    books.ledger.tell(4, "failed", JobFailed("job 4 stalled more than 1 time"))
    books.ledger.published[4] += 1
    books.stored.jobs["4"] = (4, "failed")
    books.stored.places["failed"].append("4")
    return books


def test_a_killer_fails_although_no_attempt_ended() -> None:
    assert with_a_killer().found() == []
    books = with_a_killer()
    books.ledger.killers.clear()
    assert len(books.found()) == 3
    books = with_a_killer()
    books.ledger.tell(4, "failed", JobFailed("bad 4"))
    assert books.ledger.wrong == ["job 4: its reported end is failed JobFailed('bad 4')"]
