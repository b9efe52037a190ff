"""The report of a comparison."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from minillm.data.files import read_json
from minillm.evaluation.report.html import curve_points, draw_curves, html_page, interval_cell, number_cell
from minillm.evaluation.report.suite import by_words, set_table


def write_comparison_report(root: Path) -> Path:
    """Write `root/report.html` from a comparison's `compare.json`: curves of every method, and the tests where they were read."""
    results = read_json(root / "compare.json")
    parts = [f"<h1>{html.escape(root.name)}</h1>", *_validation_curves(results), _tuning(results["tuning"])]
    if tests := results.get("tests"):
        parts += [
            *(set_table(tests, name) for name in [*tests["prompts"], "average"]),
            _pairs(results["differences"]),
            by_words(tests),
        ]
    page = root / "report.html"
    page.write_text(html_page(root.name, parts), encoding="utf-8")
    return page


def _validation_curves(results: dict[str, Any]) -> list[str]:
    """Of the settings that each method was taken with, its first training seed; from where all start, if that was validated."""
    titles = {"eval_rouge_l": "Rouge-L", "eval_reverse_kl": "KL(q‖p), nats a token"}
    start = [{**entry, "step": 0} for entry in results.get("start", {}).get("curve", [])[-1:]]
    panels = [
        (
            title,
            {
                name: curve_points(start + found["tried"][found["chosen"]]["curve"], key)
                for name, found in results["tuning"].items()
            },
        )
        for key, title in titles.items()
    ]
    return [draw_curves("Validation while training", panels, columns=2, height=4.4)]


def _tuning(tuning: dict[str, Any]) -> str:
    rows = ""
    for name, found in tuning.items():
        for i, run in enumerate(found["tried"]):
            mark = " <b>chosen</b>" if i == found["chosen"] else ""
            settings = html.escape(json.dumps(run["settings"]))
            rows += f"<tr><td>{html.escape(name)}{mark}</td><td>{settings}</td>{number_cell(run['rouge_l'])}{number_cell(run['update'])}</tr>"
        for run in found.get("other_seeds", []):
            numbers = number_cell(run["rouge_l"]) + number_cell(run["update"])
            rows += f"<tr><td>{html.escape(name)}</td><td>training seed {run['seed']}</td>{numbers}</tr>"
    heads = "<th>method</th><th>settings</th><th>best validation Rouge-L</th><th>at update</th>"
    return f"<h2>Tuning</h2><table><tr>{heads}</tr>{rows}</table>"


def _pairs(differences: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(one)}</td>{''.join(interval_cell(found.get(other)) for other in differences)}</tr>"
        for one, found in differences.items()
    )
    heads = "".join(f"<th>− {html.escape(other)}</th>" for other in differences)
    return (
        f"<h2>Differences on the average of the sets</h2><table><tr><th>method</th>{heads}</tr>{rows}</table>"
        "<p class=small>Rouge-L, all training seeds of a method together; paired over prompts, with a 95 % bootstrap interval. Prompts are "
        "resampled, training seeds are not.</p>"
    )
