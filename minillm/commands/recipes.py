"""`minillm recipes`: the recipes that come with the library."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from minillm.commands.app import app


@app.command()
def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, with the whole of each text.")] = False,
) -> None:
    """List the recipes that come with the library, which every command takes by name."""
    from rich.console import Console
    from rich.table import Table

    from minillm.run.shipped import bases, shipped_recipes

    found = shipped_recipes()
    if as_json:
        rows = [asdict(recipe) for recipe in found]
        typer.echo(json.dumps({"recipes": rows, "bases": dict(bases())}, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for head, right in (
        ("recipe", False),
        ("student ← teacher", False),
        ("trains (objective)", False),
        ("GPUs", True),
        ("h", True),
    ):
        table.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=head == "recipe")
    for recipe in found:
        pair = f"{_short(recipe.student)} ← {_short(recipe.teacher)}"
        gpus = {"more": ">8"}.get(recipe.gpus, recipe.gpus)
        table.add_row(recipe.name, pair, recipe.trains, gpus, recipe.hours)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nGPUs: the fewest of 80 GiB that it fits on. h: hours on 8 of them, estimated. "
        "minillm plan NAME estimates both for this machine."
    )
    for name, about in bases():
        console.print(f"{name}: a recipe without a pair, to extend. {about}.")
    console.print("minillm show NAME prints every setting. minillm init writes a recipe for your own pair and files.")


def _short(source: str) -> str:
    """A model's name without its owner; the list would not fit a terminal otherwise."""
    return source.split("/")[-1].removeprefix("package:")
