"""TLS: keeps contexts, finds faults in the files that they need, and translates a server's alert.

OpenSSL's own messages rarely name the file at fault; these do. No message shows a passphrase, and nothing here asks for one on
the terminal.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

_KEY_SETTINGS = ("ssl_certfile", "ssl_keyfile", "ssl_password")


def no_passphrase() -> str:
    """Replaces OpenSSL's prompt: the `ssl_password` of a connection that was given none."""
    raise ValueError("it is encrypted, and ssl_password is not given")


class ContextMaker(Protocol):
    """The driver's maker of an SSL context. Its other attributes are the settings that the context depends on."""

    context: ssl.SSLContext | None

    def get(self) -> ssl.SSLContext: ...


def wrong_with(arguments: Mapping[str, Any], maker: ContextMaker | None) -> str | None:
    """Describes the first fault in the TLS settings among redis-py's `arguments`, naming the file; None if there is none.

    `maker` then has its context. All connections with the same settings share it until one of its files changes: making one
    blocks the event loop for tens of milliseconds, and after an outage each connection tries many times.
    """
    settings = _settings_of(maker)
    stamps = _stamps(arguments)
    if maker is not None and settings is not None:
        maker.context = _kept(settings, stamps)
        if maker.context is not None:
            return None
    wrong = _wrong_with_files(arguments, maker)
    if wrong is None and maker is not None and settings is not None:
        _keep(settings, stamps, maker.get())
    return wrong


MOST_KEPT = 16
_contexts: list[tuple[Mapping[str, Any], list[Any], ssl.SSLContext]] = []
"""Each context with its settings, and the stamps of its files; the newest comes last."""


def _kept(settings: Mapping[str, Any], stamps: list[Any]) -> ssl.SSLContext | None:
    return next((context for of, at, context in _contexts if of == settings and at == stamps), None)


def _keep(settings: Mapping[str, Any], stamps: list[Any], context: ssl.SSLContext) -> None:
    others = [each for each in _contexts if each[0] != settings]
    _contexts[:] = [*others, (settings, stamps, context)][-MOST_KEPT:]


def _settings_of(maker: ContextMaker | None) -> Mapping[str, Any] | None:
    """The settings that a context depends on; None when they are unknown, or when a caller's class has made the context."""
    names = getattr(maker, "__slots__", None)
    if names is None or getattr(maker, "context", None) is not None:
        return None
    return {name: getattr(maker, name, None) for name in names}


def _stamps(arguments: Mapping[str, Any]) -> list[Any]:
    """Values that change when a file of the context is replaced, or one in its directory of authorities."""
    default = ssl.get_default_verify_paths()
    files = [arguments.get(name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ca_path")]
    directory = arguments.get("ssl_ca_path")
    with suppress(OSError):
        files += sorted(os.path.join(directory, name) for name in os.listdir(directory)) if directory else []
    return [_stamp(path) for path in (*files, default.cafile, default.capath) if path]


def _stamp(path: str | os.PathLike[str]) -> tuple[Any, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return (path,)
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _wrong_with_files(arguments: Mapping[str, Any], maker: ContextMaker | None) -> str | None:
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := arguments.get(name)) is not None:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                return f"{name} {path!r}: {error.strerror}"
    return _wrong_with_key(*(arguments.get(name) for name in _KEY_SETTINGS)) or _wrong_with_rest(arguments, maker)


def _wrong_with_key(certificate: Any, key: Any, password: Any) -> str | None:
    if not certificate:
        return f"ssl_keyfile {key!r} needs an ssl_certfile" if key else None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password)
    except Exception as error:
        what = f"ssl_keyfile {key!r}, of ssl_certfile {certificate!r}" if key else f"ssl_certfile {certificate!r}"
        why = getattr(error, "reason", None) or error
        if isinstance(error, ssl.SSLError) and error.reason is None and _is_encrypted(key or certificate):
            why = "it cannot be decrypted with this ssl_password"  # OpenSSL says "PEM lib" whatever the fault is
        return f"{what}: {why}"
    return None


def _wrong_with_rest(arguments: Mapping[str, Any], maker: ContextMaker | None) -> str | None:
    try:
        authorities = [arguments.get(name) for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")]
        if any(authorities):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(*authorities)
        if maker is not None:
            maker.get()
    except Exception as error:
        named = {name: value for name, value in arguments.items() if name.startswith("ssl_") and name not in _KEY_SETTINGS}
        given = ", ".join(name if name == "ssl_ca_data" else f"{name} {value!r}" for name, value in named.items())
        return f"{given or 'TLS'}: {getattr(error, 'reason', None) or error}"
    return None


def _is_encrypted(key: str | os.PathLike[str]) -> bool:
    with open(key, "rb") as file:
        return b"ENCRYPTED" in file.read()


_REFUSING_ALERTS = re.compile(
    r"ALERT_(\w*CERTIFICATE\w*|UNKNOWN_CA|HANDSHAKE_FAILURE|ACCESS_DENIED|PROTOCOL_VERSION|INSUFFICIENT_SECURITY"
    r"|UNRECOGNIZED_NAME)"
)
"""Alerts that refuse us for good: no certificate, one that the server does not trust, no common version."""


def refusing_alert(error: BaseException | None) -> str | None:
    """The alert by which a server refused TLS, in words, if `error` or a cause of it is one: `certificate required`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ssl.SSLError) and (alert := _REFUSING_ALERTS.search(getattr(error, "reason", None) or "")):
            return alert[1].lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return None
