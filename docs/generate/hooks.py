"""What mkdocs calls while it builds the documents: it adds the pages that are made from the code and from other files.

The folder of the repository's own Markdown files stays as it is: README.md, CONTRIBUTING.md, CHANGELOG.md,
recipes/README.md and eval/README.md are read where they lie, and their links are turned into links between pages.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))  # `generate` is a package of this folder

from mkdocs.structure.files import File  # noqa: E402

from generate.figures import with_figures  # noqa: E402
from generate.include import included_pages  # noqa: E402
from generate.pages import generated_pages  # noqa: E402
from generate.presets import with_tables  # noqa: E402


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of the folder holds."""
    for address, text in {**generated_pages(), **included_pages(ROOT)}.items():
        files.append(File.generated(config, address, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the settings of a preset, and figures, where a page asks for them."""
    return with_figures(with_tables(markdown))
