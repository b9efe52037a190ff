"""Answers of several models to the test sets of a suite, kept on disk beside their scores.

A part (a model, a set, a seed) that is there, and was made from the same weights, prompts and settings, is not made
again. The seeds of a set that are missing are sampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from minillm.data.examples import Example
from minillm.data.seeding import seed_of
from minillm.evaluation.answers import token_divergences
from minillm.evaluation.choices import choice_logprobs, right_choices
from minillm.evaluation.config import Suite
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.scores import score_text
from minillm.evaluation.sets import SuiteModel, check_suite
from minillm.evaluation.store import (
    Row,
    choices_part,
    digest,
    exposure_part,
    file_times,
    seed_part,
    suite_store,
)
from minillm.loss.in_forward import bind_scoring
from minillm.models.configs import text_config
from minillm.models.conventions import settle
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.choose import choose_engine
from minillm.teacher.local import LocalTeacher

_MAX_SEQUENCES = 256  # sampled at the same time


def answer_suite(suite: Suite, models: Mapping[str, str]) -> dict[str, list[Example]]:
    """Have every model answer every set with every seed, where the answers are not there yet.

    Args:
        suite: The test sets, and how they are answered.
        models: Folders or hub ids by name.

    Returns:
        The examples of each set.

    Raises:
        DataError: See `check_suite`; it is raised before any model is loaded.
        VocabularyError: See `check_suite`.
        EngineError: The engine that the suite asks for is not available.
    """
    sets, checked = check_suite(suite, models)
    rollout = RolloutConfig(engine=_engine_setting(suite))
    choose_engine(rollout.engine)
    answers = max(len(examples) for examples in sets.values()) * len(suite.seeds)
    max_length = suite.max_prompt_tokens + suite.max_new_tokens
    with Evaluator(rollout, max_length, sequences=min(answers, _MAX_SEQUENCES), teacher=suite.teacher) as evaluator:
        for model in checked:
            _answer_all(suite, model, evaluator)
            evaluator.sleep()
    return sets


def superset_of(suite: Suite, key: str) -> str | None:
    """Find the set that has the same rows as set `key`, and those with shorter or longer references too.

    Set `key` then takes its answers from that set.

    Args:
        suite: The test sets.
        key: The name of a set.

    Returns:
        The name of the other set; None if the suite has no such set.
    """
    test = suite.sets[key]
    if test.limit is not None or not (test.min_reference_words or test.max_reference_words):
        return None
    unfiltered = test.model_dump() | {"min_reference_words": None, "max_reference_words": None}
    return next((name for name, other in suite.sets.items() if other.model_dump() == unfiltered), None)


def _engine_setting(suite: Suite) -> Literal["auto", "vllm", "transformers"]:
    return "transformers" if suite.no_repeat_ngram else suite.engine


def _answer_all(suite: Suite, model: SuiteModel, evaluator: Evaluator) -> None:
    """Make every part of a model that is missing; its weights are loaded only if there is one."""
    store, digests = suite_store(suite.out, model.name), _dependencies(suite, model)
    seeds = {
        key: missing
        for key in model.prompts
        if (missing := [seed for seed in suite.seeds if not store.has(seed_part(key, seed), digests[key])])
    }
    choices = [key for key in model.options if not store.has(choices_part(key), digests[key])]
    exposure = [key for key in model.prompts if suite.exposure_bias and not store.has(exposure_part(key), digests[key])]
    if not (seeds or choices or exposure):
        return
    answering = _Answering(suite, model, evaluator)
    for key in sorted(seeds, key=lambda key: superset_of(suite, key) is not None):
        superset = superset_of(suite, key)
        if superset is None:
            answers = answering.answers(key, seeds[key])
        else:
            kept = {prompt.example.row for prompt in model.prompts[key]}
            answers = {
                seed: [row for row in store.read(seed_part(superset, seed)) if row["row"] in kept]
                for seed in seeds[key]
            }
        for seed, rows in answers.items():
            store.write(seed_part(key, seed), rows, digests[key])
    for key in choices:
        store.write(choices_part(key), answering.choices(key), digests[key])
    for key in exposure:
        store.write(exposure_part(key), answering.exposure(key), digests[key])


class _Answering:
    """A model that is loaded to answer the sets of a suite."""

    def __init__(self, suite: Suite, model: SuiteModel, evaluator: Evaluator) -> None:
        self._suite, self._model, self._evaluator = suite, model, evaluator
        self._loaded = evaluator.load(model.folder)
        conventions = settle(model.tokenizer, self._loaded, template=suite.template == "chat")
        self._sampling = conventions.sampling(
            suite.max_new_tokens, suite.temperature, no_repeat_ngram=suite.no_repeat_ngram
        )

    def answers(self, key: str, seeds: Sequence[int]) -> dict[int, list[Row]]:
        """Answers to a set by seed, with their scores; divergences for the first seed only."""
        suite, prompts = self._suite, self._model.prompts[key]
        answers = self._evaluator.answer(
            self._loaded, self._model.folder, prompts, self._sampling, seeds, self._model.tokenizer
        )
        for rows in answers.values():
            for row, prompt in zip(rows, prompts, strict=True):
                references = prompt.example.references
                row |= {"references": list(references), **score_text(row["text"], references)}
        if self._evaluator.has_teacher and suite.seeds[0] in answers:
            self._evaluator.add_divergences(answers[suite.seeds[0]], prompts, self._loaded, self._sampling)
        return answers

    def choices(self, key: str) -> list[Row]:
        """The most probable choice for every prompt with a reference.

        `confidence` is its share of the probability of all choices, `correct` whether it is right, and `logprobs` are
        those of all choices.
        """
        prompts = [prompt for prompt in self._model.prompts[key] if prompt.example.references]
        sampling = replace(self._sampling, temperature=1.0)
        found = choice_logprobs(LocalTeacher(self._loaded), prompts, self._model.options[key], sampling)
        rows: list[Row] = []
        for prompt, logprobs in zip(prompts, found, strict=True):
            best = int(logprobs.argmax())
            rows.append(
                {
                    "row": prompt.example.row,
                    "confidence": float(torch.softmax(logprobs, 0)[best]),
                    "correct": best in right_choices(self._suite.sets[key].choices, prompt.example.references),
                    "logprobs": logprobs.tolist(),
                }
            )
        return rows

    def exposure(self, key: str) -> list[Row]:
        """KL(p‖q) by token along one answer of the model (`own`) and one of the teacher (`oracle`) to every prompt."""
        suite, evaluator, prompts = self._suite, self._evaluator, self._model.prompts[key]
        rows: list[Row] = [{"row": prompt.example.row} for prompt in prompts]
        seed = seed_of(suite.seeds[0], "exposure")
        for who, sampled, folder in (
            ("own", self._loaded, self._model.folder),
            ("oracle", evaluator.teacher.model, str(suite.teacher)),
        ):
            answers = evaluator.answer(sampled, folder, prompts, self._sampling, [seed], self._model.tokenizer)[seed]
            found = token_divergences(
                bind_scoring(self._loaded),
                evaluator.teacher,
                [prompt.ids for prompt in prompts],
                [row["ids"] for row in answers],
                evaluator.shared_width(self._sampling),
                suite.temperature,
                progress=True,
            )
            for row, (_, forward) in zip(rows, found, strict=True):
                row[who] = forward.tolist()
        return rows


def _dependencies(suite: Suite, model: SuiteModel) -> dict[str, str]:
    """For each set, a digest of everything that a model's parts depend on."""
    weights, teacher = (
        {} if folder is None else file_times(folder, "*.safetensors", "*.bin", "generation_config.json")
        for folder in (model.folder, suite.teacher)
    )
    engine = choose_engine(_engine_setting(suite), text_config(model.folder))
    settings = suite.model_dump(
        mode="json", include={"max_new_tokens", "temperature", "no_repeat_ngram", "teacher", "exposure_bias"}
    )
    vocabulary = sorted(model.tokenizer.get_vocab().items()), model.tokenizer.eos_token_id
    shared = digest(weights or model.folder, settings, engine, vocabulary, teacher)
    return {
        key: digest(shared, suite.sets[key].choices, [(prompt.ids, prompt.example.references) for prompt in prompts])
        for key, prompts in model.prompts.items()
    }
