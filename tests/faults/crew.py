"""Worker processes, and their notes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from pathlib import Path

from harness.children import end_with_parent
from tests.conftest import until
from tests.faults.ledger import Notes
from tests.faults.worker import CONCURRENCY


class Worker:
    """One process, and the file of its notes."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path, notes: Notes) -> None:
        self._process = process
        self._path = path
        self.notes = notes
        self._read = 0
        self._stopped = False
        self._killed = False
        self._running: Counter[tuple[str, int]] = Counter()
        self.words: Counter[str] = Counter()
        """How many notes begin with each word."""

    def look(self) -> None:
        """Reads the notes that are new."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.decode().splitlines():
            self.notes.read(line)
            what, *rest = line.split()
            self.words[what] += 1
            if what in ("start", "finish", "retry"):
                job = rest[0], int(rest[1])
                self._running[job] += 1 if what == "start" else -1
                if not self._running[job]:
                    del self._running[job]

    def running(self) -> list[tuple[str, int]]:
        """The id and number of each job that the worker has begun and not ended, by its notes."""
        self.look()
        return list(self._running)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._killed = True
        self.notes.killed += 1

    async def stop(self) -> None:
        """SIGSTOP; returns when the process has stopped (Linux)."""
        self._process.send_signal(signal.SIGSTOP)
        self._stopped = True
        status = Path(f"/proc/{self._process.pid}/stat")
        await until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)
        self._stopped = False

    def open_gate(self) -> None:
        """Lets its gated jobs end, now and later."""
        self._process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def jump(self, *, ahead: bool) -> None:
        """Sets its clock an hour ahead or back; returns when that is done."""
        self.look()
        jumped = self.words["jumped"]
        self._process.send_signal(signal.SIGUSR1 if ahead else signal.SIGUSR2)

        def has_jumped() -> bool:
            self.look()
            return self.words["jumped"] > jumped

        await until(has_jumped)

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""
        return self._process.returncode is not None

    async def end(self) -> int:
        """SIGTERM; returns the exit code."""
        if self._process.returncode is None:
            if self._stopped:
                self.go_on()
            self._process.terminate()
        return await self._process.wait()

    async def bury(self) -> None:
        """Kills the process, unless it has ended, and waits for it."""
        if (
            self._process.returncode is None and not self._killed
        ):  # A second signal could find it gone, and take its exit code from asyncio.
            self._process.kill()
        await self._process.wait()
        self.look()


class Crew:
    """The workers of a queue, including the killed ones. Their files go to `directory`."""

    def __init__(self, url: str, name: str, directory: Path, stall_interval: int, mood: Path) -> None:
        self.notes = Notes()
        self.alive: list[Worker] = []
        self._all: list[Worker] = []
        self._arguments = (url, name)
        self._directory = directory
        self._stall_interval = stall_interval
        self._mood = mood
        self._hired = 0
        self.complaints = directory / "stderr"

    async def hire(self, concurrency: int = CONCURRENCY) -> Worker:
        """Starts a worker."""
        self._hired += 1
        path = self._directory / f"worker-{self._hired}"
        path.touch()
        arguments = ["-m", "tests.faults.worker", *self._arguments, str(path)]
        arguments += [str(self._stall_interval), str(self._mood), str(concurrency)]
        with self.complaints.open("ab") as complaints:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stderr=complaints, preexec_fn=end_with_parent()
            )
        worker = Worker(process, path, self.notes)
        self._all.append(worker)
        self.alive.append(worker)
        return worker

    async def retire(self, worker: Worker) -> None:
        """Closes a worker, which must exit with 0."""
        self.alive.remove(worker)
        assert await worker.end() == 0

    async def replace_the_dead(self) -> int:
        """Starts another worker for each one that a job has killed; returns how many those were."""
        dead = [worker for worker in self.alive if worker.is_dead]
        for worker in dead:
            self.alive.remove(worker)
            self.notes.killed += 1
            await worker.bury()
            await self.hire()
        return len(dead)

    def victims(self, number: int) -> int:
        """How many workers have begun the job with this number and never ended it."""
        return sum(any(held == number for _, held in worker.running()) for worker in self._all)

    async def ready(self) -> None:
        """Waits until all workers take jobs."""

        def all_are() -> bool:
            self.look()
            return all(worker.words["ready"] for worker in self.alive)

        await until(all_are, 30)

    def look(self) -> Notes:
        """The notes of all workers up to now."""
        for worker in self._all:
            worker.look()
        return self.notes

    def turn_page(self) -> None:
        """Forgets all notes so far, and the workers that have ended."""
        self.notes = Notes()
        self._all = self.alive.copy()
        for worker in self._all:
            worker.notes = self.notes

    async def dismiss(self) -> list[int]:
        """Closes all workers; returns their exit codes."""
        return list(await asyncio.gather(*(worker.end() for worker in self.alive)))

    async def bury(self) -> None:
        """Kills every process that is left."""
        for worker in self._all:
            await worker.bury()
