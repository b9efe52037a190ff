"""What the measured points of `scaling.py` say: exponents, agreement with the plan, faults, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scaling_fit import Fit, agreement, fit, grows_too_fast
from scaling_points import UNITS, Point

Record = dict[str, Any]
Measured = list[tuple[Point, Record]]
"""The points of an axis that were measured, with their records."""

HOURS, MEMORY = 0.25, 0.15  # how far off the plan may be
# What must not grow at all, as axis and name.
FLAT = {("rows", "memory"), ("rows", "first batch"), ("rows", "each batch"), ("models", "memory")}
_SMALL = {"memory": 1e8, "first batch": 0.01, "each batch": 0.01}  # growth, in bytes or seconds, that counts as none
# The operations that a phase of an update consists of.
_OPERATIONS = {"rollout": ("sampling",), "teacher": ("teacher",), "update": ("student", "head")}


def place(point: Point, record: Record) -> float:
    """Where a point lies on its axis: for sizes of models, the parameters of the model."""
    return float(record.get("parameters", {}).get(point.axis, point.x))


def series(measured: Measured) -> dict[str, list[float]]:
    """What is measured along an axis: `x`, seconds (`seconds` and those of phases), `memory`, and TRL's `trl`.

    A value that a point does not have is NaN.
    """
    measured = sorted(measured, key=lambda pair: place(*pair))
    names = dict.fromkeys(name for _, record in measured for name in record["ours"]["phases"])
    found: dict[str, list[float]] = {"x": [place(*pair) for pair in measured]}
    found["seconds"] = [record["ours"]["seconds"] for _, record in measured]
    for name in names:
        found[name] = [record["ours"]["phases"].get(name) or math.nan for _, record in measured]
    if any("batch_seconds" in record["ours"] for _, record in measured):
        found["each batch"] = [record["ours"].get("batch_seconds", math.nan) for _, record in measured]
    found["memory"] = [record["ours"]["peak_bytes"] for _, record in measured]
    planned = [record.get("planned") or {} for _, record in measured]
    found["planned seconds"] = [each.get("seconds") or math.nan for each in planned]
    found["planned memory"] = [each.get("peak_bytes") or math.nan for each in planned]
    found["trl"] = [(record.get("trl") or {}).get("seconds", math.nan) for _, record in measured]
    return found


def needed(measured: Measured, phase: str) -> list[float]:
    """The operations of a phase, or of the whole update, at each point in the order of `series`."""
    found = []
    for _, record in sorted(measured, key=lambda pair: place(*pair)):
        counted: dict[str, float] = record.get("flops") or {}
        parts = counted.keys() if phase == "seconds" else _OPERATIONS.get(phase, ())
        found.append(sum(counted[name] for name in parts if name in counted))
    return found


def exponents(measured: Measured) -> dict[str, Record]:
    """Fit a power law to everything that an axis has: the whole, its phases and its memory.

    Returns:
        By name the fit, that of the operations (`needed`; None where they are not counted) and whether it is
        `too_fast`.
    """
    values, found = series(measured), {}
    for name, ys in values.items():
        if name in ("x", "trl", "planned seconds", "planned memory"):
            continue
        grown = fit(values["x"], [y if math.isfinite(y) else 0.0 for y in ys])
        if grown is None:
            continue
        must = fit(values["x"], needed(measured, name))
        fast = grows_too_fast(grown, must) if must else _is_fault(name, measured[0][0].axis, grown, ys)
        found[name] = {"fit": asdict(grown), "needed": asdict(must) if must else None, "too_fast": fast}
    return found


def _is_fault(name: str, axis: str, grown: Fit, ys: Sequence[float]) -> bool:
    """Whether something whose operations are not counted grows faster than it must.

    Nothing may grow faster than in proportion. Memory must not grow with rows of data or models of an evaluation, nor
    must what each batch asks of the data.
    """
    if max(ys) - min(ys) < _SMALL.get(name, 0.1):
        return False
    power = 0.0 if (axis, name) in FLAT else 1.0
    return grows_too_fast(grown, Fit(power, power, power, power))


def summarise(axes: dict[str, Measured]) -> Record:
    """What `--json` prints of all axes: points, exponents, faults, and how well the plan agrees.

    A point that lies on several axes counts once for the agreement.
    """
    once = {point.key: record for some in axes.values() for point, record in some}
    grown = {axis: exponents(some) for axis, some in axes.items() if axis != "corners"}
    pairs: dict[str, list[tuple[float, float]]] = {"seconds": [], "peak_bytes": []}
    for record in once.values():
        for name, found in pairs.items():
            planned = (record.get("planned") or {}).get(name)
            if planned and record.get("flops"):  # of updates alone
                found.append((planned, record["ours"][name]))
    return {
        "axes": {
            axis: [{"x": place(point, record), "label": point.label, **_own(record)} for point, record in some]
            for axis, some in axes.items()
        },
        "exponents": grown,
        "faults": [f"{axis}: {name}" for axis, some in grown.items() for name, one in some.items() if one["too_fast"]],
        "plan": {"seconds": agreement(pairs["seconds"], HOURS), "memory": agreement(pairs["peak_bytes"], MEMORY)},
    }


def _own(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in ("key", "on")}


def table(axes: dict[str, Measured]) -> str:
    """Format all axes as Markdown tables, with the exponents below each."""
    parts = []
    for axis, measured in axes.items():
        if not measured:
            continue
        parts.append(f"### {axis}" + (f": {UNITS[axis]}" if UNITS[axis] else ""))
        parts.append(_rows(measured))
        if axis != "corners" and (grown := exponents(measured)):
            heading = "Exponents [95 %] (of the upper half; of the operations): "
            parts.append(heading + "; ".join(map(_words, grown.items())))
    return "\n\n".join(parts) + "\n"


def _rows(measured: Measured) -> str:
    measured = sorted(measured, key=lambda pair: place(*pair))
    values = series(measured)
    skip = {"x", "seconds", "memory", "planned seconds", "planned memory", "trl"}
    phases = [name for name in values if name not in skip]
    heads = ["point", "seconds", *phases, "planned", "ratio", "GB", "planned", "ratio", "TRL, seconds", "useful tokens"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for number, (point, record) in enumerate(measured):
        at = {name: some[number] for name, some in values.items()}
        tokens = record["ours"].get("tokens")
        useful = f"{tokens['useful'] / tokens['computed']:.0%}" if tokens and tokens["computed"] else ""
        cells = [
            point.label,
            _number(at["seconds"]),
            *(_number(at[name]) for name in phases),
            _number(at["planned seconds"]),
            _number(at["planned seconds"] / at["seconds"]),
            _number(at["memory"] / 1e9),
            _number(at["planned memory"] / 1e9),
            _number(at["planned memory"] / at["memory"]),
            _number(at["trl"]),
            useful,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    digits = next((digits for least, digits in ((100, 0), (10, 1), (0.1, 2)) if abs(value) >= least), None)
    return f"{value:.2g}" if digits is None else f"{value:.{digits}f}"


def _words(item: tuple[str, Record]) -> str:
    name, found = item
    grown, must = found["fit"], found["needed"]
    interval = "" if math.isinf(grown["low"]) else f" [{grown['low']:.2f}, {grown['high']:.2f}]"
    of = f"{grown['last']:.2f}" + (f"; {must['exponent']:.2f}" if must else "")
    return f"{name} {grown['exponent']:.2f}{interval} ({of})" + (" **too fast**" if found["too_fast"] else "")
