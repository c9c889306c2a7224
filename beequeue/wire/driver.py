"""redis-py: the only module that imports it, and the only one that catches its exceptions.

redis-py opens a connection, authenticates it and selects its database. For the event loop its socket is then handed over
(`open_connection`); a thread uses redis-py's own connection (`BlockingConnection`). Every failure becomes an error of ours, and
no message shows a password. `address.py` checks which arguments a caller may pass.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import hiredis
import redis.connection
import redis.credentials
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection as DriverConnection
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as BlockingRetry

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused
from beequeue.wire import tls

DriverClient = Redis

NOT_OURS = (
    "connection_class",
    "retry",
    "retry_on_error",
    "retry_on_timeout",
    "protocol",
    "health_check_interval",
    "decode_responses",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "himport_registry",
    "driver_info",
)
"""Arguments of redis-py's connections that a caller may pass, but that have no effect here."""

_NOT_BLOCKING = ("parser_class", "encoder_class", "redis_connect_func", "event_dispatcher", "connection_pool")
"""Arguments that only the connections of redis.asyncio understand."""

_BLOCKING: Mapping[type, Any] = {
    UnixDomainSocketConnection: redis.connection.UnixDomainSocketConnection,
    SSLConnection: redis.connection.SSLConnection,
    DriverConnection: redis.connection.Connection,
}
"""The blocking counterpart of each class of redis.asyncio; subclasses come before their parents."""

ABANDON_S = 0.5
"""How long to wait for an abandoned attempt to connect: a credential provider can swallow its cancellation."""
ALERT_S = 0.5
"""How long to listen for the alert of a TLS server that has closed a connection at once."""


class NoAnswer(ConnectionLost):
    """A connection could not be opened in time."""


class NotLetIn(ConnectionLost):
    """The server admits no client now: no credentials were given, it has too many clients, or it is not ready."""


# --- what redis-py knows about a setting ------------------------------------------------------------------------------


def kind_for(arguments: Mapping[str, Any]) -> Any:
    """The class of connection that `arguments` call for."""
    if arguments.get("path"):
        return UnixDomainSocketConnection
    return SSLConnection if arguments.get("ssl") else DriverConnection


def is_kind(value: object) -> bool:
    """Whether `value` is a class of redis.asyncio's connections."""
    return isinstance(value, type) and issubclass(value, tuple(_BLOCKING))


def is_unix(kind: Any) -> bool:
    """Whether connections of this class use a unix socket."""
    return issubclass(kind, UnixDomainSocketConnection)


def is_tls(kind: Any) -> bool:
    """Whether connections of this class use TLS."""
    return issubclass(kind, SSLConnection)


def is_credential_provider(value: object) -> bool:
    """Whether redis-py can ask `value` for credentials."""
    return isinstance(value, redis.credentials.CredentialProvider)


def arguments_of(client: DriverClient) -> dict[str, Any]:
    """The connection arguments of a client, `connection_class` among them."""
    pool = client.connection_pool
    return {**pool.connection_kwargs, "connection_class": pool.connection_class}


def parse(url: str) -> tuple[dict[str, Any], str | None]:
    """The arguments in a well-formed `url`, and their fault, if any. Raises nothing: a context could quote the URL."""
    try:
        arguments = dict(parse_url(url))
    except ValueError as error:  # names an option, never its value
        return {}, f"must be a URL: {error}"
    kind: Any = arguments.get("connection_class", DriverConnection)
    known = {name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters} | {*NOT_OURS}
    for name in arguments.keys() - known:  # not shown: it may be a piece of a password
        meant = difflib.get_close_matches(name, known, 1, 0.8)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        return {}, f"must only have options of redis-py's connections{hint}"
    return arguments, None


