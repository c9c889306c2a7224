"""Where Redis is, and how to get in: URLs, TLS, passwords; a socket that is authenticated, for the event loop or for a thread.

The only module that imports the driver, and the only one that catches its exceptions. No message shows a password.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import redis.connection
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection as DriverConnection
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as BlockingRetry

from beequeue.errors import BeeQueueError, CommandError, ConnectionLost, ConnectionRefused

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


class NoAnswer(ConnectionLost):
    """Nothing came within the time for a connection to be opened."""


class Address:
    """Where Redis is and how to get in. Its `str` never shows a password."""

    def __init__(self, setting: RedisSetting) -> None:
        if setting is None:
            arguments: dict[str, Any] = {}
        elif isinstance(setting, str):
            try:
                arguments = _from_url(setting)
            except ValueError as error:
                raise ValueError(f"redis {error}") from None
        elif isinstance(setting, Redis):
            arguments = dict(setting.connection_pool.connection_kwargs)
            arguments["connection_class"] = setting.connection_pool.connection_class
        elif isinstance(setting, Mapping):
            arguments = dict(setting)
        else:
            raise TypeError(f"redis must be a URL, a dict of connection arguments or a client, not {type(setting).__name__}")
        if "socket" in arguments:  # bee-queue's name
            arguments["path"] = arguments.pop("socket")
        self._class = arguments.get("connection_class") or _class_for(arguments)
        self._arguments = {name: value for name, value in arguments.items() if name not in _NOT_OURS}
        self._arguments.pop("ssl", None)
        if self._class is UnixDomainSocketConnection:
            self._arguments.pop("host", None)
            self._arguments.pop("port", None)
        else:
            self._arguments.setdefault("host", "127.0.0.1")
        self._arguments.setdefault("socket_connect_timeout", 10)

    def __str__(self) -> str:
        named = self._arguments
        where = named.get("path") or f"{named['host']}:{named.get('port', 6379)}"
        return f"{where}/{named.get('db', 0)}"

    __repr__ = __str__

    async def open(self, protocol: int) -> tuple[asyncio.Transport, object]:
        """A transport that is authenticated and has its database; and what must be kept as long as it is used.

        Raises `ConnectionRefused` when Redis said no, `ConnectionLost` when it cannot be reached now.
        """
        try:
            driver = self._class(**self._arguments, protocol=protocol, retry=Retry(NoBackoff(), 0), driver_info=None)
        except (TypeError, redis.exceptions.RedisError) as error:
            raise ConnectionRefused(f"redis: {error}") from None
        connecting = asyncio.create_task(driver.connect(), name="beequeue connecting")
        limit = self._arguments["socket_connect_timeout"]
        try:
            async with asyncio.timeout(limit):  # the driver's own does not cover the handshake
                await asyncio.shield(connecting)
        except BaseException as error:
            if not connecting.done():
                # the driver may swallow a cancellation, or wait for Redis behind it, but not once its socket is gone
                if driver._writer is not None:
                    driver._writer.transport.abort()
                connecting.cancel()
                await asyncio.wait((connecting,))
                _ = connecting.cancelled() or connecting.exception()
            if driver._writer is not None:
                writer = _disown(driver)  # kept until it is closed, or it warns
                writer.transport.abort()
            if isinstance(error, TimeoutError):
                raise NoAnswer(f"{self}: no answer within {limit:g} s", maybe_applied=False) from None
            if isinstance(error, (redis.exceptions.RedisError, OSError)):
                raise _translated(error, self, protocol) from None
            raise
        writer = _disown(driver)
        return writer.transport, writer

    async def accepts(self, limit_s: float) -> bool:
        """Whether something accepts a connection there, be it that it says nothing."""
        where = self._arguments
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
        """The same for a thread that waits for each reply, at most so long; raises what the driver does."""
        kind = next(blocking for ours, blocking in _BLOCKING.items() if issubclass(self._class, ours))
        arguments = {name: value for name, value in self._arguments.items() if name not in _NOT_BLOCKING}
        arguments |= {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        driver = kind(**arguments, protocol=2, retry=BlockingRetry(NoBackoff(), 0), driver_info=None)
        driver.connect()
        return driver


_BLOCKING: Mapping[type, Any] = {
    UnixDomainSocketConnection: redis.connection.UnixDomainSocketConnection,
    SSLConnection: redis.connection.SSLConnection,
    DriverConnection: redis.connection.Connection,
}
_NOT_BLOCKING = ("parser_class", "encoder_class", "redis_connect_func", "event_dispatcher")
"""What asyncio's connections have of their own."""


