"""Where Redis is: what a caller passes as `redis`, checked and turned into redis-py's connection arguments.

It rejects a wrong setting when the queue is made, before anything connects. `driver.py` opens the connection. No message shows
a password.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from beequeue.wire import driver, tls
from beequeue.wire.driver import DriverClient, Endpoint
from beequeue.wire.url import as_redis, is_host, wrong_with

RedisSetting = str | Mapping[str, Any] | DriverClient | None
"""A URL, redis-py's connection arguments, a client whose settings are borrowed, or None for 127.0.0.1:6379."""

CONNECT_TIMEOUT_S = 10


class Address(Endpoint):
    """The endpoint that a caller's setting names. Its `str` never shows a password.

    Raises `TypeError` or `ValueError` naming a wrong part of the setting.
    """

    def __init__(self, setting: RedisSetting) -> None:
        arguments = _arguments_of(setting)
        self._setting = setting  # arguments borrowed from Sentinel's pool refer to the pool only weakly
        kind = arguments.get("connection_class") or driver.kind_for(arguments)
        if not driver.is_kind(kind):
            raise TypeError(f"redis: connection_class must be a class of redis.asyncio's connections, not {kind!r}")
        for name in (*driver.NOT_OURS, "ssl"):
            arguments.pop(name, None)
        if driver.is_unix(kind):
            arguments.pop("host", None)
            arguments.pop("port", None)
        else:
            arguments.setdefault("host", "127.0.0.1")
        if arguments.get("socket_connect_timeout") is None:
            arguments["socket_connect_timeout"] = CONNECT_TIMEOUT_S
        if driver.is_tls(kind) and arguments.get("ssl_password") is None:
            arguments["ssl_password"] = tls.no_passphrase
        _check(arguments)
        super().__init__(kind, arguments)

    async def open(self, protocol: int) -> tuple[asyncio.Transport, object]:
        """Opens an authenticated connection; see `driver.open_connection`."""
        return await driver.open_connection(self, protocol)

    async def accepts(self, limit_s: float) -> bool:
        """Whether something accepts a connection there, even if it then stays silent."""
        where = self.located
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


def check_redis_url(url: str) -> None:
    """Raises `ValueError` when `url` is not one that `Queue` takes; the message begins with "must" and shows no password."""
    _, wrong = _from_url(url)
    if wrong:
        raise ValueError(wrong)


def _arguments_of(setting: RedisSetting) -> dict[str, Any]:
    """redis-py's connection arguments, as a dict of our own."""
    if setting is None:
        arguments: dict[str, Any] = {}
    elif isinstance(setting, str):
        arguments, wrong = _from_url(setting)
        if wrong:
            raise ValueError(f"redis {wrong}")
    elif isinstance(setting, DriverClient):
        arguments = driver.arguments_of(setting)
    elif isinstance(setting, Mapping):
        arguments = dict(setting)
    else:
        raise TypeError(f"redis must be a URL, a dict of connection arguments or a client, not {type(setting).__name__}")
    if "socket" in arguments:  # bee-queue's name
        arguments["path"] = arguments.pop("socket")
    return arguments


def _from_url(url: str) -> tuple[dict[str, Any], str | None]:
    """redis-py's arguments, and the URL's fault, if any. Raises nothing: an exception's context could quote the URL."""
    if wrong := wrong_with(url):
        return {}, wrong
    arguments, wrong = driver.parse(as_redis(url))
    if wrong:
        return {}, wrong
    try:
        _check(arguments)
    except (TypeError, ValueError) as error:
        return {}, f"must be a URL: {re.split(', not |: ', str(error).removeprefix('redis: '))[0]}"
    return arguments, None


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises `TypeError` or `ValueError` that names a wrong connection argument; never shows a password."""
    for name in ("host", "path", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ca_path"):
        if name in arguments and (arguments[name] is not None or name == "host"):
            _check_text(name, arguments[name])
    host = arguments.get("host")
    if isinstance(host, str) and not is_host(host):
        raise ValueError(f"redis: host must be a host's name or address, not {host!r}")
    for name, least, most in (("port", 1, 65_535), ("db", 0, 2**31 - 1)):
        if name in arguments and not _is_number(arguments[name], least, most):
            raise ValueError(f"redis: {name} must be a number from {least} to {most}, not {arguments[name]!r}")
    for name in ("username", "password"):
        if not isinstance(arguments.get(name), (str, bytes, int, float, NoneType)):
            raise TypeError(f"redis: {name} must be a string, not {type(arguments[name]).__name__}")
    for name in ("socket_connect_timeout", "socket_timeout"):
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"redis: {name} must be a number of seconds, more than 0, not {value!r}")
    provider = arguments.get("credential_provider")
    if provider is not None and not driver.is_credential_provider(provider):
        raise TypeError(f"redis: credential_provider must be a redis.CredentialProvider, not {type(provider).__name__}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"redis: {name} must be a string, not {value!r}")
    if "\0" in os.fspath(value):
        raise ValueError(f"redis: {name} must not contain NUL: {value!r}")


def _is_number(value: Any, least: int, most: int) -> bool:
    """Whether `value` is an int, or a string of digits, within bounds."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:  # int() of a long one takes long
        value = int(value)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