class Endpoint:
    """One Redis as redis-py reaches it: a class of connections and their arguments. Its `str` never shows a password."""

    def __init__(self, kind: Any, arguments: Mapping[str, Any]) -> None:
        self.kind = kind
        self.arguments = arguments
        self._asks_sentinel = "connection_pool" in arguments
        self._primary: dict[str, Any] = {}
        """Host and port that Sentinel named last."""

    def __str__(self) -> str:
        located = self.located
        where = located.get("path") or f"{located['host']}:{located.get('port', 6379)}"
        if self._asks_sentinel and not self._primary:
            where = "the server that Sentinel names"
        return f"{where}/{located.get('db', 0)}"

    __repr__ = __str__

    @property
    def located(self) -> dict[str, Any]:
        """The arguments, with the host and port of the server that Sentinel named last."""
        return {**self.arguments, **self._primary}

    def remember(self, driver: Any) -> None:
        """Notes which server an open connection led to, where Sentinel chose it."""
        if self._asks_sentinel:
            self._primary = {"host": driver.host, "port": driver.port}

    def blocking_arguments(self) -> dict[str, Any]:
        """The arguments for a thread's connection; raises `ConnectionLost` when only Sentinel knows the server."""
        if self._asks_sentinel and not self._primary:
            raise ConnectionLost(f"{self}: Sentinel has not been asked yet, and a thread cannot ask it", maybe_applied=False)
        return {name: value for name, value in self.located.items() if name not in _NOT_BLOCKING}

    def text_of(self, error: BaseException) -> str:
        """The text of an exception without the passwords that we know; starts with its class if it is not redis-py's."""
        text = _ARGUMENTS.sub("", str(error))
        if not isinstance(error, _DRIVERS_OWN):
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        for name in ("password", "ssl_password"):
            secret = self.arguments.get(name)
            secret = secret.decode(errors="replace") if isinstance(secret, bytes) else secret
            if isinstance(secret, str) and secret:
                text = text.replace(secret, "…").replace(repr(secret)[1:-1], "…")
        return text


_ARGUMENTS = re.compile(r",? with args beginning with:.*", re.DOTALL)
"""Redis repeats the arguments of a command that it does not know, even those of AUTH."""

# --- a connection for the event loop ----------------------------------------------------------------------------------


async def open_connection(endpoint: Endpoint, protocol: int) -> tuple[asyncio.Transport, object]:
    """Opens an authenticated connection with its database selected.

    Returns its transport, and an object that must be kept as long as the transport is used. Raises `ConnectionRefused` when
    Redis refuses it or a setting is wrong, and `ConnectionLost` when Redis cannot be reached now.
    """
    arguments = {**endpoint.arguments, "protocol": protocol, "retry": Retry(NoBackoff(), 0)}
    driver = _driver(endpoint.kind, endpoint, arguments)
    connecting = asyncio.create_task(_connect(driver), name="beequeue connecting")
    limit_s = endpoint.arguments["socket_connect_timeout"]  # the driver's own limit does not cover the handshake
    try:
        # not awaited itself: an exception of a credential provider, even GeneratorExit, must not be raised through this frame
        await asyncio.wait((connecting,), timeout=limit_s)
    except asyncio.CancelledError:
        await _abandon(driver, connecting)
        raise
    if not connecting.done():
        before_tls = is_tls(endpoint.kind) and driver._writer is None
        await _abandon(driver, connecting)
        hint = ": it cannot be reached, or does not speak TLS on this port" if before_tls else ""
        raise NoAnswer(f"{endpoint}: no answer within {limit_s:g} s{hint}", maybe_applied=False)
    error = asyncio.CancelledError() if connecting.cancelled() else connecting.exception()
    if error is not None:
        _close(driver, connecting)
        raise error if isinstance(error, _ENDS_THE_PROGRAM) else _translated(error, endpoint, protocol)
    endpoint.remember(driver)
    end = _end_of(driver)
    writer = _disown(driver)
    if end is not None:
        writer.transport.abort()
        raise ConnectionLost(f"{endpoint}: {end}", maybe_applied=False)
    return writer.transport, writer