def _disown(driver: Any) -> Any:
    """The driver's stream, which it then neither closes nor warns about."""
    writer = driver._writer
    driver._writer = driver._reader = None
    return writer


def check_redis_url(url: str) -> None:
    """Raises `ValueError` when `url` is not one that `Queue` takes; the message begins with "must" and shows no password."""
    _from_url(url)


def _from_url(url: str) -> dict[str, Any]:
    shown = _without_secrets(url)
    hint = "; in a password / ? # @ [ ] are written %2F %3F %23 %40 %5B %5D" if "@" in url else ""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # what it says quotes a part of the password, if that was taken for something else
        raise ValueError(f"must be a URL whose port is a number from 1 to 65535{hint}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"must be a redis://, rediss:// or unix:// URL, not {shown!r}")
    # a password that is cut in two here would be taken for a port, a host or a path, and shown as such ever after
    if "#" in url or ("@" not in parts.netloc and "@" in parts.query.partition("=")[0]):
        raise ValueError(f"must have no #, and no @ before the first = of its query{hint}")
    if parts.scheme == "unix" and (not parts.path or (parts.netloc and not parts.netloc.endswith("@"))):
        raise ValueError(f"must name a socket, as in unix:///run/redis.sock, not {shown!r}{hint}")
    if parts.scheme != "unix" and port == 0:
        raise ValueError(f"must have a port from 1 to 65535, not {shown!r}")
    try:
        (parts.hostname or "").encode("idna")
    except UnicodeError:
        raise ValueError(f"must name a host, not {shown!r}") from None
    if parts.scheme != "unix" and parts.path.strip("/") and not parts.path[1:].isdecimal():
        raise ValueError(f"must name its database by a number, not {shown!r}{hint}")
    try:
        arguments = dict(parse_url(url))
    except ValueError as error:  # names an option, never its value
        raise ValueError(f"must be a URL: {error}") from None
    kind: Any = arguments.get("connection_class", DriverConnection)
    try:
        kind(**{name: value for name, value in arguments.items() if name not in _NOT_OURS})
    except TypeError as error:  # likewise
        reason = str(error).rpartition(" got an ")[2]
        raise ValueError(f"must have options of redis-py's connections only: {reason}") from None
    except redis.exceptions.RedisError:
        pass  # of a value: told by `Address.open`, like all that the driver finds there
    return arguments


def _without_secrets(url: str) -> str:
    """What may be shown of a URL, also of one that is written wrongly: neither a user's part nor a query."""
    scheme = _SCHEME.match(url)
    start = scheme[0] if scheme else ""
    head, at, tail = url.rpartition("@")
    if at and ("?" in head or "#" in head):  # a query that has an @, or a password that has one of these
        return f"{start}…"
    return f"{start}…@{_QUERY.sub('', tail)}" if at else _QUERY.sub("", url)


_SCHEME = re.compile("[a-z]+://", re.IGNORECASE)
_QUERY = re.compile("[?#].*", re.DOTALL)


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


def _translated(error: BaseException, address: Address, protocol: int) -> BeeQueueError:
    """The driver's exception as ours: refused, or not reachable now. The driver wraps what Redis said in its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _REFUSALS):
        cause = cause.__cause__ or cause.__context__
    message = f"{address}: {error}"
    if cause is None or isinstance(cause, _FOR_NOW) or "max number of clients" in message:
        return ConnectionLost(message, maybe_applied=False)
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
        """Issues a command and waits for its reply; raises `CommandError`, `ConnectionLost`, `ConnectionRefused`."""
        try:
            driver = self._driver
            if driver is None:
                driver = self._driver = self._address.open_blocking(self._timeout_s)
            driver.send_command(*args)
        except (TypeError, redis.exceptions.RedisError, OSError) as error:
            self.close()
            raise _translated(error, self._address, 2) from None
        try:
            return driver.read_response()
        except redis.exceptions.ResponseError as error:
            raise CommandError(str(error)) from None
        except (redis.exceptions.RedisError, OSError) as error:
            self.close()
            raise ConnectionLost(f"{self._address}: {error}", maybe_applied=True) from None

    def close(self) -> None:
        """Closes the socket; from another thread, a call under way ends with some error or other."""
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.disconnect()
