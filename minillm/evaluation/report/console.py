"""Results as tables in the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minillm.evaluation.formatting import AVERAGE, with_deviation
from minillm.evaluation.metrics import HEADLINE, METRIC
from minillm.terminal import current


def announce(text: str) -> None:
    """Print a line of progress."""
    current().say(text)


def show_suite(results: dict[str, Any]) -> None:
    """Print the headline metric of every model on every set of a suite, and the differences to the first model.

    Args:
        results: The results of a suite.
    """
    names = [*results["prompts"], AVERAGE]
    statistic = "mean ± standard deviation" if len(results["seeds"]) > 1 else "mean"
    title = (
        f"{HEADLINE.label}, {len(results['seeds'])} seeds: {statistic}; "
        f"difference to {results['compared_with']} [95 % interval]"
    )
    rows = []
    for model, sets in results["models"].items():
        changes = results["differences"].get(model, {})
        cells = [with_deviation(sets.get(name, {}).get(HEADLINE.key)) for name in names]
        rows.append(
            [
                model,
                *(
                    f"{cell}\n{_difference(changes[name])}" if name in changes else cell
                    for name, cell in zip(names, cells, strict=True)
                ),
            ]
        )
    show_table(title, ["model", *names], rows)


def show_pairs(differences: dict[str, Any]) -> None:
    """Print the difference between any two methods of a comparison, all training seeds of a method together.

    Args:
        differences: See `pooled_differences`.
    """
    rows = []
    for one, found in differences.items():
        changes = [found.get(other) for other in differences]
        rows.append([one, *("" if change is None else _difference(change, "\n") for change in changes)])
    title = f"{HEADLINE.label} on the average of the sets, row − column, over all training seeds [95 % interval]"
    show_table(title, ["method", *differences], rows)


def show_two_models(found: dict[str, Any], answers: int = 5) -> None:
    """Print a few answers of two models, and their paired differences.

    Args:
        found: See `compare_models`.
        answers: Number of prompts whose answers are shown.
    """
    one, other = found["models"]
    rows = [[str(row["row"]), escape(row[one]), escape(row[other])] for row in found["answers"][:answers]]
    table = Table(title=f"Answers, seed {found['seeds'][0]}", show_lines=True)
    for head in ("row", one, other):
        table.add_column(head)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
    title = f"{found['prompts']} prompts, {len(found['seeds'])} seeds; difference {other} − {one} [95 % interval]"
    measured = [
        [METRIC[key].title, f"{change['first']:.2f}", f"{change['second']:.2f}", _difference(change)]
        for key, change in found["differences"].items()
    ]
    show_table(title, ["metric", one, other, "difference"], measured)


def show_files(*files: Path) -> None:
    """Print where results were written."""
    Console().print(f"Results: {', '.join(map(str, files))}", soft_wrap=True)


def plain_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table without rules, whose heads are wrapped to the width of the cells below them.

    Args:
        heads: The heads of the columns. The first column is aligned left, the others right.
        rows: The cells of each row.
    """
    columns = [[row[i] for row in rows] for i in range(len(heads))]
    words = [max(map(len, head.split()), default=0) for head in heads]
    widths = [max(word, *map(len, cells)) for word, cells in zip(words, columns, strict=True)]
    wrapped = [textwrap.wrap(head, width) for head, width in zip(heads, widths, strict=True)]
    height = max(map(len, wrapped))
    head_rows = [[([""] * (height - len(head)) + head)[i] for head in wrapped] for i in range(height)]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return [*map(line, head_rows), "  ".join("─" * width for width in widths), *map(line, rows)]


def show_table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is aligned left and whose other columns are aligned right."""
    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def _difference(change: dict[str, float], separator: str = " ") -> str:
    return f"{change['mean']:+.2f}{separator}[{change['low']:+.2f}, {change['high']:+.2f}]"
