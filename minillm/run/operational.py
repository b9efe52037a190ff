"""Which settings a run may be continued with, although what it has made was made with others.

Every other setting that a stage reads (`Stage.reads`) decides its result: if it changes, the stage counts as made with
other settings and is made again on request only (`--redo`). Settings that no stage reads, such as `log_samples`,
`keep_checkpoint` and `push_to_hub`, can be changed at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from minillm.run.stages import STAGES
from minillm.run.stages.stage import Stage
from minillm.train.update_size import ACCUMULATION, MICRO_BATCH, RESPONSES

SETTINGS: tuple[tuple[str, str], ...] = (
    ("rollout.servers rollout.server_patience rollout.server_timeout", "where the student is sampled, not from what"),
    ("rollout.engine_memory rollout.engine_options", "how an engine lays out its memory"),
    ("rollout.overlap", "when the student is sampled"),
    ("rollout.lora", "how the weights of the student reach the engine"),
    ("rollout.draft_tokens", "of earlier versions: how many tokens were guessed ahead of time"),
    ("rollout.mismatch_limit", "when a difference of the engines is an alarm"),
    ("teacher.allow_pickle student.allow_pickle", "which files weights may be read from"),
    ("objective.signal_every", "how often something is measured beside the training"),
)
"""Settings of a recipe, and what they are about."""
ARGUMENTS: tuple[tuple[str, str], ...] = (
    ("logging_* log_level* log_on_each_node disable_tqdm", "what is logged, where, and how often"),
    ("report_to run_name project trackio_*", "which trackers are told of it"),
    ("include_for_metrics include_num_input_tokens_seen skip_memory_metrics", "what is counted beside the training"),
    ("save_* enable_jit_checkpoint", "when checkpoints are written, and how many are kept"),
    ("hub_* push_to_hub", "where the student is uploaded to"),
    ("use_cpu ddp_*", "where it is computed, and how processes add up their gradients"),
    ("dataloader_*", "how rows are read; their order follows from the seed"),
    ("gradient_checkpointing* torch_empty_cache_steps liger_kernel_config", "time for memory"),
)
"""`TrainingArguments` of any stage, and what they are about."""
VALIDATING = "eval_* metric_for_best_model greater_is_better load_best_model_at_end per_device_eval_batch_size"
"""`TrainingArguments` of what is only measured while a stage trains, unless it chooses the checkpoint that is kept."""
LENGTH = ("max_steps", "num_train_epochs")
"""`TrainingArguments` that may grow: the stage then goes on from its last checkpoint (`is_longer`)."""

_EPOCHS = 3.0  # of transformers, where nothing is said


def is_operational(key: str, arguments: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a setting changes nothing that a stage makes.

    Args:
        key: its dotted name.
        arguments: the `TrainingArguments` of every stage that trains, by the dotted name of their section.
    """
    if any(_matches(key, names) or _matches(key.rpartition(".")[0], names) for names, _ in SETTINGS):
        return True
    for section, given in arguments.items():
        if key.startswith(f"{section}."):
            return decides_nothing(key.removeprefix(f"{section}."), given)
    return False


def decides_nothing(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a training argument leaves the trained weights as they are.

    Args:
        name: the argument.
        given: the `TrainingArguments` of the stage. Where they choose the best checkpoint, what validates decides,
            and so does `save_steps`: the best is chosen among the checkpoints that are kept.
    """
    name = name.partition(".")[0]
    if given.get("load_best_model_at_end") and (_matches(name, VALIDATING) or name == "save_steps"):
        return False
    if name == "num_train_epochs" and _number(given.get("max_steps"), -1) > 0:
        return True  # max_steps alone says the length
    return _matches(name, VALIDATING) or any(_matches(name, names) for names, _ in ARGUMENTS)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def training_sections() -> dict[str, Stage]:
    """Each stage that trains, by the dotted name of the setting that holds its `TrainingArguments`."""
    return {stage.training: stage for stage in STAGES if stage.training}


def is_longer(section: str, changed: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether settings differ in the length of a stage's training, and the new one is the longer.

    Args:
        section: the dotted name of its `TrainingArguments`.
        changed: the names of the settings that differ, of this section and of others.
        old: the settings that the stage was made with.
        new: those of now.
    """
    keys = {f"{section}.{name}" for name in LENGTH}
    if not keys & changed.keys():
        return False
    steps, epochs = f"{section}.max_steps", f"{section}.num_train_epochs"
    before, after = (_number(settings.get(steps), -1) for settings in (old, new))
    if before > 0 or after > 0:
        return 0 < before < after  # updates and epochs cannot be compared here
    return _number(old.get(epochs), _EPOCHS) < _number(new.get(epochs), _EPOCHS)


def length_of(section: str, settings: Mapping[str, Any]) -> str:
    """The length of a stage's training in words: `max_steps 100`, or `num_train_epochs 3`."""
    steps, epochs = (settings.get(f"{section}.{name}") for name in LENGTH)
    return f"max_steps {steps}" if _number(steps, -1) > 0 else f"num_train_epochs {_number(epochs, _EPOCHS):g}"


def _number(value: Any, default: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def same_update(section: str, changed: dict[str, Any], old: Mapping[str, Any], processes: int | None) -> None:
    """Take what says the same number of responses in another way out of the changed settings of a section.

    `responses_per_update` in place of an accumulation is the same if the stage was made with as many.

    Args:
        section: the dotted name of the `TrainingArguments`.
        changed: the settings that differ, with their values of now.
        old: the settings that the stage was made with.
        processes: how many processes it was made in; None if it is not finished.
    """
    responses, accumulation = (f"{section}.{name}" for name in (RESPONSES, ACCUMULATION))
    if responses not in changed or changed[responses] is None or old.get(responses) is not None:
        return
    made_with = _number(old.get(f"{section}.{MICRO_BATCH}"), 8) * _number(old.get(accumulation), 1)
    if processes is None or made_with * processes == changed[responses]:
        changed.pop(responses)
        changed.pop(accumulation, None)


def same_warm_up(section: str, changed: dict[str, Any], old: Mapping[str, Any]) -> None:
    """Take a warm-up of as many updates as before, which was a share of the length, out of the changed settings.

    Args:
        section: the dotted name of the `TrainingArguments`.
        changed: the settings that differ, with their values of now.
        old: the settings that the stage was made with.
    """
    key, updates = f"{section}.warmup_steps", _number(old.get(f"{section}.max_steps"), -1)
    share = _number(old.get(key), 0)
    if key in changed and updates > 0 and 0 < share < 1 and changed[key] == math.ceil(share * updates):
        del changed[key]
