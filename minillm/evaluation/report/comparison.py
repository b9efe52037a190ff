"""The report of a comparison of methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.data.files import read_json
from minillm.evaluation.formatting import AVERAGE
from minillm.evaluation.metrics import HEADLINE, METRIC
from minillm.evaluation.report.curves import curve_points, draw_curves
from minillm.evaluation.report.html import (
    heading,
    interval_cell,
    note,
    number_cell,
    table,
    text_cell,
    write_page,
)
from minillm.evaluation.report.suite import reference_words_tables, set_table

_VALIDATED = (HEADLINE, METRIC["reverse_kl"])  # metrics whose curves are drawn


def write_comparison_report(root: Path) -> Path:
    """Write `report.html` of a comparison from its `compare.json`.

    It has the validation curves of every method, and the results on the test sets as soon as they are there.

    Args:
        root: The comparison's folder.

    Returns:
        The report's path.
    """
    results = read_json(root / "compare.json")
    parts = [_validation_curves(results), _tuning(results["tuning"])]
    if tests := results.get("tests"):
        parts += [set_table(tests, name) for name in (*tests["prompts"], AVERAGE)]
        parts += [_pairs(results["differences"]), reference_words_tables(tests)]
    return write_page(root, parts)


def _validation_curves(results: dict[str, Any]) -> str:
    """For each method, the run with the chosen settings and the first training seed.

    All curves begin with the validation of the shared start, if there was one.
    """
    start = [{**entry, "step": 0} for entry in results.get("start", {}).get("curve", [])[-1:]]
    curves = {name: start + found["tried"][found["chosen"]]["curve"] for name, found in results["tuning"].items()}
    panels = [
        (metric.title, {name: curve_points(curve, f"eval_{metric.key}") for name, curve in curves.items()})
        for metric in _VALIDATED
    ]
    return draw_curves("Validation while training", panels)


def _tuning(tuning: dict[str, Any]) -> str:
    rows = []
    for name, found in tuning.items():
        for number, run in enumerate(found["tried"]):
            mark = "chosen" if number == found["chosen"] else ""
            rows.append([text_cell(name, mark), text_cell(json.dumps(run["settings"])), *_best(run)])
        for run in found.get("other_seeds", []):
            rows.append([text_cell(name), text_cell(f"training seed {run['seed']}"), *_best(run)])
    heads = ["method", "settings", f"best validation {HEADLINE.label}", "at update"]
    return heading("Tuning") + table(heads, rows)


def _best(run: dict[str, Any]) -> list[str]:
    return [number_cell(run[HEADLINE.key]), number_cell(run["update"], digits=0)]


def _pairs(differences: dict[str, Any]) -> str:
    rows = [
        [text_cell(one), *(interval_cell(found.get(other)) for other in differences)]
        for one, found in differences.items()
    ]
    explained = (
        f"{HEADLINE.label}, all training seeds of a method together; paired over prompts, with a 95 % bootstrap "
        "interval. Prompts are resampled, training seeds are not."
    )
    title = "Differences on the average of the sets"
    return heading(title) + table(["method", *(f"− {other}" for other in differences)], rows) + note(explained)
