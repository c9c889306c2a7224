"""What brings a worker its jobs and carries off what has become of them: one blocking take while a slot is free, one script
for all runs that end together.

Shape of the hot path, because speed is decided here:
- a take is two commands in one write: BRPOPLPUSH, and behind it the script that reads what was taken, which Redis runs in the
  moment in which the take is answered. So a job is here, data and all, after one trip;
- runs that end in one step of the loop are settled by one script, which brings the next jobs for their slots;
- the next take is issued when the runs that have just begun have made their first step. What they have settled by then goes in
  front of it, in the same write. Behind a take that is open a settlement would be stuck; then it has the command connection.

Knows nothing of handlers: `hold` makes runs of jobs, `begin` starts them, `ended` gets each whose settlement was answered.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Generic, Protocol, TypeVar, cast

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, QueueClosed
from beequeue.host import Host
from beequeue.store.store import Settlement, Store, Taken
from beequeue.wire.link import UNFIT, Command

UNBLOCK_EVERY_S = 0.05
LONGEST_REFUSAL_DELAY_MS = 15_000
AT_ONCE = 64
"""How many runs one script settles at most, so that it does not hold Redis up."""
LEAST_LOT, MOST_LOT = 4, 16
"""Of the runs that end in one step, half of the slots are settled at once, but not fewer or more: small ones cost more writes,
large ones more waiting."""
MOST_UNANSWERED = 8
"""How many of these scripts Redis owes an answer at most: however many runs end together, heartbeats and other commands of the
queue do not wait behind all of them."""

Until = Callable[[Callable[[], bool], float], Awaitable[bool]]
"""Waits until a condition holds, or until a deadline in the loop's time."""


class Settling(Protocol):
    """What the intake needs of a run that has ended."""

    id: str
    entry: bytes
    settlement: Settlement | None
    finish: Command | None
    """The command that settles it, once that has been issued."""
    slots: int
    """How many slots its end gives back."""


AnySettling = TypeVar("AnySettling", bound=Settling)


