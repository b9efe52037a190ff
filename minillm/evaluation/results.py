"""Measured numbers as text, and which results of a run directory are still valid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.data.files import read_json

AVERAGE = "average"
"""Name of the mean over the sets in a suite's results, beside the sets' own names."""
UNDEFINED = "–"
"""Shown in place of a number that does not exist, such as a share of nothing or a ratio to zero."""


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; None, NaN and infinities as `UNDEFINED`."""
    return UNDEFINED if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(score: Mapping[str, float | None] | None) -> str:
    """Format a score as `mean [low, high]`; as an empty string where nothing was measured."""
    return "" if score is None else f"{number(score['mean'])} [{number(score['low'])}, {number(score['high'])}]"


def with_deviation(score: Mapping[str, Any] | None) -> str:
    """Format a score over seeds as `mean ± standard deviation`; the deviation is left out where there is none."""
    if score is None:
        return ""
    deviation = score.get("spread")
    return number(score["mean"]) if deviation is None else f"{number(score['mean'])} ± {number(deviation)}"


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


def _modified(file: Path) -> int:
    return file.stat().st_mtime_ns


def _finished(run_dir: Path, stage: str) -> bool:
    state = run_dir / "state.json"
    return state.is_file() and bool(read_json(state)["stages"].get(stage, {}).get("finished"))
