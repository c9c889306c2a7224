"""Opening a queue: its attributes, its connections and when they open, refusals, and the scripts it loads."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from beequeue import BeeQueueError, ConnectionLost, ConnectionRefused, Job, Queue, QueueClosed, QueueSettings
from beequeue.job import BUILT_IN_STRATEGIES, now_ms
from beequeue.store.scripts import SCRIPTS
from harness.server import Server, find_server, running_server
from tests.conftest import MakeQueue, Seen, echo, until
from tests.observe import beequeue_tasks, calls_of, clients, freeze, present, soon, thaw
from tests.relay import Relay

CALLS: dict[str, Callable[[Queue], Awaitable[Any]]] = {
    "save": lambda queue: queue.create_job({}).save(),
    "save later": lambda queue: queue.create_job({}).delay_until(now_ms() + 60_000).save(),
    "save_all": lambda queue: queue.save_all([queue.create_job({})]),
    "get_job": lambda queue: queue.get_job("1"),
    "get_jobs": lambda queue: queue.get_jobs("waiting"),
    "remove_job": lambda queue: queue.remove_job("1"),
    "clean": lambda queue: queue.clean("succeeded"),
    "check_health": lambda queue: queue.check_health(),
    "check_stalled_jobs": lambda queue: queue.check_stalled_jobs(),
    "destroy": lambda queue: queue.destroy(),
    "Job.from_id": lambda queue: Job.from_id(queue, "1"),
    "report_progress": lambda queue: queue.create_job({}).set_id("1").report_progress(1),
    "remove": lambda queue: queue.create_job({}).set_id("1").remove(),
    "retry": lambda queue: queue.create_job({}).set_id("1").retry(),
    "is_in_set": lambda queue: queue.create_job({}).set_id("1").is_in_set("waiting"),
}
"""Every call that talks to Redis."""


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# --- the attributes of a queue ----------------------------------------------------------------------------------------


def test_the_attributes_of_a_queue(name: str, url: str) -> None:
    """C-17, C-23, QK-09"""
    queue = Queue(name, url, prefix="own", stall_interval=100)
    assert queue.name == name
    assert queue.jobs == {}
    assert queue.settings == QueueSettings(prefix="own", stall_interval=100)
    assert queue.key_prefix == f"own:{name}:"
    assert queue.to_key("any thing") == f"own:{name}:any thing"
    assert queue.paused is False
    asyncio.run(queue.close())
    assert queue.paused is True


def test_each_queue_has_strategies_of_its_own(name: str, url: str) -> None:
    """C-21, C-17"""
    one, other = Queue(name, url), Queue(name, url)
    assert one.backoff_strategies == BUILT_IN_STRATEGIES
    assert set(one.backoff_strategies) == {"immediate", "fixed", "exponential"}
    one.backoff_strategies["own"] = lambda job: 1
    del one.backoff_strategies["fixed"]
    assert other.backoff_strategies == BUILT_IN_STRATEGIES
    one.create_job({}).backoff("own", 1)
    with pytest.raises(ValueError, match="^unknown strategy$"):
        other.create_job({}).backoff("own", 1)


async def test_only_a_queue_that_raises_delayed_jobs_has_a_timer(make_queue: MakeQueue) -> None:
    """C-20"""
    for activates in (False, True):
        queue = await make_queue(activate_delayed_jobs=activates).ready()
        assert ("beequeue delayed jobs" in beequeue_tasks()) is activates
        await queue.close()
    with pytest.raises(ValueError, match="^near_term_window must be at least 1 ms, not 0$"):
        make_queue(activate_delayed_jobs=True, near_term_window=0)


def test_wrong_calls_raise_at_once(name: str, url: str) -> None:
    """ER-01: settings, setters and misuse of `process`, without an await and without a loop"""
    with pytest.raises(ValueError, match="stall_interval"):
        Queue(name, url, stall_interval=0)
    with pytest.raises(ValueError, match="name must be a non-empty string"):
        Queue("", url)
    queue = Queue(name, url, is_worker=False)
    job = queue.create_job(object())
    with pytest.raises(BeeQueueError, match="non-worker"):
        queue.process(echo)
    with pytest.raises(ValueError, match="Retries"):
        job.retries(-1)
    with pytest.raises(ValueError, match="Timeout"):
        job.timeout(-1)
    with pytest.raises(ValueError, match="unknown strategy"):
        job.backoff("unheard of", 1)
    with pytest.raises(ValueError, match="timestamp"):
        job.delay_until(-1)
    saving = job.save()  # nothing is raised before its await
    with pytest.raises(TypeError, match="not JSON serializable"):
        asyncio.run(saving)


# --- which connections, and when --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "connections", "channels"),
    [
        ({}, 3, {"events"}),
        ({"ordered_events": False}, 3, {"events"}),
        ({"activate_delayed_jobs": True}, 3, {"events", "earlierDelayed"}),
        ({"get_events": False}, 2, set()),
        ({"get_events": False, "activate_delayed_jobs": True}, 3, {"earlierDelayed"}),
        ({"is_worker": False}, 2, {"events"}),
        ({"is_worker": False, "get_events": False}, 1, set()),
        ({"is_worker": False, "get_events": False, "activate_delayed_jobs": True}, 2, {"earlierDelayed"}),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else str(value),
)
async def test_which_connections_and_channels(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, settings: dict[str, Any], connections: int, channels: set[str]
) -> None:
    """C-03, C-14, C-15, R-01: all of them exist when ready() returns"""
    queue = await make_queue(redis=own_server.url, **settings).ready()
    assert set(await own_redis.pubsub_channels()) == {queue.to_key(channel) for channel in channels}
    present = await clients(own_server)
    assert len(present) == connections
    assert sum(client["sub"] != "0" for client in present) == (1 if channels else 0)


async def test_the_constructor_begins_to_connect_and_does_not_wait(own_server: Server, make_queue: MakeQueue) -> None:
    """C-13, C-06: before any call, while Redis does not answer"""
    freeze(own_server)
    queue = make_queue(redis=own_server.url)
    ready = Seen()
    queue.on("ready", ready)
    assert "not ready" in repr(queue)
    thaw(own_server)
    await ready.reaches(1)
    assert len(await clients(own_server)) == 3


def test_made_outside_a_loop_it_opens_nothing_before_its_first_call(own_server: Server, name: str) -> None:
    """C-13"""
    queue = Queue(name, own_server.url)

    async def use() -> None:
        assert await clients(own_server) == []
        assert (await queue.check_health()).waiting == 0
        assert len(await clients(own_server)) == 3
        await queue.close()

    asyncio.run(use())


async def test_without_auto_connect_nothing_is_opened_before_connect(own_server: Server, make_queue: MakeQueue) -> None:
    """C-07"""
    queue = make_queue(redis=own_server.url, auto_connect=False)
    assert await queue.ready() is queue
    assert await clients(own_server) == []
    assert "not ready" in repr(queue)
    assert await queue.connect() is True
    assert len(await clients(own_server)) == 3


async def test_connecting_twice_opens_nothing_twice(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """QK-02, R-07: one attempt, one subscription, one `ready`; after close() it raises"""
    queue = make_queue(redis=own_server.url)
    ready, of_queue = Seen(), Seen()
    queue.on("ready", ready)
    queue.on("job succeeded", of_queue)
    assert [*await asyncio.gather(queue.connect(), queue.connect())] == [True, True]
    assert await queue.connect() is True
    assert len(await clients(own_server)) == 3
    queue.process(echo)
    for _ in range(2):
        await (await queue.create_job({}).save()).result()
    assert [job_id for job_id, _ in of_queue.calls] == ["1", "2"]
    assert ready.calls == [()]
    await queue.close()
    with pytest.raises(QueueClosed, match="^closed$"):
        await queue.connect()


async def test_the_connections_are_opened_at_the_same_time(make_queue: MakeQueue, url: str) -> None:
    """R-11: none of them waits for another's reply"""
    async with Relay(url) as relay:
        relay.hold("command")  # the role of every line that has sent no more than HELLO
        queue = make_queue(redis=relay.url)
        await until(lambda: len(relay.lines) == 3)
        assert "not ready" in repr(queue)
        relay.release("command")
        await queue.ready()
        await queue.close()


