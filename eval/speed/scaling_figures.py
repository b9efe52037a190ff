"""Draws the figures of `scaling.py`: for each axis the seconds and the memory, measured and planned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scaling_points import UNITS
from scaling_report import Measured, series

_LINES = {"seconds": "whole", "memory": "measured"}


def draw(axes: dict[str, Measured], folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw a figure of each axis that has two points or more.

    Args:
        axes: The measured points of each axis.
        folder: Where the figures are written.
        suffix: `svg` or `png`.

    Returns:
        The files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("--figures needs matplotlib: pip install matplotlib, or leave the figures out") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "minillm"  # the same numbers give the same file
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for axis, measured in axes.items():
        if axis == "corners" or len(measured) < 2:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        _plot(left, right, axis, series(measured))
        files.append(folder / f"{axis}.{suffix}")
        figure.savefig(files[-1], metadata={"Date": None} if suffix == "svg" else None)
        pyplot.close(figure)
    return files


def _plot(left: Any, right: Any, axis: str, values: dict[str, list[float]]) -> None:
    """Seconds on the left, memory on the right."""
    xs = values["x"]
    for name, ys in values.items():
        if name in ("x", "memory", "planned memory"):
            continue
        style = {"planned seconds": "k--", "trl": "s", "seconds": "k-o"}.get(name, "-o")
        label = {"planned seconds": "planned", "trl": "TRL"}.get(name, _LINES.get(name, name))
        if any(math.isfinite(y) and y > 0 for y in ys):
            left.plot(xs, [y if y > 0 else math.nan for y in ys], style, label=label, markersize=4)
    for name, style, label in (("memory", "k-o", "measured"), ("planned memory", "k--", "planned")):
        if any(map(math.isfinite, values[name])):
            right.plot(xs, [y / 1e9 for y in values[name]], style, label=label, markersize=4)
    left.set(yscale="log", ylabel="seconds")
    right.set(ylabel="GB", ylim=(0, None))
    for plot in (left, right):
        plot.set(xscale="log", xlabel=UNITS[axis])
        plot.set_xticks(xs, [f"{x:,.0f}" if x < 1e6 else f"{x / 1e6:,.0f}M" for x in xs], fontsize=8)
        plot.minorticks_off()
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8)
