"""TLS: finds faults in the files it needs, and puts a server's alert into words.

OpenSSL's own messages rarely name the file at fault; these do. No message shows a passphrase, and nothing here asks for one on
the terminal.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from typing import Any

_KEY_SETTINGS = ("ssl_certfile", "ssl_keyfile", "ssl_password")


def no_passphrase() -> str:
    """Takes the place of OpenSSL's prompt: the `ssl_password` of a connection that was given none."""
    raise ValueError("it is encrypted, and ssl_password is not given")


def wrong_with(arguments: Mapping[str, Any], make_context: Callable[[], object] | None) -> str | None:
    """Describes the first fault in the TLS settings among redis-py's `arguments`, naming the file; None if there is none.

    `make_context` makes the driver's own SSL context and raises when it cannot.
    """
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if (path := arguments.get(name)) is not None:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                return f"{name} {path!r}: {error.strerror}"
    return _wrong_with_key(*(arguments.get(name) for name in _KEY_SETTINGS)) or _wrong_with_rest(arguments, make_context)


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


def _wrong_with_rest(arguments: Mapping[str, Any], make_context: Callable[[], object] | None) -> str | None:
    try:
        authorities = [arguments.get(name) for name in ("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data")]
        if any(authorities):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(*authorities)
        if make_context is not None:
            make_context()
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
