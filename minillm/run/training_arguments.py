"""What a recipe's `transformers.TrainingArguments` mean to a run: their faults, and which of them decide a result."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from minillm.run.stages.stage import Stage
from minillm.run.tree import Key, suggest_names
from minillm.train.supported_arguments import FINE_TUNING_ONLY, HONOURED, REFUSED, RENAMED

if TYPE_CHECKING:
    from minillm.run.recipe import Recipe

# What is logged, kept and reported, and where it is computed; the weights stay the same.
_OPERATIONAL = re.compile(
    r"(logging_|save_|hub_|push_to_hub|dataloader_|ddp_|trackio|project$|report_to$|run_name$|disable_tqdm$|log_level"
    r"|log_on_each_node$|skip_memory_metrics$|use_cpu$|gradient_checkpointing|torch_empty_cache_steps$"
    r"|enable_jit_checkpoint$|include_for_metrics$|include_num_input_tokens_seen$|liger_kernel_config$)"
)
_VALIDATING = re.compile(
    r"(eval_|metric_for_best_model$|greater_is_better$|load_best_model_at_end$|per_device_eval_batch_size$)"
)


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


def decides_nothing(name: str, given: dict[str, Any]) -> bool:
    """Whether a training argument leaves the trained weights as they are.

    Args:
        given: the `TrainingArguments` of the stage. Where they choose the best checkpoint, what validates decides,
            and so does `save_steps`: the best is chosen among the checkpoints that are kept.
    """
    chooses_best = bool(given.get("load_best_model_at_end"))
    if _VALIDATING.match(name) and not chooses_best:
        return True
    return bool(_OPERATIONAL.match(name)) and not (chooses_best and name == "save_steps")


def name_faults(stage: Stage, given: dict[str, Any]) -> Iterable[tuple[Key, str]]:
    """Which of a stage's `TrainingArguments` do not exist: (key, fault) of each. Neither torch nor transformers loads.

    Args:
        stage: the stage.
        given: its arguments as the recipe gives them.
    """
    names = HONOURED | REFUSED.keys() | FINE_TUNING_ONLY.keys()  # all fields; tests compare them with transformers
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

    faults = setting_faults(
        given,
        fine_tuning=stage.uses_trl,
        validated=getattr(recipe.data, stage.validates_on.removeprefix("data.")) is not None,
        reads_teacher=stage.scores_with_teacher(recipe),
        runs=stage.name in recipe.stages,
        validates_on=stage.validates_on,
        **({} if (metrics := stage.measured()) is None else {"metrics": metrics}),
    )
    for name, fault in faults:
        yield _key(stage, name), fault
