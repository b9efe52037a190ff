"""The results of a run directory, as far as they are still valid."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.data.files import finite
from minillm.evaluation.formatting import number, with_interval
from minillm.evaluation.language_model_metrics import TEXT_METRICS, TextMetric
from minillm.evaluation.metrics import HELD_OUT, Metric
from minillm.evaluation.report.console import plain_table
from minillm.evaluation.verdict import COLOURS, check_of
from minillm.run.written import read_results, read_states
from minillm.terminal import current

_ANSI = {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m"}


def current_results(run_dir: Path) -> dict[str, Any]:
    """Read the `results.json` of a run.

    Args:
        run_dir: The run's directory.

    Returns:
        The results; empty if there are none, or if the evaluate stage, or one that it builds on, was started again
        since.
    """
    file = run_dir / "results.json"
    return read_results(file) if file.is_file() and _finished(run_dir, "evaluate") else {}


def current_files(run_dir: Path) -> list[Path]:
    """List the report, the results and the student of a run, without those that are older than what they describe.

    Args:
        run_dir: The run's directory.
    """
    report, results, student = (run_dir / name for name in ("report.html", "results.json", "student"))
    described = [file for file in (results, *run_dir.glob("*/trainer_state.json")) if file.is_file()]
    valid = {
        report: report.is_file() and all(_modified(report) >= _modified(file) for file in described),
        results: bool(current_results(run_dir)),
        student: student.is_dir() and _finished(run_dir, "minillm"),
    }
    return [file for file, holds in valid.items() if holds]


def show_results(run_dir: Path) -> None:
    """Show the results and the verdict of a run, and the names of its files, as far as they are still valid.

    It is as wide as the terminal at most.

    Args:
        run_dir: The run's directory.
    """
    terminal, files = current(), current_files(run_dir)
    results = current_results(run_dir)
    found = check_of(results) if results else None
    if results:
        for line in summary(results, terminal.width):
            terminal.show(line)
    if found:
        colours = terminal.interactive and "NO_COLOR" not in os.environ
        start, end = (_ANSI[COLOURS[found["verdict"]]], "\x1b[0m") if colours else ("", "")
        terminal.show(f"{start}{textwrap.fill(found['sentence'], terminal.width)}{end}")
    names = f" ({', '.join(file.name for file in files)})" if files else ""
    terminal.end(f"Results: {run_dir}{names}")
    terminal.event(
        "run",
        status="finished",
        run_dir=str(run_dir),
        files=[str(file) for file in files],
        verdict=found and found["verdict"],
        sentence=found and found["sentence"],
        models=finite(results.get("models", {})),
    )


def summary(results: dict[str, Any], width: int) -> list[str]:
    """The scores of the models as lines of a table, or of two: with their intervals, as far as there is room.

    Args:
        results: The results of a run.
        width: Columns.
    """
    title = f"{results['prompts']} held-out prompts, {len(results['seeds'])} seeds: mean [95 % interval]"
    lines = _scores(title, results["models"], HELD_OUT, width)
    if text := results.get("text"):
        title = f"{text['blocks']} blocks of held-out text, {text['tokens']} tokens: mean [95 % interval]"
        lines += _scores(title, text["models"], TEXT_METRICS, width, digits=4)
    return lines


def _scores(
    title: str, models: dict[str, Any], metrics: Sequence[Metric | TextMetric], width: int, digits: int = 2
) -> list[str]:
    heads = ["model", *(metric.title for metric in metrics)]
    scores = [[found.get(metric.key) for metric in metrics] for found in models.values()]
    lines: list[str] = []
    for intervals in range(len(metrics), -1, -1):
        rows = [
            [name, *(with_interval(one, digits) if i < intervals else _mean(one, digits) for i, one in enumerate(row))]
            for name, row in zip(models, scores, strict=True)
        ]
        lines = plain_table(heads, rows)
        if max(map(len, lines)) <= width or not intervals:
            break
    return [*textwrap.wrap(title, width), *lines]


def _mean(score: dict[str, Any] | None, digits: int) -> str:
    return "" if score is None else number(score["mean"], digits)


def _modified(file: Path) -> int:
    return file.stat().st_mtime_ns


def _finished(run_dir: Path, stage: str) -> bool:
    state = run_dir / "state.json"
    return state.is_file() and bool(read_states(state).get(stage, {}).get("finished"))
