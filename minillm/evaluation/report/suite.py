"""The report of a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillm.data.files import read_json, read_jsonl
from minillm.evaluation.formatting import AVERAGE
from minillm.evaluation.metrics import HEADLINE, METRICS
from minillm.evaluation.report.curves import draw_curves
from minillm.evaluation.report.html import (
    answers_table,
    deviation_cell,
    heading,
    interval_cell,
    note,
    number_cell,
    table,
    text_cell,
    write_page,
)
from minillm.evaluation.store import AnswerStore, part


def write_suite_report(out: Path) -> Path:
    """Write `report.html` of a suite from the results and answers that are there.

    Args:
        out: The suite's folder, with its `results.json`.

    Returns:
        The report's path.
    """
    results = read_json(out / "results.json")
    tables = [set_table(results, name) for name in (*results["prompts"], AVERAGE)]
    answers = [_answers(out, results, name) for name in results["prompts"]]
    return write_page(out, [*tables, reference_words_tables(results), _exposure(results), *answers])


def set_table(results: dict[str, Any], name: str) -> str:
    """The table of one set, or of the average over the sets.

    Args:
        results: The results of a suite.
        name: The set, or `AVERAGE`.

    Returns:
        HTML; empty if nothing was measured.
    """
    scores = {model: sets.get(name, {}) for model, sets in results["models"].items()}
    columns = [metric for metric in METRICS if any(metric.key in found for found in scores.values())]
    if not columns:
        return ""
    rows = [
        [
            text_cell(model),
            *(deviation_cell(found.get(metric.key)) for metric in columns),
            interval_cell(results["differences"].get(model, {}).get(name)),
        ]
        for model, found in scores.items()
    ]
    heads = [
        "model",
        *(metric.title for metric in columns),
        f"{HEADLINE.label}, difference to {results['compared_with']}",
    ]
    count = f", {results['prompts'][name]} prompts" if name in results["prompts"] else " of the sets"
    explained = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}; differences are paired over "
        "prompts, with a 95 % bootstrap interval."
    )
    return heading(name + count) + table(heads, rows) + note(explained)


def reference_words_tables(results: dict[str, Any]) -> str:
    """The headline metric by the length of the reference, a table for each set.

    Args:
        results: The results of a suite.
    """
    out = ""
    for name in results["prompts"]:
        found = {
            model: sets.get(name, {}).get(f"{HEADLINE.key}_by_reference_words", {})
            for model, sets in results["models"].items()
        }
        bins = list(dict.fromkeys(key for values in found.values() for key in values))
        if bins:
            rows = [
                [text_cell(model), *(number_cell(values.get(key)) for key in bins)] for model, values in found.items()
            ]
            out += heading(f"{name}: {HEADLINE.label} by the length of the reference", level=3)
            out += table(["model", *(f"{key} words" for key in bins)], rows)
    return out


def _exposure(results: dict[str, Any]) -> str:
    """Curves of the excess accumulated error by position, where it was measured."""
    panels = [
        (
            f"{name}: excess error, %",
            {
                model: [
                    (position, value)
                    for position, value in enumerate(sets[name]["excess_error"]["by_position"], 1)
                    if value is not None
                ]
                for model, sets in results["models"].items()
                if "excess_error" in sets.get(name, {})
            },
        )
        for name in results["prompts"]
    ]
    return draw_curves("Exposure bias", panels, x_label="token of the answer")


def _answers(out: Path, results: dict[str, Any], name: str) -> str:
    """Answers of the first seed to one set. A model whose tokenizer makes a prompt too long has no answer to it."""
    files = {model: AnswerStore(out / model).file(part(name, results["seeds"][0])) for model in results["models"]}
    rows = {model: read_jsonl(file) for model, file in files.items() if file.is_file()}
    references = {row["row"]: " / ".join(row.get("references", [])) for some in reversed(rows.values()) for row in some}
    answers = {model: {row["row"]: row["text"] for row in some} for model, some in rows.items()}
    return answers_table(f"Answers: {name}", ("reference", references), answers, references)
