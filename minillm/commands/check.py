"""`minillm check RECIPE`: everything that a run would refuse, without training."""

from __future__ import annotations

from typing import Annotated

import typer

from minillm.commands.app import Overrides, RecipePath, app


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    sample: Annotated[
        bool, typer.Option("--sample/--no-sample", help="Answer one prompt, if the model is on this machine.")
    ] = True,
) -> None:
    """Refuse what a run would refuse, and show one rendered prompt and an answer; nothing is trained or written.

    The exit status is 2 if the run would refuse the recipe, and 1 if the plan says that it does not fit this machine.
    """
    from minillm.run.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from minillm.run.dry_run import dry_run  # after the recipe, which is read without torch

    found = dry_run(loaded, sample=sample)
    for name, (used, rows) in found.rows.items():
        left = f", {rows - used} longer than data.max_prompt_tokens are left out" if used < rows else ""
        typer.echo(f"{name}: {used} prompts{left}")
    typer.echo(f"stages: {', '.join(loaded.stages)}")
    typer.echo(f"memory, estimated: {found.memory}{'' if found.fits else ': does not fit'}")
    typer.echo(f"first prompt, {found.prompt_tokens} tokens:\n{_indented(found.prompt)}")
    if found.answer is not None:
        typer.echo(f"answer of {found.answered_by}, before training:\n{_indented(found.answer)}")
    elif sample:
        typer.echo(f"no answer: {found.answered_by} is not on this machine yet; a run downloads it")
    if not found.fits:
        typer.echo(f"minillm plan {recipe} says what would help", err=True)
        raise typer.Exit(1)
    typer.echo("Nothing that a run would refuse was found.")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
