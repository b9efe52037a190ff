"""The application that commands are added to, and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm.errors import InputError
from minillm.terminal import Mode

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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors, and the last line with where results are.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print a JSON object a line, at the end of each stage and of the run.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show all that libraries print, too.")]


def shown_as(quiet: bool, as_json: bool) -> Mode:
    """How a command shows what it does, by its options."""
    if quiet and as_json:
        raise InputError("--quiet and --json: give one of them")
    return "quiet" if quiet else "json" if as_json else "plain"
