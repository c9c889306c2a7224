"""The race of bee-queue's issue 189, forced: a relay decides which of two sockets is read first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from beequeue import ConnectionLost, Job, JobFailed, OutcomeUnknown
from tests.conftest import MakeQueue, Seen, echo, until
from tests.relay import Relay

JOBS = 20


@pytest.mark.parametrize("own_ids", [False, True], ids=["automatic ids", "own ids"])
async def test_two_sockets_lose_every_event_that_overtakes_its_reply(make_queue: MakeQueue, url: str, own_ids: bool) -> None:
    """The reply to each save comes after its job's last event. Each event is lost, and each binding stays."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False, ordered_events=False).ready()
        make_queue(get_events=False).process(echo)
        of_queue, of_jobs = Seen(), Seen()
        producer.on("job succeeded", of_queue)
        jobs = [producer.create_job(number) for number in range(JOBS)]
        for number, job in enumerate(jobs):
            job.on("succeeded", of_jobs)
            if own_ids:
                job.set_id(f"job {number}")
        relay.hold("command")
        saving = asyncio.gather(*(job.save() for job in jobs))
        await of_queue.reaches(JOBS)
        assert not saving.done()
        relay.release("command")
        await saving
        assert of_jobs.calls == []
        assert len(producer.jobs) == JOBS
        await producer.close()


@pytest.mark.parametrize("own_ids", [False, True], ids=["automatic ids", "own ids"])
async def test_one_socket_loses_none_however_late_it_is_read(make_queue: MakeQueue, url: str, own_ids: bool) -> None:
    """All replies and all events come late and in one read. Each event finds its job, and no binding stays."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False).ready()
        worker = make_queue(get_events=False)
        worker.process(echo)
        done, of_jobs = Seen(), Seen()
        worker.on("succeeded", done)
        jobs = [producer.create_job(number) for number in range(JOBS)]
        for number, job in enumerate(jobs):
            job.on("succeeded", of_jobs)
            if own_ids:
                job.set_id(f"job {number}")
        relay.hold("event")
        saving = asyncio.gather(*(job.save() for job in jobs))
        await done.reaches(JOBS)
        assert not saving.done()
        relay.release("event")
        await saving
        assert sorted(result for (result,) in await of_jobs.reaches(JOBS)) == list(range(JOBS))
        assert producer.jobs == {}
        await producer.close()


async def test_code_behind_a_save_may_still_listen(make_queue: MakeQueue, url: str) -> None:
    """A reply and its event come in one read; the code that awaited the save runs in between."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False).ready()
        worker = make_queue(get_events=False)
        worker.process(echo)
        done, heard = Seen(), Seen()
        worker.on("succeeded", done)

        async def save_and_listen() -> None:
            job = await producer.create_job({}).save()
            job.on("succeeded", heard)

        relay.hold("event")
        saving = asyncio.gather(*(save_and_listen() for _ in range(JOBS)))
        await done.reaches(JOBS)
        relay.release("event")
        await saving
        await heard.reaches(JOBS)
        await producer.close()


async def test_one_socket_loses_none_when_every_byte_comes_alone(make_queue: MakeQueue, url: str) -> None:
    """Replies and events are cut at every byte, and one byte is read while the worker is at the next."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False).ready()
        relay.split("event")
        make_queue(get_events=False).process(echo, 3)
        of_jobs = Seen()

        async def chain(number: int) -> None:
            for step in range(10):
                job = producer.create_job([number, step])
                job.on("succeeded", of_jobs)
                await job.save()

        await asyncio.gather(*(chain(number) for number in range(3)))
        assert sorted(result for (result,) in await of_jobs.reaches(30)) == [[n, s] for n in range(3) for s in range(10)]
        assert producer.jobs == {}
        await producer.close()


async def test_what_stands_close_behind_a_reply_is_heard_in_order(make_queue: MakeQueue, url: str) -> None:
    """EV-23, EV-24: The events of a retried job, and of jobs that others saved, come in one read with its reply."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False).ready()
        other = await make_queue(is_worker=False, get_events=False).ready()
        worker = make_queue(get_events=False)
        done = Seen()
        worker.on("succeeded", done)

        async def handler(job: Job) -> str:
            await job.report_progress(job.options.get("retries", 0))
            if job.options.get("retries"):
                raise ValueError("again")
            return "done"

        relay.hold("event")
        heard: list[list[str]] = []

        async def save_and_listen(job: Job) -> None:
            heard.append(log := [])
            for event in ("progress", "retrying", "succeeded", "failed"):
                job.on(event, lambda outcome, event=event: log.append(f"{event} {outcome}"))
            await job.save()

        worker.process(handler)
        saving = []
        for _ in range(JOBS):
            saving.append(asyncio.create_task(save_and_listen(producer.create_job({}).retries(2))))
            await other.create_job({}).retries(1).save()
        await done.reaches(2 * JOBS)
        assert not any(task.done() for task in saving)
        relay.release("event")
        await asyncio.gather(*saving)
        await until(lambda: producer.jobs == {})
        assert (
            heard == [["progress 2", "retrying again", "progress 1", "retrying again", "progress 0", "succeeded done"]] * JOBS
        )
        await producer.close()


