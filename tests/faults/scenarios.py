"""The faults: each function causes one fault under load and returns when its effect has shown.

Each asserts that the fault has happened. The ledger checks that no job was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from beequeue.job import now_ms
from tests.faults.connecting import (
    demoted_alive,
    ended_at_once,
    forgotten_flow,
    loading,
    paused_for_long,
    provider_fails,
    proxy_resets,
    refusals,
    replica_promoted,
    right_missing,
    server_stopped,
    slow_link,
)
from tests.faults.field import LOAD, PASSWORD, STALL_INTERVAL_MS, Field
from tests.faults.ledger import retries_of
from tests.faults.worker import HOUR_S, MAX_STALLS
from tests.relay import Line

Fault = Callable[[Field], Awaitable[None]]


async def kill_workers(field: Field) -> None:
    """kill -9 of a worker in the middle of jobs: others run them again. Another worker replaces it."""
    left: set[int] = set()
    while not left:  # It may have ended its jobs just before.
        victim = field.chance.choice(field.crew.alive)
        await field.until(victim.running)
        victim.kill()
        field.crew.alive.remove(victim)
        await victim.bury()
        left = {number for _, number in victim.running()}
        await field.crew.hire()
    await field.until(lambda: left <= field.crew.look().finished.keys())
    await field.crew.ready()


async def stop_a_worker(field: Field) -> None:
    """SIGSTOP until its jobs have been brought back, then SIGCONT: it finishes late. One job is removed meanwhile.

    On a busy machine a stall check may bring a job back, and another worker may end it, before this worker stops. So a job
    counts as brought back if a check did so since `stalled` was read, or if its end has been reported.
    """
    worker = field.chance.choice(field.crew.alive)
    while True:
        stalled = field.crew.look().stalled.copy()
        await field.until(lambda: len(worker.running()) > 1)
        await worker.stop()
        if len(held := worker.running()) > 1:
            break
        worker.go_on()
    late = field.crew.notes.errors["LateFinish"]
    removed_id, removed = held.pop()
    await field.producer.remove_job(removed_id)
    field.ledger.removed.add(removed)

    def are_back() -> bool:
        now = field.crew.look().stalled
        return all(now[job_id] > stalled[job_id] or number in field.ledger.told for job_id, number in held)

    await field.until(are_back)
    worker.go_on()
    await field.until(lambda: not set(worker.running()) & {*held, (removed_id, removed)})
    await field.until(lambda: field.crew.look().errors["LateFinish"] > late)


async def killer_job(field: Field) -> None:
    """A job kills each worker that runs it. After too many stalls it fails with that reason; the other jobs go on."""
    number, job, ended = field.new_job(ms=100, kills=True)
    await field.save_all([(number, job, ended)])
    deaths = 0

    async def is_over() -> bool:
        nonlocal deaths
        deaths += await field.crew.replace_the_dead()
        # The job's end may be noticed before the last death.
        return ended.done() and deaths == field.crew.victims(number)

    await field.until(is_over)
    assert field.crew.look().started[number] == MAX_STALLS + 1
    assert field.crew.notes.stalled[str(job.id)] >= MAX_STALLS
    await field.crew.ready()


async def handler_blocks(field: Field) -> None:
    """A handler blocks its event loop for several stall intervals: its job stays active, and the log names it."""
    number, job, ended = field.new_job(ms=4 * STALL_INTERVAL_MS, blocks=True)
    attempts = 1 + retries_of(number)
    await field.save_all([(number, job, ended)])
    stalled = field.crew.look().stalled[str(job.id)]
    await field.until(ended.done)
    await field.until(lambda: field.crew.look().finished[number])
    assert field.crew.notes.started[number] == attempts
    assert field.crew.notes.stalled[str(job.id)] == stalled
    assert field.crew.notes.blocked[str(job.id)] >= attempts


async def clock_jumps(field: Field) -> None:
    """Workers' clocks jump by an hour, one ahead, one back, both back, while jobs run and delayed jobs wait.

    The producer's clock sets the due time of a job; a worker raises the job when its own clock says so. So a worker whose clock
    is ahead raises jobs early, and jobs are late only if all workers' clocks are behind. Heartbeats and repeated stall checks
    use each process's monotonic clock. The clock of Redis, which expires a key, limits stall checks to one an interval. So no
    job is considered lost.
    """
    stalled = field.crew.look().stalled.copy()
    first, second = field.chance.sample(field.crew.alive, 2)
    long = [field.new_job(ms=3 * STALL_INTERVAL_MS) for _ in range(2)]
    await field.save_all(long)
    await first.jump(ahead=True)
    early = field.new_job(due=now_ms() + HOUR_S * 1000 // 2)
    await field.save_all([early])
    await early[2]
    await first.jump(ahead=False)
    await first.jump(ahead=False)
    in_time = field.new_job(due=now_ms() + 50)
    await field.save_all([in_time])
    await in_time[2]
    await second.jump(ahead=False)
    late = field.new_job(due=now_ms() + 50)
    await field.save_all([late])
    await field.more(4)
    await field.until(lambda: now_ms() > late[1].options["delay"])
    assert await late[1].is_in_set("delayed")
    for worker in (first, second):
        await worker.jump(ahead=True)
    await asyncio.gather(*(ended for _, _, ended in (late, *long)))
    for number, job, _ in long:
        assert field.crew.look().started[number] == 1 + retries_of(number)
        assert field.crew.notes.stalled[str(job.id)] == stalled[str(job.id)]


async def restart_with_aof(field: Field) -> None:
    """Redis is killed and comes back with everything that it had confirmed."""
    await field.restart(wipe=False)


async def restart_without_aof(field: Field) -> None:
    """Redis is killed and comes back empty: ids start again at 1, and each tracked job ends as unknown."""
    unknown = field.ledger.unknown
    await field.save_all([field.new_job(due=now_ms() + 3_600_000)])  # All others may have ended when Redis is killed.
    await field.restart(wipe=True)
    await field.until(lambda: not field.ledger.unsettled & field.ledger.forgotten)
    assert field.ledger.unknown > unknown


async def flush_scripts(field: Field) -> None:
    """SCRIPT FLUSH, repeatedly, under load."""
    refused = await refusals(field.redis, "NOSCRIPT")
    for _ in range(8):
        await field.redis.script_flush()
        await field.more(6)
    assert await refusals(field.redis, "NOSCRIPT") > refused


async def flush_scripts_in_save_all(field: Field) -> None:
    """SCRIPT FLUSH while one call saves many jobs: all are saved."""
    refused = await refusals(field.redis, "NOSCRIPT")
    await field.redis.script_flush()  # The flushes below may all come after the last script call.
    jobs = [field.new_job(ms=0) for _ in range(2_500)]
    saving = asyncio.create_task(field.save_all(jobs))
    while not saving.done():
        await field.redis.script_flush()
    await saving
    assert await refusals(field.redis, "NOSCRIPT") > refused
    await asyncio.gather(*(ended for _, _, ended in jobs))


async def cut_behind_finishes(field: Field) -> None:
    """The connection is cut between a settlement and its reply: the settlement is repeated, and counts once."""
    cuts = 0

    async def distort(line: Line, data: bytes) -> bytes:
        nonlocal cuts
        for words in _FINISHED[line.role]:
            if cuts < 3 and words in data:
                cuts += 1
                await line.pass_back(data[: data.index(words)])
                line.cut()
                return b""
        return data

    lost, unrecorded = field.crew.look().errors["ConnectionLost"], field.crew.notes.errors["OutcomeNotRecorded"]
    field.to_workers.distort = distort
    await field.until(lambda: cuts == 3 and field.crew.look().errors["ConnectionLost"] >= lost + 3)
    field.to_workers.distort = None
    assert field.crew.notes.errors["OutcomeNotRecorded"] == unrecorded


async def kill_each_connection(field: Field) -> None:
    """CLIENT KILL of every connection in turn: the producer's two and each worker's three."""
    await field.until(field.all_are_connected)
    clients = await field.clients()
    lost, reconnects = field.crew.look().errors["ConnectionLost"], field.producer.reconnects
    field.chance.shuffle(clients)
    for client in clients:
        await field.kill([client])
        await field.more(8)
    await field.until(lambda: field.crew.look().errors["ConnectionLost"] >= lost + len(clients) - 2)
    await field.until(lambda: field.producer.reconnects >= reconnects + 2)


async def pause_clients(field: Field) -> None:
    """CLIENT PAUSE for longer than the stall interval, then for writes only: no connection is given up."""
    await field.until(field.all_are_connected)
    reconnects = field.producer.reconnects
    await field.redis.client_pause(2 * STALL_INTERVAL_MS)
    await field.more()
    await field.redis.client_pause(2 * STALL_INTERVAL_MS, all=False)
    await field.more()
    assert field.producer.reconnects == reconnects


async def relay_cuts(field: Field) -> None:
    """Connections are cut at random moments."""
    lost = field.crew.look().errors["ConnectionLost"] + field.producer.reconnects
    # A cut that hits an attempt to connect does not count.
    while field.crew.look().errors["ConnectionLost"] + field.producer.reconnects < lost + 6:
        field.chance.choice(field.lines()).cut()
        await field.more(6)


async def relay_delays(field: Field) -> None:
    """Everything that Redis sends arrives late, with a different delay on each connection."""

    async def distort(line: Line, data: bytes) -> bytes:
        await asyncio.sleep(field.chance.uniform(0, 0.03))
        return data

    field.distort(distort)
    await field.more(60)
    field.distort(None)


async def relay_halves(field: Field) -> None:
    """Everything that Redis sends arrives in two pieces; sometimes the connection is cut between them, within a reply."""
    cuts = 0

    async def distort(line: Line, data: bytes) -> bytes:
        nonlocal cuts
        middle = field.chance.randrange(len(data))
        await line.pass_back(data[:middle])
        if middle and cuts < 4 and field.chance.random() < 0.03:
            cuts += 1
            line.cut()
            return b""
        await asyncio.sleep(0.001)  # The other side reads the first piece.
        return data[middle:]

    field.distort(distort)
    await field.until(lambda: cuts == 4)
    await field.more()
    field.distort(None)


async def relay_goes_silent(field: Field) -> None:
    """Every connection is half-open: nothing passes, and neither side is told. Redis still answers takes on it."""
    await field.until(field.all_are_connected)
    lost, reconnects = field.crew.look().errors["ConnectionLost"], field.producer.reconnects
    for line in (lines := field.lines()):
        line.dead = True
    await field.until(lambda: field.crew.look().errors["ConnectionLost"] >= lost + 2 * len(field.crew.alive))
    await field.until(lambda: field.producer.reconnects > reconnects)
    await field.producer.check_health()  # on the connection that nothing else uses
    for line in lines:
        line.cut()


async def memory_runs_out(field: Field) -> None:
    """maxmemory: saves are refused, the queue drains, and saves work again when there is memory."""
    refused = field.save_errors["CommandError OOM"]
    await field.redis.config_set("maxmemory", 1)
    await field.until(lambda: field.save_errors["CommandError OOM"] > refused + LOAD)
    key = field.producer.to_key

    async def is_drained() -> bool:
        return not await field.redis.exists(key("waiting"), key("active"), key("delayed"))

    await field.until(is_drained)
    await field.redis.config_set("maxmemory", 0)


async def password_changes(field: Field) -> None:
    """The password changes and all connections are killed: new ones are refused until it is changed back."""
    await field.redis.config_set("requirepass", "another")
    refused, refusals = field.crew.look().errors["ConnectionRefused"], len(field.refusals)
    await field.more()  # Open connections survive.
    await field.kill(await field.clients())
    await field.until(lambda: field.crew.look().errors["ConnectionRefused"] > refused)
    await field.until(lambda: len(field.refusals) > refusals)
    await field.redis.config_set("requirepass", PASSWORD)
    await field.until(field.all_are_connected)


async def ten_thousand_due(field: Field) -> None:
    """10,000 delayed jobs are due at the same time."""
    jobs = [field.new_job(due=now_ms() + 3_600_000, ms=0) for _ in range(10_000)]
    await field.save_all(jobs)
    assert await field.redis.zcard(field.producer.to_key("delayed")) >= len(jobs)
    await field.make_due(jobs)
    await asyncio.gather(*(ended for _, _, ended in jobs))


_FINISHED = {"command": (b"*3\r\n:1\r\n", b"*1\r\n:1\r\n"), "take": (b"*1\r\n:1\r\n",), "event": ()}
"""By role: the first bytes of a reply to a settlement that succeeded. No other reply begins so."""


FAULTS: dict[str, Fault] = {
    function.__name__.replace("_", "-"): function
    for function in (
        kill_workers,
        stop_a_worker,
        killer_job,
        handler_blocks,
        clock_jumps,
        restart_with_aof,
        restart_without_aof,
        flush_scripts,
        flush_scripts_in_save_all,
        cut_behind_finishes,
        kill_each_connection,
        pause_clients,
        relay_cuts,
        relay_delays,
        relay_halves,
        relay_goes_silent,
        memory_runs_out,
        password_changes,
        replica_promoted,
        demoted_alive,
        ten_thousand_due,
        proxy_resets,
        provider_fails,
        right_missing,
        loading,
        paused_for_long,
        server_stopped,
        slow_link,
        forgotten_flow,
        ended_at_once,
    )
}
"""By name, in the order in which they run alone."""
