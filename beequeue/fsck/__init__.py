"""A queue checked for damage, and repaired."""

from beequeue.fsck.findings import Finding, Report, check, counts, repair

__all__ = ["Finding", "Report", "check", "counts", "repair"]
