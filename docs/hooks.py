"""The additions of `make docs` to MkDocs: README and its neighbours as pages, and two checks of the built site.

The files at the project's root link to each other and to the sources as they stand in a checkout. Here links to pages lead to
pages, and links to other files, which are not part of the site, become plain text. A link to a file that does not exist stays,
and MkDocs reports it.
"""

from __future__ import annotations

import itertools
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import beequeue
import beequeue.fsck
import beequeue.sync
from tests.public import INTERNAL, public

log = logging.getLogger("mkdocs.hooks.docs")  # a warning fails a strict build

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the root that are pages of the site."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Leaves out of the reference what only the library's own parts use: one list for the reference and the tests."""
    options = config.plugins["mkdocstrings"].config["handlers"]["python"]["options"]
    options["filters"] = ["!^_", f"!^({'|'.join(sorted(INTERNAL))})$"]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that stand at the root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that hold in a checkout into links that hold on the site."""
    from_root = page.file.src_uri in PAGES.values()
    folder = "" if from_root else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def on_the_site(found: re.Match[str]) -> str:
        image, text, path, anchor = found.groups(default="")
        target = posixpath.normpath(posixpath.join(folder, path))
        if target in PAGES:
            return f"{image}[{text}]({_relative(PAGES[target], page)}{anchor})"
        if target.startswith("docs/"):
            return f"{image}[{text}]({_relative(target.removeprefix('docs/'), page)}{anchor})"
        return text if (ROOT / target).exists() else found[0]

    return LINK.sub(on_the_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Gives each cell the name of its column: on a phone rows are blocks, and a wide table's head is not shown."""
    return re.sub(r"<table>.*?</table>", lambda table: _with_names(table[0]), html, flags=re.DOTALL)


def _with_names(table: str) -> str:
    names = [re.sub(r"<[^>]*>", "", name) for name in re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)]
    if len(names) < 3:
        return table
    columns = itertools.cycle(names)
    return re.sub(r"<td(?=[ >])", lambda _: f'<td data-column="{next(columns)}"', table)


def _relative(target: str, page: Any) -> str:
    return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")


def on_post_build(config: Any) -> None:
    """Checks what MkDocs does not: the reference is complete, and no page loads anything from elsewhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in Path(config.site_dir).rglob("*.html")}
    anchors = {anchor for text in texts.values() for anchor in re.findall(r'id="(beequeue[\w.]*)"', text)}
    for name in sorted(_public_names() - anchors):
        log.warning("%s has no docstring, or is on no page of the reference", name)
    for path, text in texts.items():
        for loaded in re.findall(r'<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', text):
            log.warning("%s loads %s", path.name, loaded)


def _public_names() -> set[str]:
    """Every public name, as the reference has it: members of classes too, less those that errors inherit from Exception."""
    modules = ((beequeue, beequeue.__all__), (beequeue.fsck, beequeue.fsck.__all__), (beequeue.sync, ("Queue",)))
    names = set()
    for module, listed in modules:
        for name in listed:
            names.add(f"{module.__name__}.{name}")
            owner = getattr(module, name)
            if isinstance(owner, type):
                names |= {f"{module.__name__}.{name}.{member}" for member in public(owner)}
    return names
