"""The results of a run directory, as far as they are still valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from minillm.data.files import read_json
from minillm.evaluation.formatting import with_interval
from minillm.evaluation.language_model_metrics import TEXT_METRICS
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.console import show_table
from minillm.evaluation.verdict import COLOURS, check_of


def current_results(run_dir: Path) -> dict[str, Any]:
    """Read the `results.json` of a run.

    Args:
        run_dir: The run's directory.

    Returns:
        The results; empty if there are none, or if the evaluate stage, or one that it builds on, was started again
        since.
    """
    file = run_dir / "results.json"
    return read_json(file) if file.is_file() and _finished(run_dir, "evaluate") else {}


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
        show_table(title, ["model", *(metric.title for metric in HELD_OUT)], rows)
        if text := results.get("text"):
            title = f"{text['blocks']} blocks of held-out text, {text['tokens']} tokens: mean [95 % interval]"
            rows = [
                [name, *(with_interval(found.get(metric.key), digits=4) for metric in TEXT_METRICS)]
                for name, found in text["models"].items()
            ]
            show_table(title, ["model", *(metric.title for metric in TEXT_METRICS)], rows)
        if found := check_of(results):
            colour = COLOURS[found["verdict"]]
            console.print(f"[{colour}]{escape(found['sentence'])}[/]", soft_wrap=True, highlight=False)
    console.print("Results: " + (", ".join(map(str, current_files(run_dir))) or str(run_dir)), soft_wrap=True)


def _modified(file: Path) -> int:
    return file.stat().st_mtime_ns


def _finished(run_dir: Path, stage: str) -> bool:
    state = run_dir / "state.json"
    return state.is_file() and bool(read_json(state)["stages"].get(stage, {}).get("finished"))
