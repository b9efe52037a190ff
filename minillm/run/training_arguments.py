"""What a recipe's `transformers.TrainingArguments` mean to a run: their defaults and faults, and sizes of updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from minillm.errors import InputError
from minillm.run.stages.stage import Stage
from minillm.run.tree import Key, suggest_names
from minillm.train.supported_arguments import FINE_TUNING_ONLY, HONOURED, REFUSED, RENAMED
from minillm.train.update_size import ACCUMULATION, MICRO_BATCH, RESPONSES, sizes_of_update, update_size_faults

if TYPE_CHECKING:
    from minillm.run.recipe import Recipe

STAGE_DEFAULTS: dict[str, Any] = {"logging_first_step": True, "logging_steps": 1, "report_to": "none"}
"""Training arguments of every stage that differ from the defaults of transformers, where the recipe says nothing."""


@cache
def _defaults() -> dict[str, Any]:
    """The defaults of transformers, with those of a stage."""
    from transformers import TrainingArguments  # here: it takes seconds to import

    return {field.name: field.default for field in dataclasses.fields(TrainingArguments)} | STAGE_DEFAULTS


def argument(given: dict[str, Any], name: str) -> Any:
    """One of a stage's `TrainingArguments`, as given or by default."""
    return given[name] if name in given else _defaults()[name]


def update_sizes(given: dict[str, Any], processes: int) -> tuple[int, int]:
    """Responses of a micro-batch, and micro-batches of one process in an update.

    Args:
        given: the `TrainingArguments` of a stage, with `responses_per_update` or without.
        processes: how many processes train.

    Raises:
        InputError: `responses_per_update` cannot be divided among them.
    """
    responses = given.get(RESPONSES)
    if responses is None:
        return int(argument(given, MICRO_BATCH)), int(argument(given, ACCUMULATION))
    return sizes_of_update(responses, processes, given.get(MICRO_BATCH))


def with_update_sizes(given: dict[str, Any], processes: int) -> dict[str, Any]:
    """The arguments that transformers takes: with an accumulation in place of `responses_per_update`."""
    if RESPONSES not in given:
        return given
    micro_batch, accumulation = update_sizes(given, processes)
    others = {name: value for name, value in given.items() if name != RESPONSES}
    return others | {MICRO_BATCH: micro_batch, ACCUMULATION: accumulation}


def update_size_refusal(recipe: Recipe, processes: int) -> str | None:
    """Why the updates of a recipe cannot be divided among so many processes; None if they can."""
    for stage, given in recipe.trainings():
        if RESPONSES in given:
            try:
                update_sizes(given, processes)
            except InputError as error:
                return f"{stage.training}.{error}"
    return None


def name_faults(stage: Stage, given: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    """Which of a stage's `TrainingArguments` do not exist: (key, fault) of each. Neither torch nor transformers loads.

    Args:
        stage: the stage.
        given: its arguments as the recipe gives them.
    """
    if RESPONSES in given and given[RESPONSES] is None:
        del given[RESPONSES]  # a recipe that extends another one gives another size of an update in its place
    # All fields of transformers, which tests compare, and ours.
    names = HONOURED | REFUSED.keys() | FINE_TUNING_ONLY.keys() | {RESPONSES}
    for name in (name for name in given if name not in names):
        known = f"it is now {RENAMED[name]}" if name in RENAMED else suggest_names(name, names)
        yield _key(stage, name), f"unknown key; {known}"


def _key(stage: Stage, name: str) -> Key:
    section = tuple(str(stage.training).split("."))
    return (*section, name) if name else section


def training_faults(recipe: Recipe, stage: Stage, given: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    """What is wrong with the values of a stage's `TrainingArguments`: (key, fault) of each.

    Args:
        recipe: the recipe.
        stage: the stage.
        given: its arguments, which `name_faults` has found to exist. Their values get the types of their fields.
    """
    if not given:
        return
    from minillm.train.arguments import setting_faults  # here: it takes seconds to import

    yield from ((_key(stage, name), fault) for name, fault in update_size_faults(given))
    known = {name: value for name, value in given.items() if name != RESPONSES}
    faults = setting_faults(
        known,
        fine_tuning=stage.uses_trl,
        validated=getattr(recipe.data, stage.validates_on.removeprefix("data.")) is not None,
        reads_teacher=stage.scores_with_teacher(recipe),
        runs=stage.name in recipe.stages,
        validates_on=stage.validates_on,
        **({} if (metrics := stage.measured()) is None else {"metrics": metrics}),
    )
    for name, fault in faults:
        yield _key(stage, name), fault
    given |= known  # with the types of the fields
