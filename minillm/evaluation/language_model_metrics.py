"""The metrics of a language model on held-out text: what each is called, and how it follows from scored blocks.

A scored block is a row of sums (see `minillm.evaluation.language_model`), so that processes and blocks are added and
no metric depends on how the text was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.evaluation.statistics import Floats, Indices, Interval, Statistic, interval

BINS = 10
"""Bins of the confidence, of equal width and closed on the right, as in `minillm.evaluation.metrics`."""
SUMS = ("tokens", "bytes", "nll", "teacher_nll", "forward_kl", "confidence", "correct")
"""Sums of a block: predicted tokens, their bytes as text, −log q, −log p and KL(p‖q) in nats; and of each bin the
confidence in the most likely token, and how often that token was the next one."""


@dataclass(frozen=True)
class TextMetric:
    """A number of a language model on held-out text; less is better.

    Attributes:
        key: name in `results.json`; validation in training logs it as `eval_KEY`.
        title: head of a table's column.
        total: the sum of a block that it is a mean of. `calibration` stands for the error of all bins.
        per: the sum that it is divided by.
        scale: factor.
    """

    key: str
    title: str
    total: str
    per: str = "tokens"
    scale: float = 1.0


TEXT_METRICS = (
    TextMetric("text_loss", "held-out text, nats a token", "nll"),
    TextMetric("bits_per_byte", "bits a byte", "nll", "bytes", 1 / math.log(2)),
    TextMetric("text_forward_kl", "KL(p‖q) on text, nats a token", "forward_kl"),
    TextMetric("text_ece", "ECE of the next token, 0 to 1", "calibration"),
)
"""Every metric of held-out text, in the order of the columns of tables."""
TEACHER_LOSS = TextMetric("teacher_text_loss", "teacher's held-out text, nats a token", "teacher_nll")
"""The teacher's own loss on the same text, which tells when a student has passed it."""
VALIDATION = dict.fromkeys((metric.key for metric in TEXT_METRICS if metric.total != "forward_kl"), False)
"""What validation on text always measures, and that less of it is better. KL(p‖q) needs a live teacher."""


def text_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the metrics of some scored blocks together; those that need a teacher only where it scored them.

    Args:
        rows: scored blocks, or sums of them.
    """
    every = np.arange(len(rows))[None]
    found = {
        metric.key: float(statistic(every)[0])
        for metric in (*TEXT_METRICS, TEACHER_LOSS)
        if (statistic := _statistic(metric, rows)) is not None
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


def text_intervals(rows: Sequence[Mapping[str, Any]], times: int) -> dict[str, Interval]:
    """The same with 95 % bootstrap intervals over blocks.

    Args:
        rows: scored blocks.
        times: number of bootstrap samples.
    """
    statistics = {metric.key: _statistic(metric, rows) for metric in TEXT_METRICS}
    return {key: interval(found, len(rows), times) for key, found in statistics.items() if found is not None}


def _statistic(metric: TextMetric, rows: Sequence[Mapping[str, Any]]) -> Statistic | None:
    """The metric of resampled blocks; None where the rows lack what it needs."""
    if metric.total == "calibration":
        return _calibration(rows)
    if any(metric.total not in row for row in rows):
        return None
    totals, counts = (np.array([row[name] for row in rows], np.float64) for name in (metric.total, metric.per))

    def ratio(index: Indices) -> Floats:
        return metric.scale * totals[index].sum(-1) / np.maximum(counts[index].sum(-1), 1)

    return ratio


def _calibration(rows: Sequence[Mapping[str, Any]]) -> Statistic:
    """Σ over bins of |correct − confidence|, divided by the tokens."""
    gaps = np.array([np.subtract(row["correct"], row["confidence"]) for row in rows], np.float64)
    tokens = np.array([row["tokens"] for row in rows], np.float64)

    def error(index: Indices) -> Floats:
        summed = np.stack([gaps[some].sum(0) for some in index])
        return np.abs(summed).sum(-1) / np.maximum(tokens[index].sum(-1), 1)

    return error
