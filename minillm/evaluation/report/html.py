"""HTML of a report."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.evaluation.results import number

SHOWN_PROMPTS = 24  # prompts in the side-by-side table


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2330}
table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{border:1px solid #d5dae3;padding:.4rem .6rem;vertical-align:top}
th{background:#eef1f6;text-align:left}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.small{color:#5b6577;font-size:13px}.green{color:#1a7f37}.yellow{color:#9a6700}.red{color:#c62828}svg{max-width:100%;height:auto}
td.answer{white-space:pre-wrap;font-size:13px;width:22%}
"""


def number_cell(value: float | None) -> str:
    return f"<td class=n>{number(value).removesuffix('.00')}</td>"


def side_by_side(title: str, answers: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """By row: a model whose tokenizer makes a prompt too long has no answer to it."""
    by_row = {model: {row["row"]: row for row in rows} for model, rows in answers.items()}
    rows = sorted(set().union(*by_row.values()))[:SHOWN_PROMPTS]
    if not rows:
        return ""
    heads = "".join(f"<th>{html.escape(model)}</th>" for model in answers)
    body = ""
    for row in rows:
        references = next(found[row] for found in by_row.values() if row in found).get("references", [])
        texts = [" / ".join(references), *(found[row]["text"] if row in found else "" for found in by_row.values())]
        body += f"<tr>{''.join(f'<td class=answer>{html.escape(text)}</td>' for text in texts)}</tr>"
    return f"<h2>{html.escape(title)}</h2><table><tr><th>reference</th>{heads}</tr>{body}</table>"


def html_page(title: str, parts: Sequence[str]) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)} · minillm</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def interval_cell(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "<td class=n></td>"
    ends = f"[{number(interval['low'])}, {number(interval['high'])}]"
    return f"<td class=n>{number(interval['mean'])} <span class=small>{ends}</span></td>"


def curve_points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def draw_curves(
    title: str,
    panels: Sequence[tuple[str, dict[str, list[tuple[int, float]]]]],
    columns: int = 3,
    height: float = 3.1,
    along: str = "update",
) -> str:
    """Panels of curves, those without a point left out."""
    present = [panel for panel in panels if any(panel[1].values())]
    if not present:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(present) // columns)
    figure = Figure(figsize=(12, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(present) :]:
        axis.set_visible(False)
    for axis, (name, series) in zip(axes, present, strict=False):
        for label, points in series.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", linewidth=1.4, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(along, fontsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return f"<h2>{title}</h2>{svg[svg.index('<svg') :]}"
