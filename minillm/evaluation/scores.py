"""Scores of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm.evaluation import metrics, statistics
from minillm.evaluation.answers import Row
from minillm.evaluation.statistics import Floats, Interval


@dataclass
class Scores:
    """Arrays over prompts, each entry the mean or the sum over seeds."""

    rouge_l: Floats
    finished: Floats
    tokens: Floats
    answers: int  # seeds
    reverse_kl: Floats | None


def collect(rows: Sequence[Row], references: Sequence[Row]) -> Scores:
    """Score answers. Those of one seed are compared with the references of every other seed, the best of them
    counting, so that a teacher scored on its own answers never meets the very same one."""
    reference = {(row["row"], row["seed"]): row["text"] for row in references}
    seeds = sorted({row["seed"] for row in references})
    order = sorted({row["row"] for row in rows})
    place = {row: i for i, row in enumerate(order)}
    rouge, finished, tokens, kl = (np.zeros(len(order)) for _ in range(4))
    for row in rows:
        i = place[row["row"]]
        others = [reference[row["row"], seed] for seed in seeds if seed != row["seed"]]
        rouge[i] += metrics.rouge_l(row["text"], others)
        finished[i] += 100 * row["finished"]
        tokens[i] += len(row["ids"])
        value = row.get("reverse_kl")
        kl[i] += np.nan if value is None else value
    n = len({row["seed"] for row in rows})
    return Scores(rouge / n, finished / n, tokens, n, None if np.isnan(kl).any() else kl)


def summarise(scores: Scores, times: int) -> dict[str, Interval]:
    """Means with 95 % intervals: Rouge-L and finished in percent, KL in nats a token, length in tokens."""
    n = len(scores.tokens)
    out = {
        "rouge_l": statistics.interval(statistics.mean_of(scores.rouge_l), n, times),
        "finished": statistics.interval(statistics.mean_of(scores.finished), n, times),
        "length": statistics.interval(statistics.mean_of(scores.tokens / scores.answers), n, times),
    }
    if scores.reverse_kl is not None:
        out["reverse_kl"] = statistics.interval(statistics.ratio_of(scores.reverse_kl, scores.tokens), n, times)
    return out


def compare(before: Scores, after: Scores, times: int) -> dict[str, Interval]:
    """Paired differences after − before over the same prompts, each with its levels `before` and `after`: Rouge-L in points, finished in
    percentage points; `reverse_kl_reduction` is relative, 1 − after/before, of levels in nats a token."""
    n = len(before.tokens)
    out: dict[str, Interval] = {}
    for name in ("rouge_l", "finished"):
        old, new = getattr(before, name), getattr(after, name)
        levels = {"before": float(old.mean()), "after": float(new.mean())}
        out[f"{name}_change"] = statistics.interval(statistics.mean_of(new - old), n, times) | levels
    if before.reverse_kl is not None and after.reverse_kl is not None:
        old = statistics.ratio_of(before.reverse_kl, before.tokens)
        new = statistics.ratio_of(after.reverse_kl, after.tokens)
        whole = np.arange(n)
        levels = {"before": float(old(whole)), "after": float(new(whole))}
        with np.errstate(divide="ignore", invalid="ignore"):  # of nothing, no share can fall
            out["reverse_kl_reduction"] = (
                statistics.interval(lambda index: 1 - new(index) / old(index), n, times) | levels
            )
    return out
