"""README and the pages that it leads to, as text that tests can ask about."""

from __future__ import annotations

import re

from tests import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
"""By the path from the project's top folder."""


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n", PAGES[page], re.MULTILINE)
    assert found is not None, f"{page} has no section {heading}"
    text = PAGES[page][found.end() :]
    return re.split(rf"^#{{1,{len(found[1])}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def tables(text: str, first: str) -> list[list[str]]:
    """The rows of all tables whose first column is called `first`."""
    found = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    lines = "".join(found).splitlines()
    rows = [[cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in lines]
    assert rows, f"no table begins with {first}"
    return rows


def code_lines(text: str) -> list[str]:
    """The lines of a page's code blocks, fenced or indented."""
    lines = []
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    return lines


def anchors(text: str) -> set[str]:
    """What a link to a page may name behind `#`: its headings, as GitHub and MkDocs write them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
