"""Test sets answered by several models: answers kept beside their scores, one table, one section of HTML.

A part (a model, a set, a seed) that is there and was made from the same weights, prompts and settings is not made again. The seeds of a set
that are missing are drawn together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillm.data.examples import Example
from minillm.data.files import finite, read_jsonl, write_json, write_jsonl
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.evaluation import metrics, statistics
from minillm.evaluation.answers import Row, answer, token_divergences
from minillm.evaluation.choices import choice_logprobs, right_choices
from minillm.evaluation.config import Suite
from minillm.evaluation.sets import Model, check_suite
from minillm.evaluation.statistics import Floats
from minillm.loss.in_forward import bind_scoring
from minillm.models.configs import text_config
from minillm.models.conventions import settle
from minillm.models.device import device, working_dtype
from minillm.models.load import load_model
from minillm.models.vocabulary import head_width
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.choose import ReusableEngine, choose_engine
from minillm.teacher.local import LocalTeacher

_LENGTH_BINS = ((1, 5), (6, 10), (11, None))  # words of the longest reference, as the paper bins S-NI and UnNI


@dataclass
class _Loaded(Model):
    """A model that has something left to do."""

    model: Any
    sampling: Sampling


def run_suite(suite: Suite, models: Mapping[str, str]) -> dict[str, Any]:
    """Every model answers every set with every seed; returns and keeps the results (`results.json` in `suite.out`).

    Args:
        models: folders or hub ids by name; the first is what the others are compared with.

    Raises:
        DataError, VocabularyError: as `check_suite`, before any model loads.
    """
    sets = answer_suite(suite, models)
    return write_json(suite.out / "results.json", _collect(suite, sets, list(models)))


def answer_suite(suite: Suite, models: Mapping[str, str]) -> dict[str, list[Example]]:
    """The answers alone, where they are not there yet; returns the sets. See `run_suite`."""
    sets, checked = check_suite(suite, models)
    config = RolloutConfig(engine="transformers" if suite.no_repeat_ngram else suite.engine)
    choose_engine(config.engine)
    most = max(len(examples) for examples in sets.values()) * len(suite.seeds)
    engines = ReusableEngine(config, suite.max_prompt_tokens + suite.max_new_tokens, sequences=min(most, 256))
    teacher = _Teacher(suite)
    try:
        for model in checked:
            _answer_all(suite, model, engines, teacher)
            engines.sleep()
    finally:
        engines.close()
    return sets


class _Teacher:
    """The suite's teacher, loaded when it is first needed."""

    def __init__(self, suite: Suite) -> None:
        self._name, self._loaded = suite.teacher, None

    def __bool__(self) -> bool:
        return self._name is not None

    def get(self) -> LocalTeacher:
        if self._loaded is None:
            assert self._name is not None
            model: Any = load_model(self._name, working_dtype())
            self._loaded = LocalTeacher(model.to(device()))
        return self._loaded


def _answer_all(suite: Suite, this: Model, engines: ReusableEngine, teacher: _Teacher) -> None:
    name, folder, prompts = this.name, this.folder, this.prompts
    made_from = _made_from(suite, this)
    left = {
        key: [seed for seed in suite.seeds if not _is_there(suite, name, key, str(seed), made_from[key])]
        for key in prompts
    }
    missing = {key: seeds for key, seeds in left.items() if seeds}
    extra = [key for key in this.options if not _is_there(suite, name, key, "choices", made_from[key])]
    exposure = [
        key for key in prompts if suite.exposure_bias and not _is_there(suite, name, key, "exposure", made_from[key])
    ]
    if not missing and not extra and not exposure:
        return
    model: Any = load_model(folder, working_dtype()).to(device())  # pyright: ignore[reportArgumentType]
    conventions = settle(this.tokenizer, model, template=suite.template == "chat")
    sampling = conventions.sampling(suite.max_new_tokens, suite.temperature, no_repeat_ngram=suite.no_repeat_ngram)
    loaded = _Loaded(**vars(this), model=model, sampling=sampling)
    for key in sorted(missing, key=lambda key: _whole_of(suite, key) is not None):
        whole = _whole_of(suite, key)
        if whole is not None:
            wanted = {prompt.example.row for prompt in prompts[key]}
            theirs = {seed: read_jsonl(_file(suite, name, whole, str(seed))) for seed in missing[key]}
            by_seed = {seed: [row for row in rows if row["row"] in wanted] for seed, rows in theirs.items()}
        else:
            by_seed = answer(engines.of(model, folder), prompts[key], sampling, missing[key], this.tokenizer)
            _score(loaded, key, by_seed, suite, teacher)
        for seed, rows in by_seed.items():
            _keep(suite, name, key, str(seed), rows, made_from[key])
    for key in extra:
        _keep(suite, name, key, "choices", _choose(loaded, key, suite.sets[key].choices), made_from[key])
    for key in exposure:
        _keep(suite, name, key, "exposure", _exposure(loaded, key, suite, engines, teacher), made_from[key])


