"""Wording that the commands share."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """`1 job`, `1,000 jobs`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