def _driver(kind: Any, endpoint: Endpoint, arguments: Mapping[str, Any]) -> Any:
    """Makes a connection of redis-py, not open yet; raises `ConnectionRefused` when an argument is wrong."""
    wrong: object
    try:
        driver = kind(**arguments, driver_info=None)
        maker = getattr(driver, "ssl_context", None)  # a blocking connection has none, and makes its context while connecting
        wrong = tls.wrong_with(endpoint.arguments, maker) if is_tls(endpoint.kind) else None
    except Exception as error:  # nothing has been sent yet, so an argument is at fault
        wrong = endpoint.text_of(error)
    if wrong:
        raise ConnectionRefused(f"redis: {wrong}")
    return driver


async def _connect(driver: Any) -> None:
    try:
        await driver.connect()
        if not isinstance(driver, SSLConnection):
            return
        # with TLS 1.3 a server asks for a certificate only after the handshake; a relay without a backend closes then, too
        await driver.send_command("PING", check_health=False)
        with suppress(redis.exceptions.ResponseError):  # NOAUTH and NOPERM are answers too
            await driver.read_response()
    except redis.exceptions.ConnectionError as error:
        if isinstance(driver, SSLConnection) and (alert := await _alert(driver)) is not None:
            raise error from alert
        raise


async def _alert(driver: Any) -> ssl.SSLError | None:
    """Finds out why a TLS server closes at once. A second connection only listens: a failed write can hide the alert."""
    writer: Any = None
    try:
        async with asyncio.timeout(ALERT_S):
            reader, writer = await asyncio.open_connection(**driver._connection_arguments())
            await reader.read(1)
    except ssl.SSLError as alert:
        return alert
    except (OSError, UnicodeError):  # TimeoutError is an OSError
        pass
    finally:
        if writer is not None:
            writer.transport.abort()
    return None


async def _abandon(driver: Any, connecting: asyncio.Task[None]) -> None:
    """Ends an attempt to connect, and waits for its end, but not without limit."""
    connecting.add_done_callback(partial(_close, driver))
    # redis-py can swallow a cancellation, or wait for Redis after it, but not once its socket is gone
    if driver._writer is not None:
        driver._writer.transport.abort()
    connecting.cancel()
    await asyncio.wait((connecting,), timeout=ABANDON_S)


def _close(driver: Any, connecting: asyncio.Task[None]) -> None:
    """Closes the socket of an attempt that has failed or was abandoned."""
    _ = connecting.cancelled() or connecting.exception()  # retrieved, so that asyncio does not complain
    if driver._writer is not None:
        writer = _disown(driver)  # kept until it is closed, or it warns
        writer.transport.abort()


def _disown(driver: Any) -> Any:
    """Takes the stream from redis-py's connection, which then neither closes it nor warns about it."""
    writer = driver._writer
    driver._writer = driver._reader = None
    return writer


def _end_of(driver: Any) -> str | None:
    """Why an open connection cannot be used: it has ended already, or a reply came without a command; None if it can."""
    reader, parser = driver._reader, driver._parser
    if driver._writer.transport.is_closing() or reader.at_eof() or reader.exception() is not None:
        return "the connection was closed as soon as it was opened"
    if reader._buffer or (isinstance(kept := getattr(parser, "_reader", None), hiredis.Reader) and kept.has_data()):
        return "a reply came without a command"
    return None


# --- a connection for a thread ----------------------------------------------------------------------------------------