async def test_a_connection_that_drops_before_the_reply_binds_nothing(make_queue: MakeQueue, url: str) -> None:
    """QK-22: The save may have been applied, and its error says so. The job runs, and this queue does not wait for it."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False, reconnect=lambda attempt: 10).ready()
        worker = make_queue(get_events=False)
        done = Seen()
        worker.on("succeeded", done)
        worker.process(echo)
        relay.hold("event")
        saving = asyncio.gather(*(producer.create_job(number).save() for number in range(JOBS)), return_exceptions=True)
        await done.reaches(JOBS)
        for line in relay.lines:
            if line.role == "event":
                line.cut()
        relay.release("event")
        for error in await saving:
            assert isinstance(error, ConnectionLost)
            assert error.maybe_applied
        assert producer.jobs == {}
        await until(lambda: producer.reconnects == 1)
        job = await producer.create_job("behind").save()
        assert await job.result() == "behind"
        assert len(make_queue.claim(ConnectionLost)) == 1
        await producer.close()


async def test_a_connection_that_drops_between_the_replies_and_the_events(make_queue: MakeQueue, url: str) -> None:
    """The jobs are bound, and their events will not be repeated: the queue asks how they ended, and invents no result."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False, reconnect=lambda attempt: 10).ready()
        worker = await make_queue(get_events=False).ready()
        done = Seen()
        worker.on("succeeded", done)
        relay.hold("event")
        relay.cut_before("event", b"message")
        jobs = [producer.create_job(number) for number in range(JOBS)]
        saving = asyncio.gather(*(job.save() for job in jobs))
        worker.process(echo)
        await done.reaches(JOBS)
        relay.release("event")
        assert await saving == jobs
        for job in jobs:
            with pytest.raises(OutcomeUnknown):
                await job.result()
        assert producer.jobs == {}
        assert (producer.unknown_outcomes, producer.reconnects) == (JOBS, 1)
        assert len(make_queue.claim(ConnectionLost)) == 1
        await producer.close()


async def test_what_ended_while_the_connection_was_down_is_found(make_queue: MakeQueue, url: str, redis: Any) -> None:
    """Pub/sub has no replay. After a reconnect the queue asks about each tracked job, and invents no result."""
    async with Relay(url) as relay:
        producer = await make_queue(redis=relay.url, is_worker=False, reconnect=lambda attempt: 10).ready()
        worker = make_queue(get_events=False)

        async def handler(job: Job) -> None:
            if job.data == "bad":
                raise ValueError("bad luck")

        good, bad, gone, waiting = [await producer.create_job(data).save() for data in ("good", "bad", "gone", "waiting")]
        unknown = Seen()
        good.on("unknown", unknown)
        relay.hold("event")
        done = Seen()
        worker.on("succeeded", done)
        worker.on("failed", done)
        await worker.ready()
        waited = asyncio.create_task(waiting.result())
        await redis.hdel(worker.to_key("jobs"), gone.id)
        await redis.lrem(worker.to_key("waiting"), 0, gone.id)
        await redis.lrem(worker.to_key("waiting"), 0, waiting.id)
        worker.process(handler)
        await done.reaches(2)
        for line in relay.lines:
            line.cut()
        relay.release("event")
        await until(lambda: len(producer.jobs) == 1)
        assert not waited.done()
        assert len(unknown.calls) == 1
        with pytest.raises(OutcomeUnknown, match="job 1: it succeeded, but no event brought its result"):
            await good.result()
        with pytest.raises(JobFailed, match="^ValueError: bad luck$"):
            await bad.result()
        with pytest.raises(OutcomeUnknown, match="job 3: it is gone"):
            await gone.result()
        await redis.rpush(worker.to_key("waiting"), waiting.id)
        assert await waited is None
        assert producer.unknown_outcomes == 2
        await until(lambda: producer.reconnects == 2)
        assert len(make_queue.claim(ConnectionLost)) == 2
        await producer.close()
