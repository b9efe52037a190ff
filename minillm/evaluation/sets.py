"""The sets and the models of a suite, which are read and checked before any weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.examples import Example, Prompt, read_examples
from minillm.data.seeding import permutation
from minillm.data.templates import render_all
from minillm.errors import DataError, VocabularyError
from minillm.evaluation.choices import check_references, choice_ids
from minillm.evaluation.config import Suite, TestSet
from minillm.models.load import load_tokenizer
from minillm.models.vocabulary import first_difference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteModel:
    """A model of a suite, before its weights are loaded.

    Attributes:
        name: Its name in the results.
        folder: Its folder or hub id.
        tokenizer: Its tokenizer.
        prompts: The rendered prompts of each set.
        options: Token ids of the choices, for each set that has choices.
    """

    name: str
    folder: str
    tokenizer: Any
    prompts: dict[str, list[Prompt]]
    options: dict[str, list[list[int]]]


def read_set(name: str, test: TestSet, data_dir: str | None) -> list[Example]:
    """Read the examples of a set, without rows whose references are too short or too long.

    Args:
        name: The set's name, for error messages.
        test: The set.
        data_dir: Folder of the set's file.

    Raises:
        DataError: The file is missing, a row is not valid, or no row is left.
    """
    if test.file is not None and not test.file.is_absolute():
        if data_dir is None:
            raise DataError(
                f"sets.{name}: {test.file} is looked for below data_dir, which is not given: data_dir=FOLDER"
            )
        test = test.model_copy(update={"file": Path(data_dir) / test.file})
    examples = read_examples(test)
    if test.sample is not None:
        examples = [examples[i] for i in sorted(permutation(len(examples), "sample")[: test.sample])]
    low, high = test.min_reference_words or 0, test.max_reference_words or 10**9
    if test.min_reference_words or test.max_reference_words:
        examples = [
            example
            for example in examples
            if example.references and low <= max(len(text.split()) for text in example.references) <= high
        ]
    if not examples:
        raise DataError(f"sets.{name}: no row's longest reference has {low} to {high} words")
    return examples[: test.limit]


def check_suite(suite: Suite, models: Mapping[str, str]) -> tuple[dict[str, list[Example]], list[SuiteModel]]:
    """Read the sets, and render their prompts and tokenise their choices for each model. No weights are loaded.

    Args:
        suite: The test sets, and how they are answered.
        models: Folders or hub ids by name.

    Returns:
        The examples of each set, and the models.

    Raises:
        DataError: A set cannot be read, has no prompt that is short enough for a model, or has unusable choices.
        VocabularyError: The suite has a teacher, and a model does not share its vocabulary.
    """
    sets = {name: read_set(name, test, suite.data_dir) for name, test in suite.sets.items()}
    for key, test in suite.sets.items():
        if test.choices:
            with _error_prefix(f"sets.{key}.choices"):
                check_references(test.choices, sets[key])
    tokenizers = {name: load_tokenizer(folder) for name, folder in models.items()}
    if suite.teacher is not None:
        teacher_tokenizer = load_tokenizer(suite.teacher)
        for name, tokenizer in tokenizers.items():
            _check_vocabulary(f"{name} ({models[name]})", tokenizer, suite.teacher, teacher_tokenizer)
    return sets, [_rendered(suite, sets, name, folder, tokenizers[name]) for name, folder in models.items()]


def _check_vocabulary(model: str, tokenizer: Any, teacher: str, teacher_tokenizer: Any) -> None:
    if difference := first_difference(tokenizer, teacher_tokenizer):
        token_id, own, other = difference
        raise VocabularyError(
            f"model {model} and teacher {teacher} have different tokenizers: id {token_id} is {own!r} for the model "
            f"and {other!r} for the teacher. KL needs one vocabulary: leave out the teacher, or this model"
        )


def _rendered(suite: Suite, sets: Mapping[str, list[Example]], name: str, folder: str, tokenizer: Any) -> SuiteModel:
    prompts: dict[str, list[Prompt]] = {}
    options: dict[str, list[list[int]]] = {}
    for key, examples in sets.items():
        prompts[key], too_long = render_all(examples, suite.template, tokenizer, suite.max_prompt_tokens, suite.system)
        if not prompts[key]:
            raise DataError(
                f"sets.{key}: no prompt is within max_prompt_tokens ({suite.max_prompt_tokens}) for model {name}"
            )
        if too_long:
            counts = len(too_long), len(examples)
            logger.warning("%s, %s: %d of %d prompts exceed max_prompt_tokens and are left out", name, key, *counts)
        if suite.sets[key].choices:
            with _error_prefix(f"sets.{key}.choices, model {name}"):
                options[key] = choice_ids(suite.sets[key].choices, tokenizer)
    return SuiteModel(name, folder, tokenizer, prompts, options)


@contextmanager
def _error_prefix(where: str) -> Iterator[None]:
    """Put `where` in front of the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
