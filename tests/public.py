"""What a user of the library may call or read: the reference documents it, and the tests use it."""

from __future__ import annotations

INTERNAL = {"created_at", "receive", "end", "encode", "decode", "ended", "bound", "saved_as", "saving", "last_event", "emit"}
INTERNAL |= {"open", "attach", "detach", "connection", "address"}
"""Members without an underscore that only the library's own parts use."""


def public(owner: type) -> set[str]:
    """The names of a class's public members, inherited ones included."""
    own = {name for kind in owner.__mro__ if kind.__module__.startswith("beequeue") for name in vars(kind)}
    return {name for name in own if not name.startswith("_")} - INTERNAL
