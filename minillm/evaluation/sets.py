"""What a suite is given: its sets and its models, read and refused before any weights load."""

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


def read_set(name: str, test: TestSet, data_dir: str | None) -> list[Example]:
    """The examples of a set, those of other reference lengths left out.

    Raises:
        DataError: the file is missing, a row is not what it should be, or nothing is left.
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
            e for e in examples if e.references and low <= max(len(text.split()) for text in e.references) <= high
        ]
    if not examples:
        raise DataError(f"sets.{name}: no row's longest reference has {low} to {high} words")
    return examples[: test.limit]


@dataclass
class Model:
    """A model before its weights load; `options`: token ids of the choices of the sets that have some."""

    name: str
    folder: str
    tokenizer: Any
    prompts: dict[str, list[Prompt]]
    options: dict[str, list[list[int]]]


def check_suite(suite: Suite, models: Mapping[str, str]) -> tuple[dict[str, list[Example]], list[Model]]:
    """The sets, and what their prompts and choices are for each model. No weights are read.

    Raises:
        DataError: a set cannot be read, holds no prompt that is short enough for a model, or has choices that are no answers to it.
        VocabularyError: the suite has a teacher, whose vocabulary a model does not share.
    """
    sets = {name: read_set(name, test, suite.data_dir) for name, test in suite.sets.items()}
    for key, test in suite.sets.items():
        if test.choices:
            with _naming(f"sets.{key}.choices"):
                check_references(test.choices, sets[key])
    tokenizers = {name: load_tokenizer(folder) for name, folder in models.items()}
    if suite.teacher is not None:
        theirs = load_tokenizer(suite.teacher)
        for name, tokenizer in tokenizers.items():
            _check_vocabulary(name, models[name], tokenizer, suite.teacher, theirs)
    return sets, [_rendered(suite, sets, name, folder, tokenizers[name]) for name, folder in models.items()]


def _check_vocabulary(name: str, folder: str, tokenizer: Any, teacher: str, theirs: Any) -> None:
    if difference := first_difference(tokenizer, theirs):
        token_id, own, other = difference
        raise VocabularyError(
            f"model {name} ({folder}) and teacher {teacher} have different tokenizers: id {token_id} is {own!r} for the model and "
            f"{other!r} for the teacher. KL needs one vocabulary: leave out the teacher, or this model"
        )


def _rendered(suite: Suite, sets: Mapping[str, list[Example]], name: str, folder: str, tokenizer: Any) -> Model:
    prompts: dict[str, list[Prompt]] = {}
    options: dict[str, list[list[int]]] = {}
    for key, examples in sets.items():
        prompts[key], too_long = render_all(examples, suite.template, tokenizer, suite.max_prompt_tokens, suite.system)
        if not prompts[key]:
            raise DataError(
                f"sets.{key}: no prompt is within max_prompt_tokens ({suite.max_prompt_tokens}) for model {name}"
            )
        if too_long:
            logger.warning(
                "%s, %s: %d of %d prompts exceed max_prompt_tokens and are left out",
                name,
                key,
                len(too_long),
                len(examples),
            )
        if suite.sets[key].choices:
            with _naming(f"sets.{key}.choices, model {name}"):
                options[key] = choice_ids(suite.sets[key].choices, tokenizer)
    return Model(name, folder, tokenizer, prompts, options)


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
