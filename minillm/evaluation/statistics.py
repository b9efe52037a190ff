"""Means and intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import InputError

Interval = dict[str, float]


Floats = NDArray[np.float64]


PERCENTILES = [2.5, 97.5]  # of a 95 % interval


def resample(n: int, times: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices [times, n] of bootstrap samples."""
    if n < 1 or times < 1:
        raise InputError(f"a bootstrap needs at least one unit and one resample, not {n} and {times}")
    return np.random.default_rng(seed).integers(0, n, size=(times, n))


def interval(statistic: Callable[[NDArray[np.int64]], Floats], n: int, times: int) -> Interval:
    """Value and 95 % percentile bootstrap interval.

    Args:
        statistic: from indices [m, n] of resampled units (prompts) to values [m].
    """
    return _interval(statistic(np.arange(n)[None])[0], statistic(resample(n, times)))


def _interval(value: float, draws: Floats) -> Interval:
    low, high = np.percentile(draws, PERCENTILES)
    return {"mean": float(value), "low": float(low), "high": float(high)}


def paired_bootstrap(a: Floats, b: Floats, times: int, seed: int = 0) -> Interval:
    """Mean difference b − a over the same prompts, its 95 % interval, and `p_worse`: the share of resamples in which
    it is 0 or less.

    Args:
        a, b: one value a prompt [n], higher is better.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"a and b need one value for each of the same prompts [n], not shapes {a.shape} and {b.shape}")
    check_not_empty(a=a)
    difference = mean_of(b - a)
    draws = difference(resample(len(a), times, seed))
    return {**_interval((b - a).mean(), draws), "p_worse": float((draws <= 0).mean())}


def mean_of(values: Floats) -> Callable[[NDArray[np.int64]], Floats]:
    """Statistic: the mean of one value a prompt [n]."""
    return lambda index: values[index].mean(-1)


def ratio_of(totals: Floats, counts: Floats) -> Callable[[NDArray[np.int64]], Floats]:
    """Statistic: a mean over tokens, from a sum and a count a prompt [n]."""
    return lambda index: totals[index].sum(-1) / np.maximum(counts[index].sum(-1), 1)


def check_not_empty(**named: Sequence[Any] | Floats) -> None:
    for name, values in named.items():
        if len(values) == 0:
            raise InputError(f"{name} is empty: there is nothing to score")
