"""What was measured, in files and in print: JSON without NaN, numbers with their intervals, and which files still hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.data.files import read_json

UNDEFINED = "–"  # in place of a number that there is not: a share of nothing, a ratio to zero


def number(value: float | None, digits: int = 2) -> str:
    return UNDEFINED if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(score: Mapping[str, float | None] | None) -> str:
    """`mean [low, high]`; empty where nothing was measured."""
    return "" if score is None else f"{number(score['mean'])} [{number(score['low'])}, {number(score['high'])}]"


def current_results(run_dir: Path) -> dict[str, Any]:
    """A run's results.json; empty where there is none, or where the evaluate stage or one it builds on was begun again since."""
    file = run_dir / "results.json"
    return read_json(file) if file.is_file() and _finished(run_dir, "evaluate") else {}


def current_files(run_dir: Path) -> list[Path]:
    """The report, the results and the student of a run, those left out that were made before something they tell of."""
    report, results, student = (run_dir / name for name in ("report.html", "results.json", "student"))
    told = [results, *run_dir.glob("*/trainer_state.json")]
    made = {
        report: report.is_file()
        and all(report.stat().st_mtime_ns >= file.stat().st_mtime_ns for file in told if file.is_file()),
        results: bool(current_results(run_dir)),
        student: student.is_dir() and _finished(run_dir, "minillm"),
    }
    return [file for file, holds in made.items() if holds]


def _finished(run_dir: Path, stage: str) -> bool:
    state = run_dir / "state.json"
    return state.is_file() and bool(read_json(state)["stages"].get(stage, {}).get("finished"))
