"""The tests: one folder for each of the project's parts."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The project's top folder."""
