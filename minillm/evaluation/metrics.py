"""The metrics of an evaluation: what each is called, how it is computed from answers, and where it is reported.

To add a metric, add an entry to `METRICS`. The answers are then scored with it, and every table shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.errors import InputError
from minillm.evaluation.statistics import PERCENTILES, Floats, check_not_empty, resample
from minillm.evaluation.store import Row
from minillm.evaluation.text_metrics import exact_match, rouge_l


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        key: Name in `results.json`, and of an answer's own value in the rows of answers.
        label: Name in tables.
        unit: Unit in tables; empty where the label needs none.
        per: How answers are reduced to one number: `answer`: the mean of one value per answer; `token`: the sum of one
            value per answer, divided by the number of response tokens; `seed`: one value of all answers of a seed
            together; `choice`: one value of all rows of a classification by choice (`minillm.evaluation.choices`);
            `oracle`: one value of KL(p‖q) along answers of the model (`own`) and of the teacher (`oracle`).
        about: What it is, in sentences, for the documents.
        score: For metrics per `answer`: computes an answer's value from its text and its references. The value is kept
            in the answer's row, and answers without references have none.
        value: For metrics per `answer` that need no references: computes an answer's value from its row; by default the
            row's entry `key`. For metrics per `seed`, `choice` and `oracle`: computes the number from a list of rows.
        needs: For metrics per `answer`: the entry of a row without which an answer has no value.
        scale: Factor from an answer's value to `unit`, for metrics per `answer`.
        held_out: Whether the evaluation of a run's held-out prompts and validation in training report it too, beside
            suites of test sets. This is possible for metrics per `answer` and per `token`.
        greater_is_better: Whether more of it is better; None if that depends on the purpose. The best checkpoint of a
            training is chosen accordingly.
        compared: Whether a run's results compare two models by it: a metric per `answer` by its difference
            (`KEY_change` in `results.json`), a metric per `token` by its relative reduction (`KEY_reduction`).
    """

    key: str
    label: str
    unit: str
    per: Literal["answer", "token", "seed", "choice", "oracle"]
    about: str
    score: Callable[[str, Sequence[str]], float] | None = None
    value: Callable[[Any], float] | None = None
    needs: str | None = None
    scale: float = 1.0
    held_out: bool = False
    greater_is_better: bool | None = None
    compared: bool = False

    @property
    def title(self) -> str:
        """Label and unit, as the head of a table's column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def of_answer(self, row: Row) -> float:
        """An answer's own value, unscaled; NaN where its row holds no number."""
        found = row[self.key] if self.value is None else self.value(row)
        return float("nan") if found is None else float(found)


