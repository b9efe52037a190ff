"""Scores of answers: of each answer against its references, and of one model's answers to a set of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.evaluation import statistics
from minillm.evaluation.metrics import HELD_OUT, METRICS, Metric
from minillm.evaluation.statistics import Floats, Interval
from minillm.evaluation.store import Row


def score_text(text: str, references: Sequence[str], metrics: Iterable[Metric] = METRICS) -> dict[str, float]:
    """Score one text against its references with every metric that needs references.

    Args:
        text: The answer.
        references: Texts that would be right; where there is none, nothing is scored.
        metrics: The metrics to choose from.

    Returns:
        A value for each metric's key.
    """
    if not references:
        return {}
    return {metric.key: metric.score(text, references) for metric in metrics if metric.score is not None}


def with_other_seeds_references(rows: Sequence[Row], references: Sequence[Row]) -> list[Row]:
    """Score answers against the answers of a teacher, or of several, to the same prompt.

    An answer is compared with the references of every other seed, and the best of them counts. A teacher that is scored
    on its own answers is therefore never compared with the very same answer.

    Args:
        rows: Answers of a model.
        references: Answers of the teacher, or of all teachers, to the same prompts, with the same seeds.

    Returns:
        The rows with the values of `score_text`, for the metrics of held-out prompts.
    """
    texts: dict[tuple[int, int], list[str]] = {}
    for row in references:
        texts.setdefault((row["row"], row["seed"]), []).append(row["text"])
    seeds = sorted({row["seed"] for row in references})
    scored = []
    for row in rows:
        others = [text for seed in seeds if seed != row["seed"] for text in texts[row["row"], seed]]
        scored.append({**row, **score_text(row["text"], others, HELD_OUT)})
    return scored


def group_by_seed(rows: Iterable[Row]) -> list[list[Row]]:
    """Group answers by seed, each group in the order of the prompts."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["seed"], []).append(row)
    return [sorted(group, key=lambda row: row["row"]) for group in groups.values()]


def per_prompt(groups: Sequence[Sequence[Row]], metric: Metric) -> Floats:
    """The mean over seeds of each prompt's value [prompts], scaled to the metric's unit.

    Args:
        groups: Answers by seed, all to the same prompts in the same order. Where the metric needs references, answers
            without one are left out.
        metric: A metric per answer.
    """
    table = [[metric.scale * metric.of_answer(row) for row in rows if _has(row, metric)] for rows in groups]
    return np.mean(np.array(table, dtype=float), axis=0)


def per_seed(groups: Sequence[Sequence[Row]], metric: Metric) -> list[float]:
    """One value for each seed with a measured answer, in the metric's unit.

    Args:
        groups: Answers by seed.
        metric: A metric per answer or per seed.
    """
    if metric.per == "seed":
        assert metric.value is not None
        return [metric.value(rows) for rows in groups]
    measured = [[metric.of_answer(row) for row in rows if _has(row, metric)] for rows in groups]
    return [metric.scale * float(np.mean(values)) for values in measured if values]


def per_token(rows: Sequence[Row], metric: Metric) -> float:
    """The mean over response tokens of a metric per token; NaN where an answer has no number."""
    totals, tokens = (
        np.array(values, dtype=float)
        for values in ([metric.of_answer(row) for row in rows], [len(row["ids"]) for row in rows])
    )
    return float(statistics.ratio_of(totals, tokens)(np.arange(len(rows))))


def _has(row: Row, metric: Metric) -> bool:
    if metric.needs is not None:  # null where it was not finite
        return row.get(metric.needs) is not None
    return metric.score is None or metric.key in row


@dataclass(frozen=True)
class Scores:
    """Scores of one model's answers to the held-out prompts.

    Attributes:
        means: For each metric per answer, its mean over the seeds, [prompts].
        totals: For each metric per token, its sum over the tokens of all seeds, [prompts]. A metric for which an answer
            has no finite number is left out.
        tokens: Number of response tokens of all seeds, [prompts].
    """

    means: dict[str, Floats]
    totals: dict[str, Floats]
    tokens: Floats

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.tokens)


def collect(rows: Sequence[Row], references: Sequence[Row]) -> Scores:
    """Score a model's answers with the metrics of held-out prompts.

    Args:
        rows: Answers of a model, with the same seeds for every prompt.
        references: Answers of the teacher; see `with_other_seeds_references`.
    """
    groups = group_by_seed(with_other_seeds_references(rows, references))
    tokens = np.sum([[float(len(row["ids"])) for row in group] for group in groups], axis=0)
    totals = {
        metric.key: np.sum([[metric.of_answer(row) for row in group] for group in groups], axis=0)
        for metric in HELD_OUT
        if metric.per == "token" and all(metric.key in row for row in rows)
    }
    return Scores(
        means={metric.key: per_prompt(groups, metric) for metric in HELD_OUT if metric.per == "answer"},
        totals={key: values for key, values in totals.items() if not np.isnan(values).any()},
        tokens=tokens,
    )


def summarise(scores: Scores, times: int) -> dict[str, Interval]:
    """Compute each metric's value and its 95 % interval over prompts.

    Args:
        scores: Of one model.
        times: Number of bootstrap samples.

    Returns:
        For each metric's key `mean`, `low` and `high`, in the metric's unit.
    """
    out: dict[str, Interval] = {}
    for metric in HELD_OUT:
        if metric.key in scores.means:
            statistic = statistics.mean_of(scores.means[metric.key])
        elif metric.key in scores.totals:
            statistic = statistics.ratio_of(scores.totals[metric.key], scores.tokens)
        else:
            continue
        out[metric.key] = statistics.interval(statistic, scores.prompts, times)
    return out


def compare(before: Scores, after: Scores, times: int) -> dict[str, Interval]:
    """Compare two models' scores over the same prompts, with paired 95 % intervals.

    Args:
        before: Scores of the first model.
        after: Scores of the second model.
        times: Number of bootstrap samples.

    Returns:
        For each metric that is `compared`: `mean`, `low` and `high` of the difference after − before (`KEY_change`, in
        the metric's unit) or of the relative reduction 1 − after/before (`KEY_reduction`); and the two levels, `before`
        and `after`, in the metric's unit. A metric that one of the models has no number for is left out.
    """
    out: dict[str, Interval] = {}
    for metric in HELD_OUT:
        key = metric.key
        if metric.compared and metric.per == "answer":
            old, new = before.means[key], after.means[key]
            change = statistics.interval(statistics.mean_of(new - old), before.prompts, times)
            out[f"{key}_change"] = change | {"before": float(old.mean()), "after": float(new.mean())}
        elif metric.compared and key in before.totals and key in after.totals:
            out[f"{key}_reduction"] = _reduction(key, before, after, times)
    return out


def _reduction(key: str, before: Scores, after: Scores, times: int) -> Interval:
    old, new = (statistics.ratio_of(scores.totals[key], scores.tokens) for scores in (before, after))
    everything = np.arange(before.prompts)
    with np.errstate(divide="ignore", invalid="ignore"):  # a level of 0 has no relative reduction
        change = statistics.interval(lambda index: 1 - new(index) / old(index), before.prompts, times)
    return change | {"before": float(old(everything)), "after": float(new(everything))}
