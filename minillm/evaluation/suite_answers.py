"""Answers of several models to the test sets of a suite, kept on disk beside their scores.

A part (a model, a set, a seed) that is there, and was made from the same weights, prompts and settings, is not made
again. The seeds of a set that are missing are sampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from typing import Literal

import torch
from transformers import PreTrainedModel

from minillm.data.examples import Example
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.evaluation.answers import token_divergences
from minillm.evaluation.choices import choice_logprobs, right_choices
from minillm.evaluation.config import Suite
from minillm.evaluation.dependencies import Dependencies
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.scores import score_text
from minillm.evaluation.sets import SuiteModel, check_suite
from minillm.evaluation.store import AnswerStore, Row, Task, part
from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import settle
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.choose import choose_engine
from minillm.teacher.local import LocalTeacher

_MAX_SEQUENCES = 256  # sampled at the same time
_ANSWER_SETTINGS = {"max_new_tokens", "temperature", "no_repeat_ngram", "teacher", "exposure_bias"}


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
    sequences = min(answers, _MAX_SEQUENCES)
    with closing(Evaluator(rollout, max_length, sequences=sequences, teacher=suite.teacher)) as evaluator:
        for model in checked:
            _Answering(suite, model, evaluator).complete()
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


class _Answering:
    """A model that answers the sets of a suite; its weights are loaded when they are first needed."""

    def __init__(self, suite: Suite, model: SuiteModel, evaluator: Evaluator) -> None:
        self._suite, self._model, self._evaluator = suite, model, evaluator
        self._store = AnswerStore(suite.out / model.name)

    def complete(self) -> None:
        """Make every part of the model that is missing."""
        suite, model = self._suite, self._model
        settings = suite.model_dump(mode="json", include=_ANSWER_SETTINGS)
        facts = Dependencies(tokenizer=model.tokenizer, settings=settings, teacher=suite.teacher)
        facts = facts.of(model.folder, _engine_setting(suite))
        depends_on = {
            key: replace(facts, prompts=prompts, choices=suite.sets[key].choices)
            for key, prompts in model.prompts.items()
        }
        tasks = [
            Task(depends_on[key], {part(key, seed): [seed] for seed in suite.seeds}, partial(self._answers, key))
            for key in sorted(model.prompts, key=lambda key: superset_of(suite, key) is not None)
        ]
        tasks += [
            Task(depends_on[key], {part(key, "choices"): []}, partial(self._choices, key)) for key in model.options
        ]
        if suite.exposure_bias:
            tasks += [
                Task(depends_on[key], {part(key, "exposure"): []}, partial(self._exposure, key))
                for key in model.prompts
            ]
        if self._store.complete(tasks):
            self._evaluator.sleep()

    @cached_property
    def _loaded(self) -> PreTrainedModel:
        return self._evaluator.load(self._model.folder)

    @cached_property
    def _sampling(self) -> Sampling:
        suite = self._suite
        conventions = settle(self._model.tokenizer, self._loaded, template=suite.template == "chat")
        return conventions.sampling(suite.max_new_tokens, suite.temperature, no_repeat_ngram=suite.no_repeat_ngram)

    def _answers(self, key: str, seeds: Sequence[int]) -> list[Row]:
        """Answers to a set, with their scores; divergences for the first seed only."""
        suite, prompts = self._suite, self._model.prompts[key]
        if (superset := superset_of(suite, key)) is not None:
            kept = {prompt.example.row for prompt in prompts}
            rows = [row for seed in seeds for row in self._store.read(part(superset, seed))]
            return [row for row in rows if row["row"] in kept]
        answers = self._evaluator.answer(
            self._loaded, self._model.folder, prompts, self._sampling, seeds, self._model.tokenizer
        )
        for rows in answers.values():
            for row, prompt in zip(rows, prompts, strict=True):
                references = prompt.example.references
                row |= {"references": list(references), **score_text(row["text"], references)}
        if suite.teacher is not None and suite.seeds[0] in answers:
            self._evaluator.add_divergences(answers[suite.seeds[0]], prompts, self._loaded, self._sampling)
        return [row for rows in answers.values() for row in rows]

    def _choices(self, key: str, _: Sequence[int]) -> list[Row]:
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

    def _exposure(self, key: str, _: Sequence[int]) -> list[Row]:
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
            for row, divergences in zip(rows, found, strict=True):
                row[who] = divergences[1].tolist()
        return rows
