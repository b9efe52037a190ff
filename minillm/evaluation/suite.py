"""Results of a suite: every model's scores on every test set, and the differences between models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.data.examples import Example
from minillm.data.files import write_json
from minillm.evaluation import scores, statistics
from minillm.evaluation.config import Suite
from minillm.evaluation.formatting import AVERAGE
from minillm.evaluation.metrics import HEADLINE, METRICS, Metric, excess_error, excess_error_interval
from minillm.evaluation.statistics import Floats
from minillm.evaluation.store import AnswerStore, Row, part
from minillm.evaluation.suite_answers import answer_suite, superset_of
from minillm.evaluation.text_metrics import is_latin

_LENGTH_BINS = ((1, 5), (6, 10), (11, None))  # words of the longest reference, as the paper bins S-NI and UnNI

Groups = list[list[Row]]
"""Answers by seed, and to each prompt."""


def run_suite(suite: Suite, models: Mapping[str, str]) -> dict[str, Any]:
    """Have every model answer every set with every seed, and score the answers.

    Answers, scores and `results.json` are kept in `suite.out`.

    Args:
        suite: The test sets, and how they are answered.
        models: Folders or hub ids by name; the others are compared with the first.

    Returns:
        The results: `models[name][set]` and `models[name]["average"]`, `compared_with`, `differences[name][set]`,
        `seeds`, and `prompts[set]`, the number of prompts.

    Raises:
        DataError: See `check_suite`; it is raised before any model is loaded.
        VocabularyError: See `check_suite`.
        EngineError: The engine that the suite asks for is not available.
    """
    sets = answer_suite(suite, models)
    return write_json(suite.out / "results.json", _results(suite, sets, list(models)))


def pooled_differences(suite: Suite, groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Compare groups of models, such as the training seeds of a method, on the average of the sets.

    A prompt's score is its mean over a group's models. Prompts are resampled in pairs; training seeds are not
    resampled.

    Args:
        suite: The suite that the models have answered.
        groups: Names of models by the name of their group.

    Returns:
        `[one][other]`: the difference one − other, as in the `differences` of `run_suite`.
    """
    answers = {
        group: {key: [rows for name in names for rows in _read_seeds(suite, name, key)] for key in suite.sets}
        for group, names in groups.items()
    }
    return {
        one: {other: differences(suite, answers[other], answers[one])[AVERAGE] for other in groups if other != one}
        for one in groups
    }


def _read_seeds(suite: Suite, name: str, key: str) -> Groups:
    store = AnswerStore(suite.out / name)
    return [store.read(part(key, seed)) for seed in suite.seeds]


def _results(suite: Suite, sets: Mapping[str, list[Example]], names: Sequence[str]) -> dict[str, Any]:
    answers = {name: {key: _read_seeds(suite, name, key) for key in sets} for name in names}
    models: dict[str, Any] = {}
    for name in names:
        store = AnswerStore(suite.out / name)
        models[name] = {key: _set_scores(suite, key, answers[name][key], store) for key in sets}
        scored = [found[HEADLINE.key]["by_seed"] for found in models[name].values() if HEADLINE.key in found]
        if scored:
            models[name][AVERAGE] = {HEADLINE.key: statistics.over_seeds(np.mean(scored, axis=0))}
    return {
        "models": models,
        "compared_with": names[0],
        "differences": {name: differences(suite, answers[names[0]], answers[name]) for name in names[1:]},
        "seeds": suite.seeds,
        "prompts": {key: len(examples) for key, examples in sets.items()},
    }


def _set_scores(suite: Suite, key: str, groups: Groups, store: AnswerStore) -> dict[str, Any]:
    """The scores of one model on one set."""
    choices, exposure = (store.file(part(key, kind)).is_file() for kind in ("choices", "exposure"))
    whole = {
        "choice": store.read(part(key, "choices")) if suite.sets[key].choices and choices else [],
        "oracle": store.read(part(key, "exposure")) if suite.exposure_bias and exposure else [],
    }
    out: dict[str, Any] = {
        metric.key: found
        for metric in METRICS
        if (found := _reduced(metric, groups, whole, suite.bootstrap)) is not None
    }
    referenced = [[row for row in rows if HEADLINE.key in row] for rows in groups]
    if referenced[0]:
        out["not_latin"] = sum(not is_latin(" ".join(row["references"])) for row in referenced[0])
        out[f"{HEADLINE.key}_by_reference_words"] = _by_reference_words(referenced)
    if rows := whole["oracle"]:
        own, oracle = [row["own"] for row in rows], [row["oracle"] for row in rows]
        out["excess_error"] = {
            "by_position": excess_error(own, oracle, suite.max_new_tokens).tolist(),
            "interval": excess_error_interval(own, oracle, suite.max_new_tokens, suite.bootstrap).tolist(),
        }
    return out


