"""Building blocks of the HTML reports: pages, tables, cells and curves."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.evaluation.formatting import number

MAX_PROMPTS = 24
"""Prompts in a table of answers."""

Points = list[tuple[int, float]]
"""(x, y) of a curve."""
Panel = tuple[str, Mapping[str, Points]]
"""A title, and curves by label."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2330}
table{border-collapse:collapse;width:100%;margin:1rem 0}
td,th{border:1px solid #d5dae3;padding:.4rem .6rem;vertical-align:top}
th{background:#eef1f6;text-align:left}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.answer{white-space:pre-wrap;font-size:13px;width:22%}
.small{color:#5b6577;font-size:13px}
.green{color:#1a7f37}.yellow{color:#9a6700}.red{color:#c62828}
svg{max-width:100%;height:auto}
"""


def write_page(folder: Path, sections: Iterable[str]) -> Path:
    """Write `report.html`, a self-contained page, into a folder whose name is its title.

    Args:
        folder: What the report is about.
        sections: HTML, in the order of the page. A section without content is empty.

    Returns:
        The page's path.
    """
    title = html.escape(folder.name)
    page = folder / "report.html"
    page.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title} · minillm</title><style>{_STYLE}</style>"
        f"<body>{heading(folder.name, level=1)}{''.join(sections)}</body></html>",
        encoding="utf-8",
    )
    return page


def heading(text: str, level: int = 2) -> str:
    """A heading; the text is escaped."""
    return f"<h{level}>{html.escape(text, quote=False)}</h{level}>"


def note(text: str) -> str:
    """A paragraph in small print; the text is escaped."""
    return f"<p class=small>{html.escape(text, quote=False)}</p>"


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        heads: Titles of the columns, which are escaped.
        rows: Rows of cells, which are HTML (see `text_cell` and the others).
    """
    head = "".join(f"<th>{html.escape(text, quote=False)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def text_cell(text: str, mark: str = "") -> str:
    """A cell of text, which is escaped; `mark` is added in bold."""
    return f"<td>{html.escape(text)}{f' <b>{html.escape(mark)}</b>' if mark else ''}</td>"


def answer_cell(text: str) -> str:
    """A cell of a prompt's or an answer's text, which is escaped and keeps its line breaks."""
    return f"<td class=answer>{html.escape(text)}</td>"


def number_cell(value: float | None, digits: int = 2) -> str:
    """A cell with a number."""
    return f"<td class=n>{number(value, digits)}</td>"


def interval_cell(score: Mapping[str, float | None] | None) -> str:
    """A cell with `mean [low, high]`; empty where nothing was measured."""
    if score is None:
        return "<td class=n></td>"
    ends = f"[{number(score['low'])}, {number(score['high'])}]"
    return f"<td class=n>{number(score['mean'])} <span class=small>{ends}</span></td>"


def deviation_cell(score: Mapping[str, Any] | None) -> str:
    """A cell with `mean ± standard deviation`; empty where nothing was measured."""
    if score is None:
        return "<td class=n></td>"
    deviation = score.get("spread")
    small = "" if deviation is None else f" <span class=small>± {number(deviation)}</span>"
    return f"<td class=n>{number(score['mean'])}{small}</td>"


def answers_table(
    title: str, first: tuple[str, Mapping[int, str]], answers: Mapping[str, Mapping[int, str]], rows: Iterable[int]
) -> str:
    """Answers of several models side by side.

    Args:
        title: Heading of the table.
        first: Title of the first column, and its text by the prompt's row number.
        answers: For each model its answers by the prompt's row number; a model may have no answer to some prompts.
        rows: The prompts' row numbers, of which the first `MAX_PROMPTS` are shown.
    """
    name, texts = first
    body = [
        [answer_cell(found.get(row, "")) for found in (texts, *answers.values())] for row in sorted(rows)[:MAX_PROMPTS]
    ]
    return heading(title) + table([name, *answers], body) if body else ""


def curve_points(history: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The points of one curve: the entries of a training log that have a value for `key`."""
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def draw_curves(
    title: str, panels: Sequence[Panel], *, columns: int = 3, height: float = 3.1, x_label: str = "update"
) -> str:
    """Draw panels of curves as SVG; panels without a point are left out.

    Args:
        title: Heading of the figure.
        panels: The panels, in rows.
        columns: Panels in a row.
        height: Height of a row in inches.
        x_label: Label of the x axis.

    Returns:
        HTML; empty if there is nothing to draw.
    """
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
        axis.set_xlabel(x_label, fontsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # writes text as text, not as paths
        figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return heading(title) + svg[svg.index("<svg") :]