def distinct_n(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Compute the percentage of distinct n-grams among all n-grams of several sequences together.

    The value tends to fall as sequences are added, so compare equal numbers of tokens.

    Args:
        sequences: Token ids.
        n: Length of the n-grams.

    Returns:
        A percentage; NaN if no sequence has an n-gram.

    Raises:
        InputError: `n` is below 1.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, not {n}")
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else float("nan")


def excess_error(own: Sequence[Sequence[float]], oracle: Sequence[Sequence[float]], length: int) -> Floats:
    """Compute the exposure bias: ExAccErr(l) = 100 (R(l) − lε(l)) / lε(l) in percent, for l = 1..length.

    R(l) is the sum over t ≤ l of the mean over samples of KL(p‖q) at position t of the student's own responses; lε(l)
    is the same along the teacher's responses (MiniLLM, arXiv 2306.08543; Arora et al., 2022). l = 1 is the first
    response token. The mean at a position is over all samples: a response that has ended adds 0. Where lε(l) is 0, the
    value is NaN or infinite.

    The script of LMOps (evaluate_exposure_bias.py) starts at the second token, divides a prompt's sum at a position by
    the number of its samples that have not ended plus 1e-3, and averages over the prompts of one process.

    Args:
        own: KL(p‖q) in nats along responses sampled from the student, [samples][tokens].
        oracle: KL(p‖q) in nats along responses sampled from the teacher, [samples][tokens]. The two may differ in
            number.
        length: Number of positions.

    Returns:
        Percentages [length].

    Raises:
        InputError: There is no sample, or `length` is below 1.
    """
    check_not_empty(own=own, oracle=oracle)
    return _excess(*(_accumulated(errors, length).mean(0) for errors in (own, oracle)))


def excess_error_interval(
    own: Sequence[Sequence[float]], oracle: Sequence[Sequence[float]], length: int, times: int = 1000, seed: int = 0
) -> Floats:
    """Compute 95 % percentile bootstrap intervals of `excess_error`; `own` and `oracle` are resampled independently.

    Args:
        own: See `excess_error`.
        oracle: See `excess_error`.
        length: Number of positions.
        times: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The two ends at every position, [length, 2].

    Raises:
        InputError: There is no sample, or `length` or `times` is below 1.
    """
    check_not_empty(own=own, oracle=oracle)
    means = []
    # Equal seeds would draw the same indices for both.
    for errors, each in zip((own, oracle), np.random.SeedSequence(seed).generate_state(2), strict=True):
        n = len(errors)
        counts = np.stack([np.bincount(index, minlength=n) for index in resample(n, times, int(each))])
        means.append(counts @ _accumulated(errors, length) / n)  # [times, length], without an array [times, n, length]
    return np.percentile(_excess(*means), PERCENTILES, axis=0).T


def _accumulated(errors: Sequence[Sequence[float]], length: int) -> Floats:
    """Sums up to each position, [samples, length]."""
    if length < 1:
        raise InputError(f"length must be at least 1, not {length}")
    table = np.zeros((len(errors), length))
    for row, values in zip(table, errors, strict=True):
        row[: len(values)] = values[:length]
    return table.cumsum(-1)


def _excess(own: Floats, oracle: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (own - oracle) / oracle


def calibration_error(confidences: Sequence[float] | Floats, correct: Sequence[bool] | Floats, bins: int = 10) -> float:
    """Compute the expected calibration error (Guo et al., 2017).

    It is |accuracy − mean confidence| of each bin, weighted by the bin's share of the answers. Bins are of equal width
    and closed on the right; a confidence of 0 belongs to the first.

    Args:
        confidences: Probability of each answer, between 0 and 1.
        correct: Whether each answer is right.
        bins: Number of bins.

    Returns:
        A number between 0 and 1.

    Raises:
        InputError: There is no answer, the two arguments differ in length, or a confidence is not between 0 and 1.
    """
    check_not_empty(confidences=confidences)
    if len(confidences) != len(correct):
        raise InputError(f"{len(confidences)} confidences but {len(correct)} answers marked correct or not")
    if bins < 1:
        raise InputError(f"bins must be at least 1, not {bins}")
    confidence = np.asarray(confidences, np.float64)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError("confidences must lie between 0 and 1")
    # k / bins is the float nearest to the edge, so a confidence of 5/6 lies on it; linspace's edge is a little lower.
    bin_of = np.searchsorted(np.arange(1, bins) / bins, confidence)
    gaps = np.bincount(bin_of, np.asarray(correct, np.float64) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


METRICS = (
    Metric(
        "rouge_l",
        "Rouge-L",
        "",
        "answer",
        "The best Rouge-L of an answer against its references, from 0 to 100, by rouge-score with stemming. Where that "
        "package would drop letters, as in naïve or in Chinese, Unicode words are used instead, and such references "
        "are counted. In a run's own evaluation the references are the teacher's answers of the other seeds.",
        score=rouge_l,
        held_out=True,
        greater_is_better=True,
        compared=True,
    ),
    Metric(
        "exact_match",
        "exact match",
        "%",
        "answer",
        "Answers that are one of their references, up to case, spaces and punctuation that only separates words. "
        "Articles, symbols, signs and numbers count.",
        score=exact_match,
        greater_is_better=True,
    ),
    Metric(
        "reverse_kl",
        "KL(q‖p)",
        "nats a token",
        "token",
        "The reverse KL divergence from the student to the teacher over whole distributions, along the model's own "
        "answers, at the temperature of the answers: the sum over all answers, divided by their tokens. It is what "
        "MiniLLM minimises. It needs a teacher.",
        held_out=True,
        greater_is_better=False,
        compared=True,
    ),
    Metric(
        "forward_kl",
        "KL(p‖q)",
        "nats a token",
        "token",
        "The forward KL divergence along the model's own answers. It needs a teacher.",
        greater_is_better=False,
    ),
    Metric(
        "reverse_kl_mean",
        "KL(q‖p)",
        "nats a token, mean of answers",
        "answer",
        "KL(q‖p) per token of each answer, and the mean of these: short answers count as much as long ones.",
        value=lambda row: row["reverse_kl"] / len(row["ids"]),
        needs="reverse_kl",
        greater_is_better=False,
    ),
    Metric(
        "reverse_kl_answer",
        "KL(q‖p)",
        "nats an answer",
        "answer",
        "KL(q‖p) summed over each answer, and the mean of these: the divergence of whole answers. Short answers have "
        "less of it, so read it beside the length.",
        value=lambda row: row["reverse_kl"],
        needs="reverse_kl",
    ),
    Metric(
        "teacher_forward_kl",
        "KL(p‖q)",
        "nats a token of the teacher's answers",
        "oracle",
        "The forward KL divergence along the teacher's own answers. With `exposure_bias` only.",
        value=lambda rows: sum(sum(row["oracle"]) for row in rows) / sum(len(row["oracle"]) for row in rows),
        greater_is_better=False,
    ),
    Metric(
        "distinct_4",
        "distinct-4",
        "%",
        "seed",
        "Distinct 4-grams of tokens among all 4-grams of the answers of a seed. It falls as answers are added, so "
        "compare equal numbers of tokens.",
        value=lambda rows: distinct_n([row["ids"] for row in rows]),
    ),
    Metric(
        "finished",
        "finished",
        "%",
        "answer",
        "Answers that end by themselves within the limit of tokens.",
        scale=100,
        held_out=True,
        greater_is_better=True,
        compared=True,
    ),
    Metric(
        "length",
        "length",
        "tokens",
        "answer",
        "The mean length of the answers, the end token included.",
        value=lambda row: len(row["ids"]),
        held_out=True,
    ),
    Metric(
        "length_ratio",
        "length",
        "of the teacher's",
        "oracle",
        "Tokens of the model's answers as a multiple of the teacher's. With `exposure_bias` only.",
        value=lambda rows: sum(len(row["own"]) for row in rows) / sum(len(row["oracle"]) for row in rows),
    ),
    Metric(
        "ece",
        "ECE",
        "0 to 1",
        "choice",
        "The expected calibration error: how far the confidence in the most probable choice is from how often that "
        "choice is right. For sets with `choices`, one of which is the reference of each row.",
        value=lambda rows: calibration_error([row["confidence"] for row in rows], [row["correct"] for row in rows]),
        greater_is_better=False,
    ),
)
"""Every metric, in the order of the columns of tables."""
METRIC = {metric.key: metric for metric in METRICS}
"""Every metric by its key."""
HELD_OUT = tuple(metric for metric in METRICS if metric.held_out)
"""The metrics of a run's held-out prompts, and of the validation in training."""
HEADLINE = METRIC["rouge_l"]
"""The metric by which suites compare models."""