def _score(loaded: _Loaded, key: str, by_seed: Mapping[int, list[Row]], suite: Suite, teacher: _Teacher) -> None:
    """Write into every row what its answer is worth."""
    prompts = loaded.prompts[key]
    for rows in by_seed.values():
        for row, prompt in zip(rows, prompts, strict=True):
            row["references"] = list(prompt.example.references)
            if prompt.example.references:
                row["rouge_l"] = metrics.rouge_l(row["text"], prompt.example.references)
                row["exact_match"] = metrics.exact_match(row["text"], prompt.example.references)
    if teacher and suite.seeds[0] in by_seed:
        rows = by_seed[suite.seeds[0]]
        found = token_divergences(
            bind_scoring(loaded.model), teacher.get(), [p.ids for p in prompts], [row["ids"] for row in rows],
            _shared(loaded, teacher), suite.temperature, progress=True,
        )  # fmt: skip
        for row, (reverse, forward) in zip(rows, found, strict=True):
            row["reverse_kl"], row["forward_kl"] = float(reverse.sum()), float(forward.sum())


def _whole_of(suite: Suite, key: str) -> str | None:
    """The set, if there is one, of whose rows this one is those with references of some length: its answers are theirs."""
    test = suite.sets[key]
    if test.limit is not None or not (test.min_reference_words or test.max_reference_words):
        return None
    plain = test.model_dump() | {"min_reference_words": None, "max_reference_words": None}
    return next((name for name, other in suite.sets.items() if other.model_dump() == plain), None)


def _shared(loaded: _Loaded, teacher: _Teacher) -> int:
    return min(loaded.sampling.vocab_size, head_width(teacher.get().model))


def _choose(loaded: _Loaded, key: str, choices: Sequence[str]) -> list[Row]:
    """The likeliest choice of every prompt with a reference, its share of the probability of all, and whether it is right."""
    prompts = [prompt for prompt in loaded.prompts[key] if prompt.example.references]
    found = choice_logprobs(
        LocalTeacher(loaded.model), prompts, loaded.options[key], replace(loaded.sampling, temperature=1.0)
    )
    rows: list[Row] = []
    for prompt, logs in zip(prompts, found, strict=True):
        best = int(logs.argmax())
        right = best in right_choices(choices, prompt.example.references)
        confidence = float(torch.softmax(logs, 0)[best])
        rows.append({"row": prompt.example.row, "confidence": confidence, "correct": right, "logprobs": logs.tolist()})
    return rows


def _exposure(loaded: _Loaded, key: str, suite: Suite, engines: ReusableEngine, teacher: _Teacher) -> list[Row]:
    """KL(p‖q) along one answer of the model and one of the teacher to each prompt."""
    prompts, at_hand = loaded.prompts[key], teacher.get()
    rows: list[Row] = [{"row": prompt.example.row} for prompt in prompts]
    for who, model, folder in (("own", loaded.model, loaded.folder), ("oracle", at_hand.model, str(suite.teacher))):
        seed = seed_of(suite.seeds[0], "exposure")
        drawn = answer(engines.of(model, folder), prompts, loaded.sampling, [seed], loaded.tokenizer)[seed]
        found = token_divergences(
            bind_scoring(loaded.model), at_hand, [p.ids for p in prompts], [row["ids"] for row in drawn], _shared(loaded, teacher),
            suite.temperature, progress=True,
        )  # fmt: skip
        for row, (_, forward) in zip(rows, found, strict=True):
            row[who] = forward.tolist()
    return rows


# What is kept


def _file(suite: Suite, name: str, key: str, part: str) -> Path:
    return suite.out / name / f"{key}-{part}.jsonl"


def _keep(suite: Suite, name: str, key: str, part: str, rows: Sequence[Row], made_from: str) -> None:
    file = _file(suite, name, key, part)
    write_jsonl(file, finite(rows))
    file.with_suffix(".made_from").write_text(made_from, encoding="utf-8")


