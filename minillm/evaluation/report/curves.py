"""Curves of the reports, drawn as SVG whose colours the page decides.

matplotlib draws on the server side: a drawing is a few kilobytes and needs no script, where the smallest plotting
library for browsers would add tens of kilobytes of somebody else's code to every page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from minillm.evaluation.report.html import block

Points = list[tuple[int, float]]
"""(x, y) of a curve."""
Panel = tuple[str, Mapping[str, Points]]
"""A title, and curves by label."""

# Colours that stand for the variables of `style.css`, and occur nowhere else.
_INK, _LINE = "#010203", "#040506"
_SERIES = [f"#0708{number:02x}" for number in range(8)]
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(_SERIES)
}
_STYLE = {
    "svg.fonttype": "none",  # writes text as text, not as paths
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "legend.framealpha": 0.0,
    "legend.edgecolor": "none",
    "legend.labelcolor": _INK,
}
_MOST_POINTS = 1000
_UNNAMED = {"Creator": None, "Date": None, "Format": None, "Type": None}


def curve_points(history: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The points of one curve: the entries of a training log that have a value for `key`."""
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def draw_curves(title: str, panels: Sequence[Panel], *, x_label: str = "update") -> Markup:
    """Draw panels of curves as SVG; panels without a point are left out.

    Args:
        title: Heading of the figure.
        panels: The panels, which the page lays out in as many columns as it has room for.
        x_label: Label of the x axis.

    Returns:
        HTML; empty if there is nothing to draw.
    """
    drawn = [(name, _draw(name, series, x_label)) for name, series in panels if any(series.values())]
    return block("curves", title=title, panels=drawn) if drawn else Markup("")


def _draw(title: str, series: Mapping[str, Points], x_label: str) -> Markup:
    """One panel. Text is escaped by matplotlib, whose own markup (`$`) is switched off."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": f"{title} {list(series)}"}  # else every drawing has other ids
    with rc_context(style):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        figure.patch.set_visible(False)
        axis = figure.subplots()
        axis.patch.set_visible(False)
        for number, (label, points) in enumerate(series.items()):
            if points:
                few = points[:: -(-len(points) // _MOST_POINTS)]
                marker = "." if len(few) <= 60 else ""
                colour = _SERIES[number % len(_SERIES)]
                axis.plot(*zip(*few, strict=True), marker=marker, linewidth=1.4, label=_plain(label), color=colour)
        axis.set_title(_plain(title), fontsize=11)
        axis.set_xlabel(x_label, fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.6, linewidth=0.6)
        if len(series) > 1:
            axis.legend(fontsize=9)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=_UNNAMED)
    svg = written.getvalue()
    svg = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], svg[svg.index("<svg") :])
    return Markup(svg)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
