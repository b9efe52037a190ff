"""Bootstrap intervals, and the means that they are computed of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import InputError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Interval = dict[str, float]
"""`mean`, and the two ends `low` and `high` of its 95 % interval."""
Statistic = Callable[[Indices], Floats]
"""Maps indices [m, n] of resampled prompts to m values."""

PERCENTILES = [2.5, 97.5]
"""The two ends of a 95 % interval."""


def resample(n: int, times: int, seed: int = 0) -> Indices:
    """Draw bootstrap samples of `n` prompts.

    Args:
        n: Number of prompts.
        times: Number of bootstrap samples.
        seed: Seed of the generator.

    Returns:
        Indices [times, n], drawn with replacement.

    Raises:
        InputError: `n` or `times` is below 1.
    """
    if n < 1 or times < 1:
        raise InputError(f"a bootstrap needs at least one unit and one resample, not {n} and {times}")
    return np.random.default_rng(seed).integers(0, n, size=(times, n))


def interval(statistic: Statistic, n: int, times: int) -> Interval:
    """Compute a statistic of all prompts, and its 95 % percentile bootstrap interval.

    Args:
        statistic: See `mean_of` and `ratio_of`.
        n: Number of prompts.
        times: Number of bootstrap samples.
    """
    return interval_of(statistic(np.arange(n)[None])[0], statistic(resample(n, times)))


def interval_of(value: float, draws: Floats) -> Interval:
    """Combine a value with the 95 % percentile interval of its bootstrap replicates [times]."""
    low, high = np.percentile(draws, PERCENTILES)
    return {"mean": float(value), "low": float(low), "high": float(high)}


def difference_of(value: float, draws: Floats) -> Interval:
    """`interval_of` a difference, with `p_worse`: the share of the replicates in which the difference is 0 or less."""
    return {**interval_of(value, draws), "p_worse": float((draws <= 0).mean())}


def paired_bootstrap(a: Floats, b: Floats, times: int, seed: int = 0) -> Interval:
    """Compute the mean difference b − a over the same prompts, its 95 % interval, and `p_worse` (see `difference_of`).

    Args:
        a: One value per prompt [n]; higher is better.
        b: Values of the other model for the same prompts [n].
        times: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        InputError: `a` and `b` differ in shape, or are empty.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"a and b need one value for each of the same prompts [n], not shapes {a.shape} and {b.shape}")
    check_not_empty(a=a)
    return difference_of((b - a).mean(), mean_of(b - a)(resample(len(a), times, seed)))


def mean_of(values: Floats) -> Statistic:
    """Statistic: the mean of one value per prompt [n]."""
    return lambda index: values[index].mean(-1)


def ratio_of(totals: Floats, counts: Floats) -> Statistic:
    """Statistic: the mean over tokens, given each prompt's sum over its tokens [n] and its number of tokens [n]."""
    return lambda index: totals[index].sum(-1) / np.maximum(counts[index].sum(-1), 1)


def over_seeds(values: Sequence[float] | Floats) -> dict[str, Any]:
    """Summarise one value per sampling seed.

    Returns:
        `mean` over the seeds; `spread`, the standard deviation of the sample (None for a single seed); and `by_seed`,
        the values themselves.
    """
    seeds = np.asarray(values, dtype=float)
    deviation = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
    return {"mean": float(seeds.mean()), "spread": deviation, "by_seed": seeds.tolist()}


def check_not_empty(**named: Sequence[Any] | Floats) -> None:
    """Refuse an empty sequence.

    Raises:
        InputError: naming the argument that is empty.
    """
    for name, values in named.items():
        if len(values) == 0:
            raise InputError(f"{name} is empty: there is nothing to score")
