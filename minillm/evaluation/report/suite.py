"""The report of a suite."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from minillm.data.files import read_json, read_jsonl
from minillm.evaluation.report.html import draw_curves, html_page, interval_cell, side_by_side
from minillm.evaluation.results import number

_SUITE_COLUMNS = {
    "rouge_l": "Rouge-L", "exact_match": "exact match, %", "distinct_4": "distinct-4, %", "finished": "finished, %",
    "length": "length, tokens", "reverse_kl": "KL(q‖p), nats a token", "forward_kl": "KL(p‖q), nats a token", "ece": "ECE, 0 to 1",
}  # fmt: skip


def write_suite_report(out: Path) -> Path:
    """Write `out/report.html` from the results and answers of a suite that lie there."""
    results = read_json(out / "results.json")
    parts = [
        f"<h1>{html.escape(out.name)}</h1>",
        *(set_table(results, name) for name in [*results["prompts"], "average"]),
    ]
    parts += [by_words(results), _exposure(results)]
    for name in results["prompts"]:
        answers = {model: out / model / f"{name}-{results['seeds'][0]}.jsonl" for model in results["models"]}
        parts.append(
            side_by_side(
                f"Answers: {name}", {model: read_jsonl(file) for model, file in answers.items() if file.is_file()}
            )
        )
    page = out / "report.html"
    page.write_text(html_page(out.name, parts), encoding="utf-8")
    return page


def set_table(results: dict[str, Any], name: str) -> str:
    columns = {
        key: title
        for key, title in _SUITE_COLUMNS.items()
        if any(key in sets.get(name, {}) for sets in results["models"].values())
    }
    if not columns:
        return ""
    rows = ""
    for model, sets in results["models"].items():
        change = results["differences"].get(model, {}).get(name)
        rows += f"<tr><td>{html.escape(model)}</td>"
        for key in columns:
            score = sets.get(name, {}).get(key)
            spread = (
                f" <span class=small>± {number(score['spread'])}</span>"
                if score and score.get("spread") is not None
                else ""
            )
            rows += "<td class=n></td>" if score is None else f"<td class=n>{number(score['mean'])}{spread}</td>"
        rows += f"{interval_cell(change)}</tr>"
    heads = "".join(f"<th>{title}</th>" for title in columns.values())
    count = f", {results['prompts'][name]} prompts" if name in results["prompts"] else " of the sets"
    return (
        f"<h2>{html.escape(name)}{count}</h2><table><tr><th>model</th>{heads}"
        f"<th>Rouge-L, difference to {html.escape(results['compared_with'])}</th></tr>{rows}</table>"
        f"<p class=small>Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}; differences are paired over "
        "prompts, with a 95 % bootstrap interval.</p>"
    )


def by_words(results: dict[str, Any]) -> str:
    """Rouge-L by the length of the reference."""
    out = ""
    for name in results["prompts"]:
        found = {
            model: sets.get(name, {}).get("rouge_l_by_reference_words", {}) for model, sets in results["models"].items()
        }
        bins = list(dict.fromkeys(key for values in found.values() for key in values))
        if bins:
            heads = "".join(f"<th>{key} words</th>" for key in bins)
            rows = ""
            for model, values in found.items():
                cells = "".join(f"<td class=n>{number(values.get(key))}</td>" for key in bins)
                rows += f"<tr><td>{html.escape(model)}</td>{cells}</tr>"
            title = f"{html.escape(name)}: Rouge-L by the length of the reference"
            out += f"<h3>{title}</h3><table><tr><th>model</th>{heads}</tr>{rows}</table>"
    return out


def _exposure(results: dict[str, Any]) -> str:
    """Excess accumulated error by position, where it was asked for."""
    panels = [
        (f"{name}: excess error, %", {
            model: [(at, value) for at, value in enumerate(sets[name]["excess_error"]["by_position"], 1) if value is not None]
            for model, sets in results["models"].items() if "excess_error" in sets.get(name, {})
        })
        for name in results["prompts"]
    ]  # fmt: skip
    return draw_curves("Exposure bias", panels, columns=2, height=4.0, along="token of the answer")
