"""Where Redis is, and how to get in: URLs, TLS, passwords; a socket that is authenticated, for the event loop or for a thread.

The only module that imports the driver, and the only one that catches its exceptions. No message shows a password.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import os
import re
import ssl
from collections.abc import Mapping, Sequence
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
from beequeue.wire.url import as_redis, is_host, wrong_with

RedisSetting = str | Mapping[str, Any] | Redis | None
"""A URL, redis-py's connection arguments, a client to take the settings of, or None for 127.0.0.1:6379."""

_NOT_OURS = (
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


ALERT_S = 0.5
"""How long a connection by TLS that was closed at once is looked into."""


class NoAnswer(ConnectionLost):
    """Nothing came within the time for a connection to be opened."""


class NotLetIn(ConnectionLost):
    """Something is there, but lets nobody in now: no credentials were given, there are too many clients, it is not ready."""


class Address:
    """Where Redis is and how to get in. Its `str` never shows a password."""

    def __init__(self, setting: RedisSetting) -> None:
        if setting is None:
            arguments: dict[str, Any] = {}
        elif isinstance(setting, str):
            arguments, wrong = _from_url(setting)
            if wrong:
                raise ValueError(f"redis {wrong}")
        elif isinstance(setting, Redis):
            arguments = dict(setting.connection_pool.connection_kwargs)
            arguments["connection_class"] = setting.connection_pool.connection_class
        elif isinstance(setting, Mapping):
            arguments = dict(setting)
        else:
            raise TypeError(f"redis must be a URL, a dict of connection arguments or a client, not {type(setting).__name__}")
        if "socket" in arguments:  # bee-queue's name
            arguments["path"] = arguments.pop("socket")
        self._setting = setting  # a pool that asks Sentinel is only weakly held by its connections' arguments
        self._class = arguments.get("connection_class") or _class_for(arguments)
        if not (isinstance(self._class, type) and issubclass(self._class, tuple(_BLOCKING))):
            raise TypeError(f"redis: connection_class must be a class of redis.asyncio's connections, not {self._class!r}")
        self._arguments = {name: value for name, value in arguments.items() if name not in _NOT_OURS}
        self._arguments.pop("ssl", None)
        if issubclass(self._class, UnixDomainSocketConnection):
            self._arguments.pop("host", None)
            self._arguments.pop("port", None)
        else:
            self._arguments.setdefault("host", "127.0.0.1")
        if self._arguments.get("socket_connect_timeout") is None:
            self._arguments["socket_connect_timeout"] = 10
        if issubclass(self._class, SSLConnection) and self._arguments.get("ssl_password") is None:
            self._arguments["ssl_password"] = _no_passphrase
        _check(self._arguments)
        self._asks_sentinel = "connection_pool" in self._arguments
        self._master: dict[str, Any] | None = None

    def __str__(self) -> str:
        named = self._arguments | (self._master or {})
        where = named.get("path") or f"{named['host']}:{named.get('port', 6379)}"
        if self._asks_sentinel and self._master is None:
            where = "the server that Sentinel names"
        return f"{where}/{named.get('db', 0)}"

    __repr__ = __str__

    async def open(self, protocol: int) -> tuple[asyncio.Transport, object]:
        """A transport that is authenticated, has its database and is alive; and what must be kept as long as it is used.

        Raises `ConnectionRefused` when Redis said no or a setting is wrong, `ConnectionLost` when it cannot be reached now.
        """
        driver = self._driver(self._class, protocol=protocol, retry=Retry(NoBackoff(), 0))
        connecting = asyncio.create_task(_connect(driver), name="beequeue connecting")
        limit = self._arguments["socket_connect_timeout"]
        failure: BeeQueueError | None = None
        try:
            async with asyncio.timeout(limit):  # the driver's own does not cover the handshake
                await asyncio.shield(connecting)
        except BaseException as error:
            timed_out = not connecting.done() and isinstance(error, TimeoutError)
            if not connecting.done():
                # the driver may swallow a cancellation, or wait for Redis behind it, but not once its socket is gone
                if driver._writer is not None:
                    driver._writer.transport.abort()
                connecting.cancel()
                await asyncio.wait((connecting,), timeout=limit)  # a credential provider may swallow it, too
            if connecting.done():
                _give_up(driver, connecting)
            else:
                connecting.add_done_callback(partial(_give_up, driver))
            if timed_out:
                failure = NoAnswer(f"{self}: no answer within {limit:g} s", maybe_applied=False)
            elif isinstance(error, Exception) or not (_is_being_cancelled() or _ends_all(error, connecting)):
                failure = _translated(error, self, protocol)
            else:
                raise
        if failure is not None:  # outside of the block: an error's context has what the driver, or a provider, said
            raise failure
        if self._asks_sentinel:
            self._master = {"host": driver.host, "port": driver.port}
        end = _end_of(driver)
        writer = _disown(driver)
        if end is not None:
            writer.transport.abort()
            raise ConnectionLost(f"{self}: {end}", maybe_applied=False)
        return writer.transport, writer

    async def accepts(self, limit_s: float) -> bool:
        """Whether something accepts a connection there, be it that it says nothing."""
        where = self._arguments | (self._master or {})
        try:
            async with asyncio.timeout(limit_s):
                if path := where.get("path"):
                    _, writer = await asyncio.open_unix_connection(path)
                else:
                    _, writer = await asyncio.open_connection(where["host"], where.get("port", 6379))
        except (OSError, TimeoutError):
            return False
        writer.transport.abort()
        return True

    def open_blocking(self, timeout_s: float) -> Any:
        """The same for a thread that waits for each reply, at most so long: the driver's connection."""
        kind = next(blocking for ours, blocking in _BLOCKING.items() if issubclass(self._class, ours))
        others: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        if self._asks_sentinel:
            if self._master is None:
                raise ConnectionLost(f"{self}: it has not been asked yet, and a thread cannot ask it", maybe_applied=False)
            others |= self._master
        driver = self._driver(kind, **others, protocol=2, retry=BlockingRetry(NoBackoff(), 0), leave_out=_NOT_BLOCKING)
        try:
            driver.connect()
            return driver
        except (Exception, asyncio.CancelledError) as error:  # the latter of a credential provider: nothing cancels a thread
            failure = _translated(error, self, 2)
        driver.disconnect()
        raise failure

    def _driver(self, kind: Any, *, leave_out: Sequence[str] = (), **others: Any) -> Any:
        """The driver's connection, not open yet; raises `ConnectionRefused` when an argument is wrong."""
        arguments = {name: value for name, value in self._arguments.items() if name not in leave_out}
        wrong: object
        try:
            driver = kind(**arguments | others, driver_info=None)
            wrong = _wrong_with_tls(driver, arguments) if issubclass(self._class, SSLConnection) else None
        except Exception as error:  # nothing has been sent yet: it is the arguments
            wrong = self._without_secrets(error)
        if wrong:
            raise ConnectionRefused(f"redis: {wrong}")
        return driver

    def _without_secrets(self, error: BaseException) -> str:
        """What an exception says, with its class when it is not the driver's, and without the passwords that are known."""
        text = _ARGUMENTS.sub("", str(error))
        if not isinstance(error, (redis.exceptions.RedisError, OSError)):
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        for name in ("password", "ssl_password"):
            secret = self._arguments.get(name)
            secret = secret.decode(errors="replace") if isinstance(secret, bytes) else secret
            if isinstance(secret, str) and secret:
                text = text.replace(secret, "…").replace(repr(secret)[1:-1], "…")
        return text


_ARGUMENTS = re.compile(r",? with args beginning with:.*", re.DOTALL)
"""What Redis repeats of a command that it does not know, be it AUTH."""


async def _connect(driver: Any) -> None:
    try:
        await driver.connect()
        if not isinstance(driver, SSLConnection):
            return
        # with TLS 1.3 a server that wants a certificate says so behind the handshake, and so does a relay without a backend
        await driver.send_command("PING", check_health=False)
        with suppress(redis.exceptions.ResponseError):  # an answer too: NOAUTH, NOPERM
            await driver.read_response()
    except redis.exceptions.ConnectionError as error:
        if isinstance(driver, SSLConnection) and (alert := await _alert(driver)) is not None:
            raise error from alert
        raise


async def _alert(driver: Any) -> ssl.SSLError | None:
    """Why a server closes at once: another connection listens, as a write to one that is closed can hide the alert."""
    writer: Any = None
    try:
        async with asyncio.timeout(ALERT_S):
            reader, writer = await asyncio.open_connection(**driver._connection_arguments())
            await reader.read(1)
    except ssl.SSLError as alert:
        return alert
    except (OSError, UnicodeError):  # and TimeoutError, which is one
        pass
    finally:
        if writer is not None:
            writer.transport.abort()
    return None


def _end_of(driver: Any) -> str | None:
    """Why a connection that is open cannot be used: the driver has seen its end, or a reply to no command; None if it can."""
    reader, parser = driver._reader, driver._parser
    if driver._writer.transport.is_closing() or reader.at_eof() or reader.exception() is not None:
        return "the connection was closed as soon as it was open"
    if reader._buffer or (isinstance(kept := getattr(parser, "_reader", None), hiredis.Reader) and kept.has_data()):
        return "a reply came to no command"
    return None


def _give_up(driver: Any, connecting: asyncio.Task[None]) -> None:
    """Closes what an attempt that has ended, or was given up, has opened."""
    _ = connecting.cancelled() or connecting.exception()
    if driver._writer is not None:
        writer = _disown(driver)  # kept until it is closed, or it warns
        writer.transport.abort()


def _ends_all(error: BaseException, connecting: asyncio.Task[Any]) -> bool:
    """Whether the program is to end, or its loop is closed; not so where a credential provider has raised what means that."""
    raised = not connecting.cancelled() and connecting.done() and connecting.exception() is error
    return isinstance(error, (KeyboardInterrupt, SystemExit)) or not (raised or isinstance(error, asyncio.CancelledError))


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _no_passphrase() -> str:
    """In place of a prompt on the terminal."""
    raise ValueError("it is encrypted, and ssl_password is not given")


_KEY_SETTINGS = ("ssl_certfile", "ssl_keyfile", "ssl_password")


def _wrong_with_tls(driver: Any, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the files that TLS needs, with the file's name."""
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := arguments.get(name)) is not None:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                return f"{name} {path!r}: {error.strerror}"
    certificate, key, password = (arguments.get(name) for name in _KEY_SETTINGS)
    if key and not certificate:
        return f"ssl_keyfile {key!r} needs an ssl_certfile"
    if certificate:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password)
        except Exception as error:
            what = f"ssl_keyfile {key!r}, of ssl_certfile {certificate!r}" if key else f"ssl_certfile {certificate!r}"
            why = getattr(error, "reason", None) or error
            if isinstance(error, ssl.SSLError) and error.reason is None and _is_encrypted(key or certificate):
                why = "it cannot be decrypted with this ssl_password"  # OpenSSL says "PEM lib", of whatever is wrong
            return f"{what}: {why}"
    try:
        authorities = [arguments.get(name) for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")]
        if any(authorities):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(*authorities)
        context = getattr(driver, "ssl_context", None)  # the blocking driver has none, and makes it when it connects
        if context is not None:
            context.get()
    except Exception as error:
        told = {name: value for name, value in arguments.items() if name.startswith("ssl_") and name not in _KEY_SETTINGS}
        given = ", ".join(name if name == "ssl_ca_data" else f"{name} {value!r}" for name, value in told.items())
        return f"{given or 'TLS'}: {getattr(error, 'reason', None) or error}"
    return None


def _is_encrypted(key: str | os.PathLike[str]) -> bool:
    with open(key, "rb") as file:
        return b"ENCRYPTED" in file.read()


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises `TypeError` or `ValueError` that names a wrong connection argument; never shows a password."""
    for name in ("host", "path", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ca_path"):
        value = arguments.get(name)
        if name in arguments and not (isinstance(value, (str, os.PathLike)) or (value is None and name != "host")):
            raise TypeError(f"redis: {name} must be a string, not {value!r}")
        if isinstance(value, (str, os.PathLike)) and "\0" in os.fspath(value):
            raise ValueError(f"redis: {name} must have no NUL, and has one: {value!r}")
    if isinstance(arguments.get("host"), str) and not is_host(arguments["host"]):
        raise ValueError(f"redis: host must be a host's name or address, not {arguments['host']!r}")
    for name, least, most in (("port", 1, 65_535), ("db", 0, 2**31 - 1)):
        value = arguments.get(name, least)
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12 else value
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise ValueError(f"redis: {name} must be a number from {least} to {most}, not {value!r}")
    for name in ("username", "password"):
        if not isinstance(arguments.get(name), (str, bytes, int, float, None.__class__)):
            raise TypeError(f"redis: {name} must be a string, not {type(arguments[name]).__name__}")
    for name in ("socket_connect_timeout", "socket_timeout"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"redis: {name} must be a number of seconds, more than 0, not {value!r}")
    provider = arguments.get("credential_provider")
    if provider is not None and not isinstance(provider, redis.credentials.CredentialProvider):
        raise TypeError(f"redis: credential_provider must be a redis.CredentialProvider, not {type(provider).__name__}")


_BLOCKING: Mapping[type, Any] = {
    UnixDomainSocketConnection: redis.connection.UnixDomainSocketConnection,
    SSLConnection: redis.connection.SSLConnection,
    DriverConnection: redis.connection.Connection,
}
_NOT_BLOCKING = ("parser_class", "encoder_class", "redis_connect_func", "event_dispatcher", "connection_pool")
"""What asyncio's connections have of their own."""


def _disown(driver: Any) -> Any:
    """The driver's stream, which it then neither closes nor warns about."""
    writer = driver._writer
    driver._writer = driver._reader = None
    return writer


def check_redis_url(url: str) -> None:
    """Raises `ValueError` when `url` is not one that `Queue` takes; the message begins with "must" and shows no password."""
    _, wrong = _from_url(url)
    if wrong:
        raise ValueError(wrong)


def _from_url(url: str) -> tuple[dict[str, Any], str | None]:
    """The driver's arguments, and what is wrong; not as an exception, whose context would have the driver's."""
    if wrong := wrong_with(url):
        return {}, wrong
    try:
        arguments = dict(parse_url(as_redis(url)))
    except ValueError as error:  # names an option, never its value
        return {}, f"must be a URL: {error}"
    kind: Any = arguments.get("connection_class", DriverConnection)
    known = {name for each in kind.__mro__ for name in inspect.signature(each.__init__).parameters} | {*_NOT_OURS}
    for name in arguments.keys() - known:  # which may be a piece of a password
        meant = difflib.get_close_matches(name, known, 1, 0.8)
        return {}, f"must have options of redis-py's connections only{f'; is one meant to be {meant[0]}?' if meant else ''}"
    try:
        _check(arguments)
    except (TypeError, ValueError) as error:
        return {}, f"must be a URL: {re.split(', not |: ', str(error).removeprefix('redis: '))[0]}"
    return arguments, None


def _class_for(arguments: Mapping[str, Any]) -> Any:
    if arguments.get("path"):
        return UnixDomainSocketConnection
    return SSLConnection if arguments.get("ssl") else DriverConnection


_REFUSALS = (
    ssl.SSLCertVerificationError,
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.ResponseError,
)
_FOR_NOW = (redis.exceptions.ClusterDownError, redis.exceptions.ReadOnlyError, redis.exceptions.TryAgainError)


_REFUSING_ALERTS = re.compile(
    r"ALERT_(\w*CERTIFICATE\w*|UNKNOWN_CA|HANDSHAKE_FAILURE|ACCESS_DENIED|PROTOCOL_VERSION|INSUFFICIENT_SECURITY"
    r"|UNRECOGNIZED_NAME)"
)
"""What the other side says when TLS will not do: no certificate, one that it does not trust, no common version."""


def refusal_in(error: BaseException | None, address: Address) -> ConnectionRefused | None:
    """The refusal, if what ended a connection (the argument of `connection_lost`) is one by TLS; else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ssl.SSLError) and (alert := _REFUSING_ALERTS.search(getattr(error, "reason", None) or "")):
            what = alert[1].lower().replace("_", " ")
            given = address._arguments.get("ssl_certfile")
            sent = f"our certificate is {given!r}" if given else "no ssl_certfile is given"
            return ConnectionRefused(f"{address}: the server refuses TLS: {what}; {sent}")
        error = error.__cause__ or error.__context__
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """What a credential provider, say, has raised, where the driver has wrapped it in an error of its own."""
    cause = error.__cause__
    foreign = isinstance(error, redis.exceptions.ConnectionError) and cause is not None
    return cause if foreign and not isinstance(cause, (redis.exceptions.RedisError, OSError)) else error  # type: ignore[return-value]


_TOO_MANY = "max number of clients"


def _translated(error: BaseException, address: Address, protocol: int) -> BeeQueueError:
    """An exception as ours: refused, or not reachable now. The driver wraps what Redis said in its own."""
    error = _unwrapped(error)
    message = f"{address}: {address._without_secrets(error)}"
    if not isinstance(error, (redis.exceptions.RedisError, OSError)):  # of a credential provider, say
        return NotLetIn(message, maybe_applied=False)
    if (refusal := refusal_in(error, address)) is not None:
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
    if cause is None:  # the driver has a shorter time-out of its own for the handshake
        kind = NoAnswer if isinstance(error, (TimeoutError, redis.exceptions.TimeoutError)) else ConnectionLost
        return kind(message, maybe_applied=False)
    if protocol == 3 and ("unknown command" in message.lower() or "NOPROTO" in message):
        message = f"{address} does not speak RESP3, which ordered events need (Redis 6 or newer); use ordered_events=False"
    return ConnectionRefused(message)


class BlockingConnection:
    """A connection for one thread, whose calls block for at most `timeout_s`; each call opens it if need be."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._driver: Any = None

    def call(self, *args: Any) -> Any:
        """Issues a command and waits for its reply; raises `RedisFailure`."""
        failure: BeeQueueError
        sent = False
        try:
            driver = self._driver
            if driver is None:
                driver = self._driver = self._address.open_blocking(self._timeout_s)
            driver.send_command(*args)
            sent = True
            return driver.read_response()
        except BeeQueueError:
            raise
        except redis.exceptions.ResponseError as error:
            if isinstance(error, _FOR_NOW):  # the next call may find another server there
                self.close()
            failure = CommandError(str(error))
        except Exception as error:  # also whatever the driver makes of a socket that `close` has taken away
            self.close()
            text = f"{self._address}: {self._address._without_secrets(error)}"
            failure = refusal_in(error, self._address) or ConnectionLost(text, maybe_applied=sent)
        raise failure

    def close(self) -> None:
        """Closes the socket; from another thread, a call under way ends with some error or other."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.disconnect()
