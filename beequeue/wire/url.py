"""URLs of a Redis: whether one is well-formed, and what may be shown of one that is not. No message shows a password.

Nothing here raises: the context of an exception would have what the standard library says, which quotes the URL.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

SCHEMES = "redis://, rediss://, valkey://, valkeys:// or unix://"


def wrong_with(url: str) -> str | None:
    """What is wrong with a URL, for a message: it begins with "must"; None if it is well-formed."""
    url = as_redis(url)
    hint = "; in a password / ? # @ [ ] are written %2F %3F %23 %40 %5B %5D" if "@" in url else ""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"must be a URL whose port is a number from 1 to 65535{hint}"
    if parts.scheme not in ("redis", "rediss", "unix") or not _SCHEME.match(url):
        return f"must be a URL that begins with {SCHEMES}"  # it may be a password, and nothing else
    shown_url = _without_secrets(url)
    wrong = None
    # a password that is cut in two here would be taken for a port, a host or a path, and shown as such ever after
    if "#" in url:
        wrong = f"must have no #{hint}"
    elif "@" in parts.query and not _may_have_at(parts):
        wrong = f"must have no @ in its query{hint}"
    elif parts.scheme == "unix" and (not parts.path or (parts.netloc and not parts.netloc.endswith("@"))):
        wrong = f"must name a socket, as in unix:///run/redis.sock, not {shown_url!r}{hint}"
    elif parts.scheme != "unix" and port == 0:
        wrong = f"must have a port from 1 to 65535, not {shown_url!r}"
    elif parts.netloc.startswith(":") and "@" not in parts.netloc:
        wrong = f"must name a host before its port{hint}"  # this may be a password without a host
    elif not is_host(parts.hostname or ""):
        wrong = f"must name a host, not {shown_url!r}"
    elif parts.scheme != "unix" and parts.path.strip("/") and not parts.path[1:].isdecimal():
        wrong = f"must name its database by a number, not {shown_url!r}{hint}"
    return wrong


def as_redis(url: str) -> str:
    """`url` with the scheme that the driver knows."""
    return "redis" + url[len("valkey") :] if _VALKEY.match(url) else url


def _may_have_at(parts: SplitResult) -> bool:
    """Whether each @ of a query is in a user's name or a password that is written there, rather than before a host."""
    if "@" in parts.netloc or (not parts.hostname and parts.scheme != "unix"):
        return False
    options = [option.partition("=") for option in parts.query.split("&")]
    return all("@" not in name + value or name in ("username", "password") for name, _, value in options)


def is_host(name: str) -> bool:
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def _without_secrets(url: str) -> str:
    """What may be shown of a URL, also of one that is written wrongly: neither a user's part nor a query."""
    scheme = _SCHEME.match(url)
    start = scheme[0] if scheme else ""
    head, at, tail = url.rpartition("@")
    if at and ("?" in head or "#" in head):  # a query that has an @, or a password that has one of these
        return f"{start}…"
    return f"{start}…@{_QUERY.sub('', tail)}" if at else _QUERY.sub("", url)


_SCHEME = re.compile("[a-z]+://", re.IGNORECASE)
_VALKEY = re.compile("valkeys?://", re.IGNORECASE)
_QUERY = re.compile("[?#].*", re.DOTALL)