def _reduced(metric: Metric, groups: Groups, whole: Mapping[str, list[Row]], times: int) -> dict[str, Any] | None:
    """The value of a metric for one model and one set; None where it was not measured.

    `whole` has the rows of metrics that are computed of all rows together, by the kind of metric.
    """
    if metric.per in whole:
        assert metric.value is not None
        return {"mean": metric.value(whole[metric.per])} if whole[metric.per] else None
    if metric.per == "token":  # measured for one seed only
        measured = next((rows for rows in groups if metric.key in rows[0]), None)
        return None if measured is None else {"mean": scores.per_token(measured, metric)}
    values = scores.per_seed(groups, metric)
    if not values:
        return None
    out = statistics.over_seeds(values)
    if metric is HEADLINE:
        prompts = scores.per_prompt(groups, metric)
        out |= statistics.interval(statistics.mean_of(prompts), len(prompts), times)
    return out


def _by_reference_words(referenced: Groups) -> dict[str, float]:
    """The headline metric by the number of words of a prompt's longest reference."""
    out: dict[str, float] = {}
    for low, high in _LENGTH_BINS:
        values = [
            HEADLINE.of_answer(row)
            for rows in referenced
            for row in rows
            if low <= max(len(text.split()) for text in row["references"]) <= (high or math.inf)
        ]
        if values:
            out[f"{low}-{high or ''}"] = float(np.mean(values))
    return out


def _paired(first: Groups, second: Groups) -> tuple[list[int], Floats, Floats]:
    """The headline metric of two models on the prompts that both have answered, and the prompts' row numbers.

    The tokenizer of one model may make prompts too long that the other has answered.
    """
    common = {row["row"] for row in first[0] if HEADLINE.key in row} & {row["row"] for row in second[0]}
    if not common:
        return [], np.zeros(0), np.zeros(0)
    one, other = ([[row for row in rows if row["row"] in common] for rows in groups] for groups in (first, second))
    return [row["row"] for row in one[0]], scores.per_prompt(one, HEADLINE), scores.per_prompt(other, HEADLINE)


def differences(suite: Suite, first: Mapping[str, Groups], second: Mapping[str, Groups]) -> dict[str, dict[str, float]]:
    """Compare two models, or groups of models, by the headline metric.

    Args:
        suite: The suite that they have answered.
        first: Answers to each set.
        second: Answers to each set.

    Returns:
        The difference second − first (see `statistics.paired_bootstrap`), for each set with references and for their
        average. Only prompts that both have answered count.
    """
    out: dict[str, dict[str, float]] = {}
    changes: dict[str, dict[int, float]] = {}
    for key in first:
        rows, before, after = _paired(first[key], second[key])
        if rows:
            out[key] = statistics.paired_bootstrap(before, after, suite.bootstrap)
            changes[key] = dict(zip(rows, (after - before).tolist(), strict=True))
    return out | ({AVERAGE: average_difference(suite, changes)} if changes else {})


def average_difference(suite: Suite, changes: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Average the differences of several sets, with a 95 % interval.

    Each set's prompts are resampled independently. The prompts of a set that is a part of another one are resampled
    together with that one, because their answers are the same.

    Args:
        suite: Tells which sets are part of another one.
        changes: For each set, the difference by the prompt's row number.
    """
    families: dict[str, list[str]] = {}
    for key in changes:
        families.setdefault(superset_of(suite, key) or key, []).append(key)
    draws = []
    for seed, keys in enumerate(families.values()):
        rows = sorted(set().union(*(changes[key] for key in keys)))
        drawn = statistics.resample(len(rows), suite.bootstrap, seed)
        for key in keys:
            values = np.array([changes[key].get(row, 0.0) for row in rows])
            inside = np.array([row in changes[key] for row in rows])
            draws.append(values[drawn].sum(-1) / np.maximum(inside[drawn].sum(-1), 1))
    mean = float(np.mean([np.mean(list(values.values())) for values in changes.values()]))
    return statistics.difference_of(mean, np.mean(draws, axis=0))