def _is_there(suite: Suite, name: str, key: str, part: str, made_from: str) -> bool:
    note = _file(suite, name, key, part).with_suffix(".made_from")
    return note.is_file() and note.read_text(encoding="utf-8") == made_from


def _made_from(suite: Suite, this: Model) -> dict[str, str]:
    """By set, a digest of what its parts depend on."""
    weights, taught = (
        {file.name: file.stat().st_mtime_ns for kind in ("*.safetensors", "*.bin", "generation_config.json")
         for file in sorted(Path(place).glob(kind))} if place is not None else {}
        for place in (this.folder, suite.teacher)
    )  # fmt: skip
    engine = "transformers" if suite.no_repeat_ngram else choose_engine(suite.engine, text_config(this.folder))
    settings = suite.model_dump(
        mode="json", include={"max_new_tokens", "temperature", "no_repeat_ngram", "teacher", "exposure_bias"}
    )
    words = sorted(this.tokenizer.get_vocab().items()), this.tokenizer.eos_token_id
    shared = _digest(weights or this.folder, settings, engine, words, taught)
    return {
        key: _digest(shared, suite.sets[key].choices, [(prompt.ids, prompt.example.references) for prompt in prompts])
        for key, prompts in this.prompts.items()
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# Results


def pooled_differences(suite: Suite, groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict[str, float]]]:
    """What `run_suite` says of two models, of groups of them (a method's training seeds): `[one][other]` is one − other on the average of
    the sets. A prompt's score is the mean over a group's models; prompts are resampled in pairs, training seeds are not.

    Args:
        groups: names of models that have answered.
    """
    rows = {
        group: {key: [row for name in names for row in _answers(suite, name, key)] for key in suite.sets} for group, names in groups.items()
    }  # fmt: skip
    return {
        one: {other: _differences(suite, rows[other], rows[one])["average"] for other in groups if other != one} for one in groups
    }  # fmt: skip


def _answers(suite: Suite, name: str, key: str) -> list[list[Row]]:
    """By seed."""
    return [read_jsonl(_file(suite, name, key, str(seed))) for seed in suite.seeds]


def _collect(suite: Suite, sets: Mapping[str, list[Example]], names: Sequence[str]) -> dict[str, Any]:
    rows = {name: {key: _answers(suite, name, key) for key in sets} for name in names}
    models: dict[str, Any] = {}
    for name in names:
        models[name] = {key: _scores(suite, name, key, rows[name][key]) for key in sets}
        scored = [key for key in sets if "rouge_l" in models[name][key]]
        if scored:
            by_seed = np.mean([models[name][key]["rouge_l"]["by_seed"] for key in scored], axis=0)
            models[name]["average"] = {"rouge_l": _over_seeds(by_seed)}
    against = {name: _differences(suite, rows[names[0]], rows[name]) for name in names[1:]}
    return {
        "models": models, "compared_with": names[0], "differences": against, "seeds": suite.seeds,
        "prompts": {key: len(examples) for key, examples in sets.items()},
    }  # fmt: skip


