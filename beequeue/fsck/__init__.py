"""Checks a queue for damage, and repairs it."""

from beequeue.fsck.findings import Finding, Report, check, counts, repair

__all__ = ["Finding", "Report", "check", "counts", "repair"]
