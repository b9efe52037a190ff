"""`minillm verify RUN`: whether a run still is what its certificate says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm.capture import opened
from minillm.commands.app import app


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(help="A run's directory, e.g. runs/quickstart.", show_default=False)],
    again: Annotated[
        bool,
        typer.Option("--again/--files-only", help="Sample the first batch and make the first update again, too."),
    ] = True,
) -> None:
    """Compare a run with its certificate: recipe, data, models, and the first batch and update, which are made again.

    The exit status is 1 if something differs.
    """
    differs = False
    with opened() as terminal:
        from minillm.run.verification import verify as findings  # it loads torch

        for found in findings(run_dir, again=again):
            differs |= found.verdict == "differs"
            terminal.show(f"{found.verdict:<12}{found.what}{f': {found.why}' if found.why else ''}")
    if differs:
        raise typer.Exit(1)
