"""Redis URLs: whether one is well-formed, and which part of a malformed one may be shown. No message shows a password.

Nothing here raises, because the exception's context would hold the standard library's message, which quotes the URL.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

SCHEMES = "redis://, rediss://, valkey://, valkeys:// or unix://"


def wrong_with(url: str) -> str | None:
    """Describes a fault of a URL, in words that begin with "must"; None if it is well-formed."""
    url = as_redis(url)
    hint = "; in a password, write / ? # @ [ ] as %2F %3F %23 %40 %5B %5D" if "@" in url else ""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"must be a URL whose port is a number from 1 to 65535{hint}"
    if parts.scheme not in ("redis", "rediss", "unix") or not _SCHEME.match(url):
        return f"must be a URL that begins with {SCHEMES}"  # not shown: it may be a bare password
    shown_url = _without_secrets(url)
    wrong = None
    # a password cut in two here would later be mistaken for a port, a host or a path, and be shown
    if "#" in url:
        wrong = f"must not contain #{hint}"
    elif "@" in parts.query and not _may_have_at(parts):
        wrong = f"must not contain @ in its query{hint}"
    elif parts.scheme == "unix" and (not parts.path or (parts.netloc and not parts.netloc.endswith("@"))):
        wrong = f"must name a socket, as in unix:///run/redis.sock, not {shown_url!r}{hint}"
    elif parts.scheme != "unix" and port == 0:
        wrong = f"must have a port from 1 to 65535, not {shown_url!r}"
    elif parts.netloc.startswith(":") and "@" not in parts.netloc:
        wrong = f"must name a host before its port{hint}"  # not shown: it may be a password without a host
    elif not is_host(parts.hostname or ""):
        wrong = f"must name a host, not {shown_url!r}"
    elif parts.scheme != "unix" and parts.path.strip("/") and not parts.path[1:].isdecimal():
        wrong = f"must name its database by a number, not {shown_url!r}{hint}"
    return wrong


def as_redis(url: str) -> str:
    """`url` with the scheme that the driver knows in place of valkey's."""
    return "redis" + url[len("valkey") :] if _VALKEY.match(url) else url


def _may_have_at(parts: SplitResult) -> bool:
    """Whether each @ of a query belongs to a user name or password in it, rather than standing before a host."""
    if "@" in parts.netloc or (not parts.hostname and parts.scheme != "unix"):
        return False
    options = [option.partition("=") for option in parts.query.split("&")]
    return all("@" not in name + value or name in ("username", "password") for name, _, value in options)


def is_host(name: str) -> bool:
    """Whether `name` can be looked up as a host."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def _without_secrets(url: str) -> str:
    """A URL, even a malformed one, without the parts that can hold a password: user and query."""
    scheme = _SCHEME.match(url)
    start = scheme[0] if scheme else ""
    head, at, tail = url.rpartition("@")
    if at and ("?" in head or "#" in head):  # the query contains an @, or the password one of these
        return f"{start}…"
    return f"{start}…@{_QUERY.sub('', tail)}" if at else _QUERY.sub("", url)


_SCHEME = re.compile("[a-z]+://", re.IGNORECASE)
_VALKEY = re.compile("valkeys?://", re.IGNORECASE)
_QUERY = re.compile("[?#].*", re.DOTALL)
