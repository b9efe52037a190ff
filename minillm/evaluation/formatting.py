"""Measured numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

AVERAGE = "average"
"""Name of the mean over the sets in a suite's results, beside the sets' own names."""
UNDEFINED = "–"
"""Shown in place of a number that does not exist, such as a share of nothing or a ratio to zero."""


def number(value: float | None, digits: int = 2) -> str:
    """Format a number; None, NaN and infinities as `UNDEFINED`."""
    return UNDEFINED if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(score: Mapping[str, float | None] | None, digits: int = 2) -> str:
    """Format a score as `mean [low, high]`; as an empty string where nothing was measured."""
    if score is None:
        return ""
    return f"{number(score['mean'], digits)} [{number(score['low'], digits)}, {number(score['high'], digits)}]"


def with_deviation(score: Mapping[str, Any] | None) -> str:
    """Format a score over seeds as `mean ± standard deviation`; the deviation is left out where there is none."""
    if score is None:
        return ""
    deviation = score.get("spread")
    return number(score["mean"]) if deviation is None else f"{number(score['mean'])} ± {number(deviation)}"
