"""The exchange between a worker and Redis: it takes jobs, settles attempts, and does both in one write where it can.

It owns the slots, the attempts that hold them, and every command about them. It never runs a handler: `begin` gets new
attempts, `ended` gets each attempt that is over. `shorten` gets an attempt whose settlement Redis never accepts, and gives it
another one, or returns False.

Speed is decided here:
- a take is two commands in one write: BRPOPLPUSH, and the script that reads the job that was taken. Redis runs the script as
  soon as it answers the take, so a job arrives with its data after one trip;
- one script settles the attempts that end in one step of the loop, and brings the next jobs for their slots;
- the next take is sent after the attempts that have just begun have made their first step. Attempts that end by then are
  settled in the same write, before the take. A settlement queued behind an open take would wait for it, so it uses the
  command connection.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, OutcomeNotRecorded, QueueClosed
from beequeue.host import Host
from beequeue.store.store import LARGE, TAKE_WAIT_S, BlockingTake, Finished, Settlement, Store, Taken
from beequeue.wire.connection import MOST_LOSSES
from beequeue.wire.link import UNFIT, Command, Link
from beequeue.worker.attempt import Attempt

log = logging.getLogger("beequeue")

UNBLOCK_EVERY_S = 0.05
LONGEST_REFUSAL_DELAY_MS = 15_000
SETTLED_AT_ONCE = 64
"""How many attempts one script settles at most, so that it does not hold Redis up."""
LEAST_LOT, MOST_LOT = 4, 16
"""Attempts that end in one step are settled in lots of half the slots, within these bounds: small lots cost more writes, large
ones more waiting."""
MOST_UNANSWERED = 8
"""How many of these scripts may be unanswered: however many attempts end together, heartbeats and other commands of the queue
do not wait behind all of them."""


class Exchange:
    """Holds at most `slots` attempts. The end of an attempt frees its slot."""

    def __init__(
        self,
        store: Store,
        host: Host,
        slots: int,
        begin: Callable[[list[Attempt]], None],
        ended: Callable[[Attempt, bool | BeeQueueError], None],
        shorten: Callable[[Attempt, BeeQueueError], bool],
    ) -> None:
        self.held: dict[Attempt, None] = {}
        """The attempts that hold a job: from the moment its data has arrived until Redis has answered the settlement."""
        self.closing = False
        self.cut_off = False
        """Whether the command connection was closed by its owner."""
        self.answers = True
        """At the end: whether Redis answers on the command connection."""
        self._free = slots
        self._store = store
        self._host = host
        self._begin = begin
        self._ended = ended
        self._shorten = shorten
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._take: BlockingTake | None = None
        self._reading: list[str] = []
        """The jobs whose data was asked for once more; an empty id: jobs that are taken without a blocking take."""
        self._reads_on_takes = False
        """Whether the last of these came on the connection of takes."""
        self._pump_is_due = False
        self._lot = min(max(slots // 2, LEAST_LOT), MOST_LOT, slots)  # once all slots wait to be settled, nothing can join
        self._settling: list[Attempt] = []
        """The attempts whose settlement has not been sent."""
        self._unanswered = 0
        self._refused_in_a_row = 0
        self._refusal_timer: asyncio.TimerHandle | None = None

    # --- to Redis --------------------------------------------------------------------------------------------------------

    def pump_soon(self) -> None:
        """Pumps in the next step of the loop, if there is something to send.

        A slot that becomes free while a take is open sends nothing: the open take may bring a job for it.
        """
        if not self._pump_is_due and (self._take is None or self._may_settle()):
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _may_settle(self) -> bool:
        """Whether an attempt waits to be settled, and Redis does not owe too many answers."""
        return bool(self._settling) and self._unanswered < MOST_UNANSWERED

    def _pump(self) -> None:
        """Sends the settlements that wait, and keeps one take open while a slot is free."""
        self._pump_is_due = False
        finishes = []
        while self._may_settle():
            finishes.append(self._build_next_finish())
        if self._free and not (self._take or self._reading or self._refusal_timer or self.closing):
            self._take = self._store.take_blocking(finishes, self._free - 1, self._took)
        elif finishes:
            self._store.send_finishes(finishes)

    def settle(self, attempt: Attempt, settlement: Settlement) -> None:
        """Settles an attempt, together with others that end in the same step.

        A full lot is sent at once: Redis settles it while the next attempts run.
        """
        attempt.settlement = settlement
        if attempt.reused:
            self._end(attempt, False)
            self.release(attempt.slots)
            return
        self._settling.append(attempt)
        if len(self._settling) >= self._lot and self._may_settle():
            self._store.send_finishes([self._build_next_finish()])
            self._store.flush()
        else:
            self.pump_soon()

    def _build_next_finish(self) -> Command:
        attempts = self._settling[:SETTLED_AT_ONCE]
        del self._settling[:SETTLED_AT_ONCE]
        return self._build_finish(attempts)

    def _build_finish(self, attempts: list[Attempt], *, is_repeat: bool = False) -> Command:
        slots = sum([attempt.slots for attempt in attempts])
        finish = self._store.build_finish(
            [(attempt.id, attempt.entry, attempt.settlement) for attempt in attempts if attempt.settlement is not None],
            take=0 if self.closing else slots,
            on_end=functools.partial(self._finished, attempts, slots),
            is_repeat=is_repeat,
        )
        for attempt in attempts:
            attempt.finish = finish
        self._unanswered += 1
        return finish

    def release(self, slots: int = 1) -> None:
        """Gives slots back."""
        self._free += slots
        self.pump_soon()
        self.changed()

    # --- from Redis ------------------------------------------------------------------------------------------------------

    def _took(self, take: BlockingTake) -> None:
        """The blocking take is over; it has brought a job, and more for the other free slots, or nothing."""
        self._take = None
        if take.take_error is not None:
            self._refused(take.take_error)
        else:
            self._refused_in_a_row = 0
        if take.unread is not None:
            if take.read_error is not None:
                self._host.report(take.read_error)
            self._read(take.unread, 0)
        self._fill(take.taken)

    def _read(self, job_id: str, more: int) -> None:
        """Asks for the data of a job that was moved (empty: none was), and for at most `more` jobs besides.

        A job's data may be large, so it comes on the connection of takes, unless a take is open there.
        """
        self._reading.append(job_id)
        self._reads_on_takes = job_id != "" and self._take is None
        on_taken = functools.partial(self._was_read, job_id)
        self._store.take(job_id, more, on_taken, on_takes=self._reads_on_takes)

    def _was_read(self, job_id: str, taken: list[Taken] | BeeQueueError) -> None:
        self._reading.remove(job_id)
        if isinstance(taken, BeeQueueError):
            self._host.report(taken)
            self._stop_if_cut_off(taken)
            taken = []
        self._fill(taken)

    def _fill(self, taken: list[Taken]) -> None:
        if taken:
            held = self._hold(taken)
            self._free -= len(held)
            self._begin(held)
        self.pump_soon()
        self.changed()

    def _hold(self, taken: list[Taken]) -> list[Attempt]:
        """An attempt for each job whose data has arrived; asks for the data of the others, unless the close hands them back.

        The heartbeat reports all of them from now on, even while a listener or a handler blocks the loop.
        """
        attempts = [Attempt(job_id, entry) for job_id, entry in taken if entry is not LARGE or self.closing]
        self.held.update(dict.fromkeys(attempts))
        if len(attempts) < len(taken):
            for job_id, entry in taken:
                if entry is LARGE:
                    self._read(job_id, 0)
        return attempts

    def _finished(self, attempts: list[Attempt], slots: int, finished: Finished | BeeQueueError) -> None:
        """A settlement was answered: the slots of its attempts go to the jobs that it brought, or are free."""
        self._unanswered -= 1
        held: list[Attempt] = []
        if isinstance(finished, BeeQueueError):
            self._stop_if_cut_off(finished)
            if _is_too_large(attempts[0].finish, finished) and self._shorten(max(attempts, key=_size), finished):
                self._store.send_finishes([self._build_finish(attempts, is_repeat=True)])
                return
            for attempt in attempts:
                self._end(attempt, finished)
        else:
            if finished.refusal is not None:
                self._host.report(finished.refusal)
            if finished.taken:
                held = self._hold(finished.taken)  # before `ended` calls listeners, which may block the loop
            for attempt, answer in zip(attempts, finished.answers, strict=True):
                self._end(attempt, answer)
        self._free += slots - len(held)
        if held:
            self._begin(held)
        self.pump_soon()
        if self.closing:
            self.changed()

    def _end(self, attempt: Attempt, outcome: bool | BeeQueueError) -> None:
        """An attempt is over: Redis settled it (True), it came too late (False), or Redis could not settle it."""
        del self.held[attempt]
        self._ended(attempt, outcome)
        attempt.finish = None  # it refers to the attempt: a cycle would be left to the garbage collector

    def _stop_if_cut_off(self, error: BeeQueueError) -> None:
        """Stops taking when the owner of a shared command connection has closed it: more takes would strand more jobs."""
        if isinstance(error, QueueClosed):
            self.cut_off = True
            self.close()

    def _refused(self, error: BeeQueueError) -> None:
        """Waits before the next take. A full Redis refuses blocking takes, but lets a script move jobs."""
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
            self._read("", self._free)
        else:
            self.pump_soon()

    # --- held attempts ---------------------------------------------------------------------------------------------------

    def reported(self) -> list[Attempt]:
        """The attempts that the heartbeat reports; its thread calls this too.

        One stands for each job whose data is on its way, which may take longer than a stall interval.
        """
        take = self._take
        arriving = [*self._reading, take.arriving if take is not None else None]
        return [*self._own(), *(Attempt(job_id, b"") for job_id in arriving if job_id)]

    def _own(self) -> list[Attempt]:
        """The attempts whose id still belongs to their job."""
        return [attempt for attempt in list(self.held) if not attempt.reused]

    async def disown_reused_ids(self, link: Link) -> None:
        """Finds the attempts whose id belongs to another job now, before anything else is sent on a new `link`.

        A Redis that has come back empty hands out its ids again. An attempt from before would settle a job that it never saw,
        and Redis could not know. Redis cannot be lost without its connections, so this costs nothing at other times. Raises
        `ConnectionLost`; when Redis refuses to answer, no attempt is disowned.
        """
        held = list(self.held)
        try:
            entries = await self._store.entries_on(link, [attempt.id for attempt in held])
        except CommandError as refused:
            log.warning("queue %s: cannot check whether its jobs are still the same: %s", self._host.name, refused)
            return
        reused = [attempt for attempt, entry in zip(held, entries, strict=True) if not attempt.is_stored_as(entry)]
        for attempt in reused:
            attempt.reused = True
        for attempt in self._withdraw(reused):
            self._end(attempt, False)
            self.release(attempt.slots)

    def _withdraw(self, reused: list[Attempt]) -> list[Attempt]:
        """Takes back the settlements of reused ids that have not been sent; returns the attempts whose settlement was not."""
        back = [attempt for attempt in self._settling if attempt.reused]
        self._settling = [attempt for attempt in self._settling if not attempt.reused]
        for finish in {attempt.finish for attempt in reused if attempt.finish is not None}:
            if self._store.withdraw(finish):
                self._unanswered -= 1
                together = [attempt for attempt in self.held if attempt.finish is finish]
                back += [attempt for attempt in together if attempt.reused]
                if kept := [attempt for attempt in together if not attempt.reused]:
                    self._store.send_finishes([self._build_finish(kept, is_repeat=finish.repeated)])
        return back

    # --- the end ---------------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Makes `until` check again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Waits until `condition` holds, or until `deadline`, in the loop's time; returns whether it holds."""
        try:
            async with asyncio.timeout_at(deadline):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    def close(self) -> None:
        """Starts no more takes."""
        self.closing = True
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()

    async def end_takes(self, client_id: Callable[[], int | None], deadline: float, grace_s: float) -> bool:
        """Returns when nothing is being taken; False when nothing has come for `grace_s`, past the deadline.

        A job that arrives on a slow link is waited for while data moves on that link. Where CLIENT UNBLOCK is not permitted,
        the open take runs its course while Redis answers. `client_id` returns the id of the take's connection, if known.
        """
        now = self._loop.time
        moves: object = None
        patient_until = answered_at = now()
        runs_out_at = now() + TAKE_WAIT_S

        def on_reply(reply: Any) -> None:
            nonlocal patient_until, answered_at
            if isinstance(reply, QueueClosed):
                self.cut_off = True
            elif not isinstance(reply, ConnectionLost):
                answered_at = now()
                if unblocks is None or isinstance(reply, CommandError):
                    patient_until = max(patient_until, min(answered_at, runs_out_at))

        while (self._take or self._reading) and not self.cut_off:
            if self._take and self._store.withdraw_take(self._take):
                self._take = None
                continue
            if moves != (moves := self._store.moves(of_takes=self._take is not None or self._reads_on_takes)):
                patient_until = now()
            if now() > max(deadline, patient_until + grace_s):
                self.answers = now() <= answered_at + grace_s
                return False
            # again and again: an UNBLOCK that reaches Redis before the take does nothing
            unblocks = client_id() if self._take else None
            self._store.unblock(unblocks, on_reply)
            await self.until(lambda: not self._take and not self._reading, now() + UNBLOCK_EVERY_S)
        self.answers = not self.cut_off
        return self.answers

    async def hand_back(self, limit_s: float) -> None:
        """Returns the held jobs that are neither being settled nor in a thread that runs on; waits at most `limit_s`.

        Without an answer nothing is repeated: jobs that are still active are left to the stall check, and it reports this.
        """
        job_ids = [
            attempt.id
            for attempt in reversed(self._own())
            if not attempt.under_way and (attempt.call is None or attempt.call.cancelled())
        ]
        if not job_ids:
            return
        try:
            async with asyncio.timeout(limit_s):
                await self._store.hand_back(job_ids)
        except (BeeQueueError, TimeoutError) as error:
            why = str(error) or "Redis does not answer"
            self._host.report(OutcomeNotRecorded(f"jobs {', '.join(job_ids)} are left to the stall check: {why}"))


def _is_too_large(finish: Command | None, error: BeeQueueError) -> bool:
    """Whether Redis refused to read a settlement, or ended the connection each time: it limits the size of an argument."""
    if isinstance(error, CommandError):
        return "Protocol error" in str(error)
    return isinstance(error, ConnectionLost) and finish is not None and finish.losses > MOST_LOSSES


def _size(attempt: Attempt) -> int:
    settlement = attempt.settlement
    return 0 if settlement is None else len(settlement.entry or b"") + len(settlement.message)