class Exchange(Generic[AnySettling]):
    """`free` slots, and the take that fills them. A slot is taken up by each job that `begin` gets, and given back when its
    settlement has been answered, or by `release`."""

    def __init__(
        self,
        store: Store,
        host: Host,
        slots: int,
        hold: Callable[[list[Taken]], list[AnySettling]],
        begin: Callable[[list[AnySettling]], None],
        ended: Callable[[AnySettling, bool | BeeQueueError], None],
        changed: asyncio.Event,
    ) -> None:
        self.closing = False
        self.cut_off = False
        self._free = slots
        self._store = store
        self._host = host
        self._hold = hold
        self._begin = begin
        self._ended = ended
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._take: tuple[Command, ...] = ()
        self._taken_id: Any = None
        self._reading: list[bytes] = []
        self._pump_is_due = False
        self._lot = min(max(slots // 2, LEAST_LOT), MOST_LOT)
        self._settling: list[AnySettling] = []
        self._unanswered = 0
        self._refused_in_a_row = 0
        self._refusal_timer: asyncio.TimerHandle | None = None

    # --- what leaves -----------------------------------------------------------------------------------------------------

    def pump_soon(self) -> None:
        """Pumps, when what has been scheduled so far has been done, if there is anything to send.

        While a take is open a slot that becomes free is none: its answer may be next, and what that begins goes first.
        """
        if not self._pump_is_due and (self._may_settle() or not self._take):
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _may_settle(self) -> bool:
        """Whether there is something to settle, and few enough answers are due."""
        return bool(self._settling) and self._unanswered < MOST_UNANSWERED

    def _pump(self) -> None:
        """Sends what has been settled, and keeps one take open while a slot is free."""
        self._pump_is_due = False
        finishes = []
        while self._may_settle():
            finishes.append(self._finish_next())
        if self._free and not (self._take or self._reading or self._refusal_timer or self.closing):
            self._take = self._store.take_blocking(finishes, self._free - 1, self._answered, self._read_behind)
        elif finishes:
            self._store.settle(finishes)

    def _finish_next(self) -> Command:
        attempts = self._settling[:AT_ONCE]
        del self._settling[:AT_ONCE]
        return self._finish(attempts)

    def _finish(self, attempts: list[AnySettling]) -> Command:
        settlements = [(attempt.id, attempt.entry, cast(Settlement, attempt.settlement)) for attempt in attempts]
        slots = sum([attempt.slots for attempt in attempts])
        on_reply = functools.partial(self._finished, attempts, slots)
        finish = self._store.finish(settlements, take=0 if self.closing else slots, on_reply=on_reply)
        for attempt in attempts:
            attempt.finish = finish
        self._unanswered += 1
        return finish

    def settle(self, attempt: AnySettling) -> None:
        """Settles a run that has its settlement, with others that end in the same step; a lot at a time, which Redis has while
        the next ones run."""
        self._settling.append(attempt)
        if len(self._settling) >= self._lot and self._may_settle():
            self._store.settle([self._finish_next()])
            self._store.flush()
        else:
            self.pump_soon()

    def withdraw(self, attempts: Collection[AnySettling], held: Collection[AnySettling]) -> list[AnySettling]:
        """Takes back the settlements of `runs` that have not been sent; returns the runs whose were. `held` has all runs."""
        back = [attempt for attempt in self._settling if attempt in attempts]
        self._settling = [attempt for attempt in self._settling if attempt not in attempts]
        for finish in {attempt.finish for attempt in attempts if attempt.finish is not None}:
            if self._store.withdraw(finish):
                self._unanswered -= 1
                together = [attempt for attempt in held if attempt.finish is finish]
                back += [attempt for attempt in together if attempt in attempts]
                if left := [attempt for attempt in together if attempt not in attempts]:
                    again = self._finish(left)
                    if finish.repeated:  # it may have been done the first time
                        again.args, again.repeated = again.repeat or again.args, True
                    self._store.settle([again])
        return back

    def release(self, slots: int = 1) -> None:
        """Gives slots back."""
        self._free += slots
        self.pump_soon()

    def arriving(self) -> list[str]:
        """The ids of jobs that have been taken, and whose data is on its way; also for the heart's thread."""
        ids = [self._taken_id, *self._reading]
        return [self._store.job_id(job_id) for job_id in ids if job_id and isinstance(job_id, bytes)]

    # --- what comes in ---------------------------------------------------------------------------------------------------

    def _answered(self, reply: Any) -> None:
        """The take's own reply; that of the script follows."""
        self._taken_id = reply

    def _read_behind(self, reply: Any) -> None:
        """The reply to the script behind the take: its job, and more for the other free slots."""
        answer, self._taken_id, self._take = self._taken_id, None, ()
        if isinstance(answer, BeeQueueError):
            self._refused(answer)
        else:  # also one that has brought no job
            self._refused_in_a_row = 0
        if isinstance(reply, BeeQueueError):
            if isinstance(answer, bytes):
                self._host.report(reply)
                self._read(answer, 0)
        else:
            taken, missing = self._store.taken_behind(answer if isinstance(answer, bytes) else None, reply)
            if missing is not None:
                self._read(missing, 0)
            self._fill(taken)
        self.pump_soon()
        self._changed.set()

    def _read(self, job_id: bytes, more: int) -> None:
        """Asks for the data of a job that was taken (empty: none was), and for more jobs."""
        self._reading.append(job_id)
        self._store.take(job_id, more, functools.partial(self._was_read, job_id))

    def _was_read(self, job_id: bytes, reply: Any) -> None:
        self._reading.remove(job_id)
        if isinstance(reply, BeeQueueError):
            self._host.report(reply)
            self._stop_if_cut_off(reply)
        else:
            self._fill(self._store.taken_from(reply))
        self.pump_soon()
        self._changed.set()

    def _finished(self, attempts: list[AnySettling], slots: int, reply: Any) -> None:
        """The reply to a settlement: the slots of its runs go to the jobs that it brought, or are free."""
        self._unanswered -= 1
        if refused := isinstance(reply, BeeQueueError):
            self._stop_if_cut_off(reply)
        taken: list[Taken] = []
        if not refused and len(reply) > len(attempts):
            if (refusal := self._store.refusal_in(reply, len(attempts))) is not None:
                self._host.report(refusal)
                reply.pop()
            taken = self._store.taken_from(reply, len(attempts))
        held = self._hold(taken) if taken else []  # before any listener may block the loop
        for index, attempt in enumerate(attempts):
            self._ended(attempt, reply if refused else self._store.settled_by(reply[index]))
            attempt.finish = None  # it refers to its runs: no circle stays, which would be left to the garbage collector
        self._free += slots - len(held)
        if held:
            self._begin(held)
        self.pump_soon()
        if self.closing:
            self._changed.set()

    def _stop_if_cut_off(self, error: BeeQueueError) -> None:
        """After an error on the command connection: more takes would strand more jobs on one that its owner has closed."""
        if isinstance(error, QueueClosed):
            self.cut_off = True
            self.close()

    def _fill(self, taken: list[Taken]) -> None:
        if taken:
            self._free -= len(taken)
            self._begin(self._hold(taken))

    def _refused(self, error: BeeQueueError) -> None:
        """Waits before the next take; a full Redis refuses blocking takes, but still lets jobs be moved by a script."""
        code = error.code if isinstance(error, CommandError) else ""
        if self.closing or code == "UNBLOCKED" or UNFIT.match(str(error)):  # the next take waits for another connection
            return
        self._host.report(error)
        self._refused_in_a_row += 1
        first = self._host.settings.initial_redis_failure_retry_delay
        delay = min(first * 2 ** (self._refused_in_a_row - 1), LONGEST_REFUSAL_DELAY_MS)
        self._refusal_timer = self._loop.call_later(delay / 1000, self._after_refusal, code == "OOM")

    def _after_refusal(self, full: bool) -> None:
        self._refusal_timer = None
        if full and self._free:
            self._read(b"", self._free)
        else:
            self.pump_soon()

    # --- the end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """From now on there is no new take."""
        self.closing = True
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()

    async def end(self, client_id: int | None, deadline: float, grace_s: float, until: Until) -> bool:
        """Returns when nothing is being taken any more; False when Redis does not answer by the deadline, or cannot be asked.

        Where CLIENT UNBLOCK is not permitted a take runs its course, as long as Redis answers.
        """
        answered_at = self._loop.time()

        def on_reply(reply: Any) -> None:
            nonlocal answered_at
            if isinstance(reply, QueueClosed):
                self.cut_off = True
            elif not isinstance(reply, ConnectionLost):
                answered_at = self._loop.time()

        while (self._take or self._reading) and not self.cut_off:
            if self._take and self._store.withdraw(self._take[1]):
                # the script waits for the connection, and so does its take, unless that was answered before the link was lost
                self._store.withdraw(self._take[0])
                self._take = ()
                continue
            if self._loop.time() > max(deadline, answered_at + grace_s):
                return False
            # again and again: one that comes before the take does nothing
            self._store.unblock(client_id if self._take else None, on_reply)
            await until(lambda: not self._take and not self._reading, self._loop.time() + UNBLOCK_EVERY_S)
        return not self.cut_off
