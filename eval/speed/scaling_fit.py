"""How something grows along an axis: the exponent of a power law, with its interval, and what grows too fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Quantiles of Student's t at 97.5 %, by degrees of freedom from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# By how much an exponent may be above what is needed; the difference of two measurements alone by twice that.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Fit:
    """`y = c·x^exponent`, fitted to logarithms by least squares."""

    exponent: float
    """The exponent."""
    low: float
    """Lower end of its 95 % interval, which has no bound where there are two points."""
    high: float
    """Upper end."""
    last: float
    """The exponent between the last point and the one half as far or less, where what does not grow matters least."""


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """Fit a power law.

    The interval is that of a line with independent normal errors (Student's t, two degrees of freedom fewer than
    points).

    Args:
        xs: Where the points lie, above 0.
        ys: What was measured there. Points that are not above 0 are left out.

    Returns:
        The fit; None if fewer than two points are left, or all lie at one place.
    """
    used = sorted((math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0)
    n = len(used)
    if n < 2 or used[0][0] == used[-1][0]:
        return None
    mean_x, mean_y = (sum(values) / n for values in zip(*used, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in used)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in used) / spread
    x1, y1 = used[-1]
    x0, y0 = next(((x, y) for x, y in reversed(used) if x <= x1 - math.log(2) + 1e-9), used[0])
    last = (y1 - y0) / (x1 - x0)
    if n == 2:
        return Fit(slope, -math.inf, math.inf, last)
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in used)
    t = _T[min(n - 2, len(_T)) - 1]
    half = t * math.sqrt(residual / (n - 2) / spread)
    return Fit(slope, slope - half, slope + half, last)


def grows_too_fast(found: Fit | None, needed: Fit | None) -> bool:
    """Tell whether something grows faster than it must.

    Args:
        found: How it grows.
        needed: How the operations grow that it consists of.

    Returns:
        Whether the whole interval is above the needed exponent by more than `TOLERANCE`, or the upper half of the axis
        by twice that. A constant part, which all measurements have, can only make an exponent smaller.
    """
    if found is None or needed is None:
        return False
    return found.low > needed.exponent + TOLERANCE or found.last > max(needed.last, 0.0) + 2 * TOLERANCE


def agreement(pairs: Sequence[tuple[float, float]], share: float) -> dict[str, float] | None:
    """Summarise how well a plan agrees with measurements.

    Args:
        pairs: What was planned and what was measured.
        share: How far off a plan may be, as a share of what was measured.

    Returns:
        `points`, how many of them are `within` the share, and the lowest, median and highest ratio of planned to
        measured; None without points.
    """
    ratios = sorted(planned / measured for planned, measured in pairs)
    if not ratios:
        return None
    middle = len(ratios) // 2
    median = ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    within = sum(abs(ratio - 1) <= share for ratio in ratios)
    return {"points": len(ratios), "within": within, "lowest": ratios[0], "median": median, "highest": ratios[-1]}
