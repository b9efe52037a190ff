"""`minillm show RECIPE`: every setting of a recipe, and where each comes from."""

from __future__ import annotations

import typer

from minillm.commands.app import Overrides, RecipePath, app


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print every setting of a recipe as YAML, with the place that each value comes from."""
    from minillm.run.resolved import resolved_text

    typer.echo(resolved_text(recipe, overrides or []), nl=False)
