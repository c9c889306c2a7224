"""Worker processes, and what they have written down."""

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
    """One process; its file is read line by line, as far as it goes."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path, notes: Notes) -> None:
        self._process = process
        self._path = path
        self.notes = notes
        self._read = 0
        self._stopped = False
        self._killed = False
        self._running: Counter[tuple[str, int]] = Counter()
        self.words: Counter[str] = Counter()
        """How many lines begin with each word."""

    def look(self) -> None:
        """Reads what is new in the file."""
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
        """Id and number of the jobs that it has begun and not ended."""
        self.look()
        return list(self._running)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._killed = True
        self.notes.killed += 1

    async def stop(self) -> None:
        """SIGSTOP; returns when it has stopped (Linux)."""
        self._process.send_signal(signal.SIGSTOP)
        self._stopped = True
        status = Path(f"/proc/{self._process.pid}/stat")
        await until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)
        self._stopped = False

    def open_gate(self) -> None:
        """Its gated jobs end, those to come too."""
        self._process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def jump(self, *, ahead: bool) -> None:
        """Its clock is set by an hour; returns when it is."""
        self.look()
        jumped = self.words["jumped"]
        self._process.send_signal(signal.SIGUSR1 if ahead else signal.SIGUSR2)

        def has_jumped() -> bool:
            self.look()
            return self.words["jumped"] > jumped

        await until(has_jumped)

    @property
    def is_dead(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.returncode is not None

    async def end(self) -> int:
        """SIGTERM, and what it exits with."""
        if self._process.returncode is None:
            if self._stopped:
                self.go_on()
            self._process.terminate()
        return await self._process.wait()

    async def bury(self) -> None:
        """Ends it, if nothing else has."""
        if self._process.returncode is None and not self._killed:  # a second signal could find it gone, and take its exit code
            self._process.kill()
        await self._process.wait()
        self.look()


class Crew:
    """The workers of a queue, the killed ones too. `directory` gets their files."""

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
        """Lets one end in peace, which it must do."""
        self.alive.remove(worker)
        assert await worker.end() == 0

    async def replace_the_dead(self) -> int:
        """Hires another worker for each that a job has killed; how many those were."""
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
        """Returns when all take jobs."""

        def all_are() -> bool:
            self.look()
            return all(worker.words["ready"] for worker in self.alive)

        await until(all_are, 30)

    def look(self) -> Notes:
        """What all have written down by now."""
        for worker in self._all:
            worker.look()
        return self.notes

    def turn_page(self) -> None:
        """Forgets what was written down so far, and who has gone."""
        self.notes = Notes()
        self._all = self.alive.copy()
        for worker in self._all:
            worker.notes = self.notes

    async def dismiss(self) -> list[int]:
        """Lets all end in peace; their exit codes."""
        return list(await asyncio.gather(*(worker.end() for worker in self.alive)))

    async def bury(self) -> None:
        """Leaves no process."""
        for worker in self._all:
            await worker.bury()
