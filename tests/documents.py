"""What tests read of the documents: pages as they are written and as they are generated, and their blocks of code."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT / "docs") not in sys.path:
    sys.path.insert(0, str(ROOT / "docs"))  # `generate` is a package of that folder

WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""The README and the pages that are files."""
_FENCE = re.compile(r"^( *)```(\S*)\s*$")
_MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code in a document.

    Attributes:
        place: The file, and the line of its first fence.
        language: What the fence says.
        text: What is between the fences.
        not_run: Why it is not run, where the line before the fence says so.
    """

    place: str
    language: str
    text: str
    not_run: str | None


def blocks(file: Path) -> Iterator[Block]:
    """The blocks of code of a document."""
    before, opened = "", None
    lines: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None and fence and fence[1] == opened[0] and not fence[2]:
            mark = _MARK.search(before)
            where = f"{file.relative_to(ROOT)}:{opened[2]}"
            yield Block(where, opened[1], "\n".join(lines) + "\n", mark[1] if mark else None)
            opened, before = None, ""
        elif opened is not None:
            lines.append(line.removeprefix(opened[0]))
        elif fence:
            opened, lines = (fence[1], fence[2], number), []
        elif line.strip():
            before = line
    assert opened is None, f"{file}: a fence is not closed"


def all_blocks() -> list[Block]:
    """The blocks of the README and of every page."""
    return [block for file in WRITTEN for block in blocks(file)]


def page(address: str) -> str:
    """The text of a page, written or generated."""
    from generate.pages import generated_pages

    file = ROOT / "docs" / address
    return file.read_text(encoding="utf-8") if file.is_file() else generated_pages()[address]
