"""Results as tables in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minillm.evaluation.metrics import HEADLINE, HELD_OUT
from minillm.evaluation.results import AVERAGE, current_files, current_results, with_deviation, with_interval
from minillm.evaluation.verdict import COLOURS, check_of


def announce(text: str) -> None:
    """Print a line of progress."""
    Console().print(f"[bold cyan]{escape(text)}[/]")


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
    _show(title, ["model", *names], rows)


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
    _show(title, ["method", *differences], rows)


def show_results(run_dir: Path) -> None:
    """Print the results and the verdict of a run, and the paths of its files, as far as they are still valid.

    Args:
        run_dir: The run's directory.
    """
    console = Console()
    if results := current_results(run_dir):
        title = f"{results['prompts']} held-out prompts, {len(results['seeds'])} seeds: mean [95 % interval]"
        rows = [
            [name, *(with_interval(found.get(metric.key)) for metric in HELD_OUT)]
            for name, found in results["models"].items()
        ]
        _show(title, ["model", *(metric.title for metric in HELD_OUT)], rows)
        if found := check_of(results):
            colour = COLOURS[found["verdict"]]
            console.print(f"[{colour}]{escape(found['sentence'])}[/]", soft_wrap=True, highlight=False)
    console.print("Results: " + (", ".join(map(str, current_files(run_dir))) or str(run_dir)), soft_wrap=True)


def show_files(*files: Path) -> None:
    """Print where results were written."""
    Console().print(f"Results: {', '.join(map(str, files))}", soft_wrap=True)


def _show(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is aligned left and whose other columns are aligned right."""
    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def _difference(change: dict[str, float], separator: str = " ") -> str:
    return f"{change['mean']:+.2f}{separator}[{change['low']:+.2f}, {change['high']:+.2f}]"