@pytest.mark.parametrize("last", ["event", "take"])
async def test_ready_once_the_last_connection_is_set_up(make_queue: MakeQueue, url: str, last: str) -> None:
    """R-11, R-01"""
    async with Relay(url) as relay:
        relay.hold(last)
        queue = make_queue(redis=relay.url)
        getting_ready = asyncio.create_task(queue.ready())
        await until(lambda: {line.role for line in relay.lines} == {"command", "event", "take"})
        await until(lambda: queue.client.connection.link)
        await queue.client.ping()
        assert not getting_ready.done()
        relay.release(last)
        assert await getting_ready is queue
        await queue.close()


async def test_ready_is_not_emitted_again_after_a_reconnect(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """R-10"""
    queue = make_queue(redis=own_server.url, reconnect=soon)
    ready = Seen()
    queue.on("ready", ready)
    await ready.reaches(1)
    for client in await clients(own_server):
        await own_redis.client_kill_filter(_id=client["id"])
    await until(lambda: queue.reconnects == 3)
    queue.process(echo)
    await (await queue.create_job({}).save()).result()
    assert ready.calls == [()]
    assert len(make_queue.claim(ConnectionLost)) == 3


# --- before it is ready -----------------------------------------------------------------------------------------------


@every_call
async def test_any_first_call_opens_the_queue_and_then_runs(
    make_queue: MakeQueue, call: Callable[[Queue], Awaitable[Any]]
) -> None:
    """R-05: no call needs ready() first"""
    await make_queue(is_worker=False).create_job({}).set_id("1").save()
    queue = await asyncio.to_thread(make_queue)  # no loop runs there
    assert "not ready" in repr(queue)
    await call(queue)
    assert "not ready" not in repr(queue)


async def test_a_queue_that_is_not_ready_is_running_and_takes_jobs(own_server: Server, make_queue: MakeQueue) -> None:
    """R-09, R-05: saves, reads and process wait for Redis and lose nothing"""
    freeze(own_server)
    queue = make_queue(redis=own_server.url)
    done = Seen()
    queue.on("job succeeded", done)
    assert queue.is_running() is True
    assert queue.process(echo) is queue
    saving = [asyncio.create_task(queue.create_job(number).save()) for number in range(3)]
    counting = asyncio.create_task(queue.check_health())
    await until(lambda: "beequeue command connection" in beequeue_tasks())
    assert not any(task.done() for task in (*saving, counting))
    thaw(own_server)
    assert [job.data for job in await asyncio.gather(*saving)] == [0, 1, 2]
    assert [result for _, result in await done.reaches(3)] == [0, 1, 2]
    await counting


async def test_an_absent_redis_is_waited_for(
    own_server: Server, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    """R-06, R-12, QK-04: connect() returns when Redis has come, and nothing is started twice"""
    own_server.stop()
    queue = make_queue(redis=own_server.url, reconnect=soon)
    connecting = asyncio.create_task(queue.connect())
    with caplog.at_level(logging.WARNING):
        await until(lambda: caplog.text.count("next attempt in 10 ms") >= 6)
    assert not connecting.done()
    own_server.start()
    assert await connecting is True
    assert (await queue.create_job({}).save()).id == "1"


async def test_an_unanswered_attempt_is_given_up(make_queue: MakeQueue, url: str) -> None:
    """R-12: after socket_connect_timeout, and the next attempt follows"""
    async with Relay(url) as relay:
        relay.hold("command")
        queue = make_queue(redis={"path": relay.url.removeprefix("unix://"), "socket_connect_timeout": 0.05}, reconnect=soon)
        await until(lambda: len(relay.lines) > 2 * 3, 2)
        relay.release("command")
        await queue.ready()
        await queue.close()


@pytest.mark.parametrize("state", ["down", "silent"])
async def test_closing_meanwhile_leaves_no_connection_behind(own_server: Server, state: str) -> None:
    """R-06, CL-04: every waiting call raises"""
    (own_server.stop if state == "down" else lambda: freeze(own_server))()
    queue = Queue("q", own_server.url, reconnect=soon)
    waiting = [asyncio.create_task(queue.ready()), asyncio.create_task(queue.create_job({}).save())]
    await until(lambda: "beequeue command connection" in beequeue_tasks())
    await queue.close()
    for task in waiting:
        with pytest.raises(QueueClosed, match="^closed$"):
            await task
    assert beequeue_tasks() == []
    (own_server.start if state == "down" else lambda: thaw(own_server))()
    async with Queue("later", own_server.url, is_worker=False, get_events=False):
        await until(lambda: present(own_server, 1))


# --- refused ----------------------------------------------------------------------------------------------------------


async def test_connect_raises_what_ready_raises(make_queue: MakeQueue) -> None:
    """QK-01, R-12: each time, even when Redis would accept by then"""
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        queue = make_queue(redis=server.url)
        with pytest.raises(ConnectionRefused) as first:
            await queue.connect()
        async with Redis(unix_socket_path=str(server.socket), password="secret") as redis:
            await redis.config_set("requirepass", "")
        for call in (queue.connect, queue.ready, queue.check_health, queue.close):
            with pytest.raises(ConnectionRefused) as caught:
                await call()
            assert caught.value is first.value
        make_queue.queues.remove(queue)


@pytest.mark.parametrize("process", [False, True])
async def test_a_refusal_that_no_call_raises_is_reported(make_queue: MakeQueue, process: bool) -> None:
    """ER-03: once, although processing fails to start for the same reason"""
    with running_server(find_server(os.environ), "--requirepass", "secret") as server:
        queue = make_queue(redis=server.url)
        if process:
            queue.process(echo)
        assert queue._host.opening is not None
        await asyncio.wait((queue._host.opening,))
        with pytest.raises(ConnectionRefused):
            await queue.close()
        make_queue.queues.remove(queue)
        assert len(make_queue.claim(ConnectionRefused)) == 1


async def test_a_refused_async_with_leaves_no_connection_behind() -> None:
    """R-12: nobody else could close it"""
    may_not_subscribe = ("--user", "worker", "on", "nopass", "~*", "resetchannels", "+@all")
    with running_server(find_server(os.environ), *may_not_subscribe) as server:
        with pytest.raises(ConnectionRefused, match="NOPERM"):
            async with Queue("q", {"path": str(server.socket), "username": "worker", "password": "x"}):
                pass
        await until(lambda: present(server, 0), 2)


async def test_a_cancelled_async_with_leaves_no_attempt_behind(own_server: Server) -> None:
    """R-06"""
    own_server.stop()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), Queue("q", own_server.url, reconnect=soon):
            pass
    assert beequeue_tasks() == []


async def test_an_error_without_a_listener_is_logged(own_server: Server, own_redis: Any, caplog: Any) -> None:
    """QK-11"""
    async with Queue("unheard", own_server.url, is_worker=False, reconnect=soon) as queue:
        for client in await clients(own_server):
            await own_redis.client_kill_filter(_id=client["id"])
        await until(lambda: queue.reconnects == 2)
        assert (await queue.create_job({}).save()).id == "1"
    logged = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 2
    assert all(message.startswith("queue unheard: ConnectionLost: ") for message in logged)


# --- a client that lends its settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quits", [None, True])
async def test_a_client_that_lends_its_settings_is_left_alone(make_queue: MakeQueue, redis: Any, quits: bool | None) -> None:
    """C-04, QK-05: it is not closed, even if the queue shall close its command connection"""
    before = await redis.client_id()
    settings: dict[str, Any] = {} if quits is None else {"quit_command_client": quits}
    queue = make_queue(redis=redis, **settings)
    job = await queue.create_job("x").save()
    queue.process(echo)
    assert await job.result() == "x"
    await queue.close()
    assert await redis.client_id() == before
    assert await redis.hexists(queue.to_key("jobs"), job.id)


@pytest.mark.parametrize("state", ["unconnected", "closed"])
async def test_a_client_lends_its_settings_in_any_state(make_queue: MakeQueue, url: str, state: str) -> None:
    """C-05, QK-05"""
    client = Redis.from_url(url)
    if state == "closed":
        await client.ping()
        await client.aclose()
    queue = make_queue(redis=client, is_worker=False)
    assert (await queue.create_job({}).save()).id == "1"
    await queue.close()
    assert client.connection_pool._in_use_connections == set()
    await client.aclose()


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
async def test_a_ready_queue_has_loaded_the_scripts(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, shared: bool
) -> None:
    """SC-01, SC-03, R-01: unless ensure_scripts=False"""
    known = [script.sha for script in SCRIPTS.values()]
    none = await make_queue(redis=own_server.url, ensure_scripts=False).ready()
    assert await own_redis.script_exists(*known) == [False] * len(known)
    lender = none.client if shared else own_server.url
    await own_redis.script_load(SCRIPTS["add_job"].text)
    await make_queue(redis=own_server.url).ready()
    assert await own_redis.script_exists(*known) == [True] * len(known)
    assert (await make_queue(redis=lender).create_job({}).save()).id == "1"


async def test_scripts_are_run_by_their_sha(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """SC-02, SC-05, QK-07: their source goes to Redis once, and again when Redis has lost them"""
    queue = await make_queue(redis=own_server.url, is_worker=False).ready()
    loads = await calls_of(own_redis, "script|load")
    for _ in range(3):
        await queue.create_job({}).save()
    assert await calls_of(own_redis, "evalsha") == 3
    assert await calls_of(own_redis, "eval") == 0
    await own_redis.script_flush()
    assert await queue.save_all(queue.create_job({}) for _ in range(3)) == {}
    assert await calls_of(own_redis, "eval") == 1
    for _ in range(3):
        await queue.create_job({}).save()
        assert await queue.save_all(queue.create_job({}) for _ in range(3)) == {}
    assert await calls_of(own_redis, "eval") == 2
    assert await calls_of(own_redis, "script|load") == loads
    assert await own_redis.lrange(queue.to_key("waiting"), 0, -1) == [str(number) for number in range(18, 0, -1)]


@every_call
async def test_a_script_that_redis_has_lost_is_no_error(
    own_server: Server, own_redis: Any, make_queue: MakeQueue, call: Callable[[Queue], Awaitable[Any]]
) -> None:
    """SC-05, QK-06, QK-07: for each call, whether its script was loaded or not"""
    for ensured in (True, False):
        queue = make_queue(redis=own_server.url, ensure_scripts=ensured)
        await queue.create_job({}).set_id("1").save()
        await own_redis.script_flush()
        await call(queue)
        await queue.destroy()


async def test_a_worker_whose_scripts_redis_has_lost_goes_on(own_server: Server, own_redis: Any, make_queue: MakeQueue) -> None:
    """SC-05, QK-07: finish, take, the stall check, heartbeats, delayed jobs, and handing jobs back at close"""
    queue = make_queue(redis=own_server.url, activate_delayed_jobs=True)
    gate, started = asyncio.Event(), Seen()

    async def handler(job: Job) -> Any:
        started(job.data)
        await own_redis.script_flush()
        if job.data == "held":
            await gate.wait()
        return job.data

    jobs = [await queue.create_job(number).save() for number in range(3)]
    later = await queue.create_job("later").delay_until(now_ms() + 50).save()
    await own_redis.script_flush()
    queue.process(handler)
    assert [await job.result() for job in jobs] == [0, 1, 2]
    assert await later.result() == "later"
    held = await queue.create_job("held").save()
    await started.reaches(5)
    await own_redis.script_flush()
    with pytest.raises(BeeQueueError, match="timed out"):
        await queue.close(10)
    make_queue.queues.remove(queue)
    assert await own_redis.lrange(queue.to_key("waiting"), 0, -1) == [held.id]


# --- helpers ----------------------------------------------------------------------------------------------------------