def _scores(suite: Suite, name: str, key: str, by_seed: Sequence[Sequence[Row]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "finished": _over_seeds([100 * _mean(rows, "finished") for rows in by_seed]),
        "length": _over_seeds([float(np.mean([len(row["ids"]) for row in rows])) for rows in by_seed]),
        "distinct_4": _over_seeds([metrics.distinct_n([row["ids"] for row in rows]) for rows in by_seed]),
    }
    referenced = [[row for row in rows if "rouge_l" in row] for rows in by_seed]
    if referenced[0]:
        out["rouge_l"] = _over_seeds([_mean(rows, "rouge_l") for rows in referenced])
        out["rouge_l"] |= statistics.interval(
            statistics.mean_of(_by_prompt(by_seed, "rouge_l")), len(referenced[0]), suite.bootstrap
        )
        out["exact_match"] = _over_seeds([_mean(rows, "exact_match") for rows in referenced])
        out["not_latin"] = sum(not metrics.is_latin(" ".join(row["references"])) for row in referenced[0])
        out["rouge_l_by_reference_words"] = {
            f"{low}-{high or ''}": _mean(some, "rouge_l")
            for low, high in _LENGTH_BINS
            if (some := [r for rows in referenced for r in rows if low <= _words(r) <= (high or 10**9)])
        }
    first = next((rows for rows in by_seed if "reverse_kl" in rows[0]), None)  # of one seed
    if first is not None:
        tokens = sum(len(row["ids"]) for row in first)
        out |= {kl: {"mean": float(np.sum(_column(first, kl))) / max(tokens, 1)} for kl in ("reverse_kl", "forward_kl")}
    choices = _file(suite, name, key, "choices")
    if suite.sets[key].choices and choices.is_file() and (rows := read_jsonl(choices)):
        out["ece"] = {"mean": metrics.calibration_error([r["confidence"] for r in rows], [r["correct"] for r in rows])}
    exposure = _file(suite, name, key, "exposure")
    if suite.exposure_bias and exposure.is_file():
        rows = read_jsonl(exposure)
        own, oracle = [r["own"] for r in rows], [r["oracle"] for r in rows]
        out["excess_error"] = {
            "by_position": metrics.excess_error(own, oracle, suite.max_new_tokens).tolist(),
            "interval": metrics.excess_error_spread(own, oracle, suite.max_new_tokens, suite.bootstrap).tolist(),
        }
    return out


def _column(rows: Sequence[Row], key: str) -> Floats:
    """NaN where a row has no number."""
    return np.array([row[key] for row in rows], dtype=float)


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean(_column(rows, key)))


def _words(row: Row) -> int:
    return max(len(text.split()) for text in row["references"])


def _over_seeds(values: Sequence[float] | Floats) -> dict[str, Any]:
    """Mean over the seeds, their spread (one standard deviation of the sample; None of a single one), and each."""
    seeds = np.asarray(values, dtype=float)
    spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
    return {"mean": float(seeds.mean()), "spread": spread, "by_seed": seeds.tolist()}


def _by_prompt(by_seed: Sequence[Sequence[Row]], key: str) -> Floats:
    """The mean over seeds of each prompt's score, prompts with a reference only."""
    return np.mean([[row[key] for row in rows if key in row] for rows in by_seed], axis=0)


def _paired(first: Sequence[Sequence[Row]], second: Sequence[Sequence[Row]]) -> tuple[list[int], Floats, Floats]:
    """Rouge-L of two models on the prompts that both answered, and which those are: another tokenizer may leave out others as too long."""
    common = {row["row"] for row in first[0] if "rouge_l" in row} & {row["row"] for row in second[0]}
    if not common:
        return [], np.zeros(0), np.zeros(0)
    one, other = ([[row for row in rows if row["row"] in common] for rows in by_seed] for by_seed in (first, second))
    return [row["row"] for row in one[0]], _by_prompt(one, "rouge_l"), _by_prompt(other, "rouge_l")


def _differences(
    suite: Suite, first: Mapping[str, list[list[Row]]], second: Mapping[str, list[list[Row]]]
) -> dict[str, dict[str, float]]:
    """Second − first by set, and on the average of the sets; of those that have references."""
    out: dict[str, dict[str, float]] = {}
    changes: dict[str, dict[int, float]] = {}
    for key in first:
        rows, before, after = _paired(first[key], second[key])
        if rows:
            out[key] = statistics.paired_bootstrap(before, after, suite.bootstrap)
            changes[key] = dict(zip(rows, (after - before).tolist(), strict=True))
    return out | ({"average": _average_difference(suite, changes)} if changes else {})


def _average_difference(suite: Suite, changes: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Of the mean over sets, from what changed by prompt. Each set's prompts are resampled by themselves, but those of a part of a set with
    that set's: their answers are the same."""
    groups: dict[str, list[str]] = {}
    for key in changes:
        groups.setdefault(_whole_of(suite, key) or key, []).append(key)
    draws = []
    for seed, keys in enumerate(groups.values()):
        rows = sorted(set().union(*(changes[key] for key in keys)))
        drawn = statistics.resample(len(rows), suite.bootstrap, seed)
        for key in keys:
            values, inside = (
                np.array([changes[key].get(row, 0.0) for row in rows]),
                np.array([row in changes[key] for row in rows]),
            )
            draws.append(values[drawn].sum(-1) / np.maximum(inside[drawn].sum(-1), 1))
    means = np.mean(draws, axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "mean": float(np.mean([np.mean(list(values.values())) for values in changes.values()])), "low": float(low), "high": float(high),
        "p_worse": float((means <= 0).mean()),
    }  # fmt: skip
