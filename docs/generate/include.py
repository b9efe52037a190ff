"""Pages made of Markdown files that lie elsewhere in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

INCLUDED = {
    "CONTRIBUTING.md": "development/contributing.md",
    "CHANGELOG.md": "development/changelog.md",
    "recipes/README.md": "guides/recipes.md",
    "eval/README.md": "measurements.md",
}
"""Files of the repository, and the pages that they become."""
_ELSEWHERE = {"README.md": "index.md"}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def included_pages(root: Path) -> dict[str, str]:
    """The pages by their address, with links that lead to other pages.

    Args:
        root: The folder of the repository.
    """
    return {
        page: with_links((root / file).read_text(encoding="utf-8"), PurePosixPath(file), PurePosixPath(page))
        for file, page in INCLUDED.items()
    }


def with_links(text: str, file: PurePosixPath, page: PurePosixPath) -> str:
    """The text of a file, as a page.

    A link to a file that is a page leads to that page, and one to a shipped recipe to its place on the page of recipes.
    The site does not hold other files: of a link to one its text is left.

    Args:
        text: The file's text.
        file: Its path in the repository.
        page: The address of the page.
    """

    def replaced(found: re.Match[str]) -> str:
        label, target = found.groups()
        if target.startswith("#") or "://" in target:
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        path = os.path.normpath(file.parent / path)
        address = address_of(path)
        if address is None:
            return label
        address, _, place = address.partition("#")
        relative = os.path.relpath(address, page.parent)
        return f"[{label}]({relative}{hash_sign or ('#' if place else '')}{anchor or place})"

    return _LINK.sub(replaced, text)


def address_of(path: str) -> str | None:
    """The page that a file of the repository is on, perhaps with an anchor; None if it is on none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("recipes/") and path.endswith(".yaml"):
        return f"reference/recipes.md#{recipe_anchor(path.removeprefix('recipes/').removesuffix('.yaml'))}"
    return (INCLUDED | _ELSEWHERE).get(path)


def recipe_anchor(name: str) -> str:
    """The anchor of a recipe on the page of recipes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
