"""The application that commands are added to, and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distil a large language model into a small one on the student's own samples (MiniLLM).",
)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, then YAML files and folders, that begin with a text; for the shell."""
    from minillm.run.shipped import names

    found = [name for name in names() if name.startswith(incomplete)]
    parent, start = Path(incomplete).parent, "" if incomplete.endswith("/") else Path(incomplete).name
    folder = Path(incomplete) if incomplete.endswith("/") else parent
    if folder.is_dir():
        near = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.name[0] != ".")
        found += [f"{path}/" for path in near if path.is_dir()] + [str(path) for path in near if path.suffix == ".yaml"]
    return found


RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A recipe: a file, or the name of one that `minillm recipes` lists, e.g. quickstart.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...", help="Settings that replace the recipe's, e.g. training.learning_rate=1e-5."
    ),
]
