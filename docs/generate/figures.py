"""Figures of the documents, drawn from the results that are kept in the repository when the site is built."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"^<!-- figure: ([\w-]+) -->$", re.M)
_SHOWN = ("exact", "paper", "recommended", "rate", "words", "single step")
_GOALS = {"sum": "to ∇ of KL an answer", "rate": "to ∇ of KL a token", "words": "to ∇ of KL a token, ends held"}
_COLOURS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_INK = "#010203"  # stands for the colour of the page's text


def with_figures(text: str) -> str:
    """A page whose marks `<!-- figure: NAME -->` are replaced by the figure."""
    return _MARK.sub(lambda found: FIGURES[found[1]](), text)


def biases() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The median bias of each method over the enumerated worlds: by goal and method, (teacher's share, bias)."""
    kept = json.loads((ROOT / "eval" / "results" / "credit.json").read_text(encoding="utf-8"))
    values: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for key, found in kept.items():
        kind, _, rest = key.partition(" ")
        if kind == "enumerated":
            alpha, method, _ = rest.split("|")
            for goal in _GOALS:
                values[goal, method, float(alpha)].append(found[goal])
    out: dict[str, dict[str, list[tuple[float, float]]]] = {goal: defaultdict(list) for goal in _GOALS}
    for (goal, method, alpha), found in sorted(values.items()):
        out[goal][method].append((alpha, median(found)))
    return out


def bias_figure() -> str:
    """How far the expected update of each method is from three gradients, as the teacher's share grows."""
    found = biases()
    style: dict[Any, Any] = dict.fromkeys(_COLOURS, _INK)
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "minillm"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots(1, len(_GOALS), sharey=True)
        for panel, (goal, title) in zip(axes, _GOALS.items(), strict=True):
            for method in _SHOWN:
                panel.plot(*zip(*found[goal][method], strict=True), marker="o", markersize=4, label=method)
            panel.set(title=title, xlabel="teacher's share α", xticks=[0, 0.2, 0.5])
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("relative bias, median of 20 worlds")
        axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return _svg(figure, "Relative bias of each method against three gradients, by the teacher's share")


def _svg(figure: Figure, about: str) -> str:
    """A figure as HTML in one piece, in the colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    lines = [line for line in text.splitlines() if line.strip()]
    drawing = "\n".join(lines).replace("<svg ", f'<svg role="img" aria-label="{about}" style="max-width:100%" ', 1)
    return f"<figure>\n{drawing}\n</figure>"


FIGURES: dict[str, Callable[[], str]] = {"bias": bias_figure}
"""The figures by the name that a page asks for them with."""