class BlockingConnection:
    """A connection for one thread, whose calls block for at most `timeout_s`; a call opens it when it is not open."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._driver: Any = None

    def call(self, *args: Any) -> Any:
        """Issues a command and waits for its reply; raises `RedisFailure`."""
        failure: BeeQueueError
        sent = False
        try:
            driver = self._driver
            if driver is None:
                driver = self._driver = self._open()
            driver.send_command(*args)
            sent = True
            return driver.read_response()
        except BeeQueueError:
            raise
        except redis.exceptions.ResponseError as error:
            if isinstance(error, _FOR_NOW):  # the next call may find another server there
                self.close()
            failure = CommandError(str(error))
        except Exception as error:  # including redis-py's reactions to a socket that `close` took away
            self.close()
            text = f"{self._endpoint}: {self._endpoint.text_of(error)}"
            failure = refusal_in(error, self._endpoint) or ConnectionLost(text, maybe_applied=sent)
        raise failure  # outside the handlers: the driver's error, as its context, could show a password

    def _open(self) -> Any:
        kind = next(blocking for ours, blocking in _BLOCKING.items() if issubclass(self._endpoint.kind, ours))
        arguments = self._endpoint.blocking_arguments()
        arguments |= {"socket_timeout": self._timeout_s, "socket_connect_timeout": self._timeout_s}
        arguments |= {"protocol": 2, "retry": BlockingRetry(NoBackoff(), 0)}
        driver = _driver(kind, self._endpoint, arguments)
        try:
            driver.connect()
            return driver
        except _ENDS_THE_PROGRAM:
            raise
        except BaseException as error:  # a credential provider can raise anything
            failure = _translated(error, self._endpoint, 2)
        driver.disconnect()
        raise failure

    def close(self) -> None:
        """Closes the socket. Another thread may do so: a call under way then fails with an arbitrary error."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.disconnect()


# --- failures as our own errors ---------------------------------------------------------------------------------------

_ENDS_THE_PROGRAM = (KeyboardInterrupt, SystemExit)
_DRIVERS_OWN = (redis.exceptions.RedisError, OSError)
"""Exceptions of redis-py and of the socket; any others come from a credential provider, for example."""
_REFUSALS = (
    ssl.SSLCertVerificationError,
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.ResponseError,
)
_FOR_NOW = (redis.exceptions.ClusterDownError, redis.exceptions.ReadOnlyError, redis.exceptions.TryAgainError)


def refusal_in(error: BaseException | None, endpoint: Endpoint) -> ConnectionRefused | None:
    """The refusal to raise, if `error`, which ended a connection, says that the server refused TLS; else None."""
    alert = tls.refusing_alert(error)
    if alert is None:
        return None
    given = endpoint.arguments.get("ssl_certfile")
    sent = f"our certificate is {given!r}" if given else "no ssl_certfile is given"
    return ConnectionRefused(f"{endpoint}: the server refuses TLS: {alert}; {sent}")


def _translated(error: BaseException, endpoint: Endpoint, protocol: int) -> BeeQueueError:
    """Translates an exception: refused, or not reachable now. redis-py wraps Redis's replies in its own exceptions."""
    error = _unwrapped(error)
    message = f"{endpoint}: {endpoint.text_of(error)}"
    if not isinstance(error, _DRIVERS_OWN):
        return NotLetIn(message, maybe_applied=False)
    if (refusal := refusal_in(error, endpoint)) is not None:
        return refusal
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _REFUSALS):
        cause = cause.__cause__ or cause.__context__
    if (
        isinstance(cause, _FOR_NOW)
        or str(cause).startswith("BUSY ")
        or isinstance(error, redis.exceptions.BusyLoadingError)
        or "max number of clients" in message
    ):
        return NotLetIn(message, maybe_applied=False)
    if cause is None:
        timed_out = isinstance(error, (TimeoutError, redis.exceptions.TimeoutError))  # redis-py's shorter limit for a handshake
        return (NoAnswer if timed_out else ConnectionLost)(message, maybe_applied=False)
    if protocol == 3 and ("unknown command" in message.lower() or "NOPROTO" in message):
        message = f"{endpoint} does not speak RESP3, which ordered events need (Redis 6 or newer); use ordered_events=False"
    return ConnectionRefused(message)


def _unwrapped(error: BaseException) -> BaseException:
    """The exception that redis-py wrapped, if it came from a credential provider, for example; else `error`."""
    cause = error.__cause__
    if isinstance(error, redis.exceptions.ConnectionError) and cause is not None and not isinstance(cause, _DRIVERS_OWN):
        return cause
    return error
