"""Scores of generated text, and intervals for their means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = dict[str, float]
Floats = NDArray[np.float64]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F1 in percent, the best over the references (the paper's setting: rouge-score with stemming)."""
    return 100 * max(_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


def resample(n: int, times: int, seed: int = 0) -> NDArray[np.int64]:
    """Indices [times, n] of bootstrap samples."""
    return np.random.default_rng(seed).integers(0, n, size=(times, n))


def interval(statistic: Callable[[NDArray[np.int64]], Floats], n: int, times: int) -> Interval:
    """Value and 95 % percentile bootstrap interval.

    Args:
        statistic: from indices [m, n] of resampled units (prompts) to values [m].
    """
    value = statistic(np.arange(n)[None])[0]
    low, high = np.percentile(statistic(resample(n, times)), [2.5, 97.5])
    return {"mean": float(value), "low": float(low), "high": float(high)}


def mean_of(values: Floats) -> Callable[[NDArray[np.int64]], Floats]:
    """Statistic: the mean of one value a prompt [n]."""
    return lambda index: values[index].mean(-1)


def ratio_of(totals: Floats, counts: Floats) -> Callable[[NDArray[np.int64]], Floats]:
    """Statistic: a mean over tokens, from a sum and a count a prompt [n]."""
    return lambda index: totals[index].sum(-1) / np.maximum(counts[index].sum(-1), 1)
