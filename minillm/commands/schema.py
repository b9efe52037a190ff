"""`minillm schema`: JSON schemas for editors."""

from __future__ import annotations

from typing import Annotated

import typer

from minillm.commands.app import app
from minillm.errors import InputError


@app.command()
def schema(
    kind: Annotated[
        str,
        typer.Argument(help="recipe, suite or comparison.", autocompletion=lambda: ["recipe", "suite", "comparison"]),
    ] = "recipe",
) -> None:
    """Print the JSON schema of a kind of file, from which an editor completes and checks its keys."""
    from minillm.run.schema import KINDS, schema_text

    if kind not in KINDS:
        raise InputError(f"{kind}: no such kind of file; allowed: {', '.join(KINDS)}")
    typer.echo(schema_text(kind), nl=False)
