"""What `transformers.TrainingArguments` mean here: which are honoured, which are refused and why, and what values they take.

Found before any weights load: `setting_faults` for a section of a recipe, `check_arguments` where a trainer begins.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from minillm.errors import InputError
from minillm.train.best_checkpoint import METRICS, best_faults, with_given
from minillm.train.optimisation import Fault, one_of, optimiser_faults, scheduler_faults, tracker_faults
from minillm.train.trl_arguments import extra_faults, extra_names, warn_of_defaults

logger = logging.getLogger(__name__)

# As transformers documents them, by every trainer.
HONOURED = frozenset({
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "logging_strategy", "logging_steps",
    "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps",
    "eval_delay", "eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
    "hub_revision", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint",
    "full_determinism", "seed", "use_cpu", "accelerator_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug",
    "skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank",
})  # fmt: skip

_DRAWN = "validation draws answers and scores them by itself"
_FORWARD = "it replaces parts of the forward that the loss is computed in"
# By no trainer.
REFUSED = {
    "per_device_eval_batch_size": _DRAWN, "prediction_loss_only": _DRAWN, "eval_do_concat_batches": _DRAWN,
    "eval_use_gather_object": _DRAWN, "eval_accumulation_steps": _DRAWN, "include_for_metrics": _DRAWN, "batch_eval_metrics": _DRAWN,
    "bf16_full_eval": _DRAWN + " with the engine's dtype", "fp16_full_eval": _DRAWN + " with the engine's dtype",
    "label_names": "what is trained on is prompt_ids and response_ids",
    "length_column_name": "rows have no column of lengths; they are known",
    "use_liger_kernel": _FORWARD, "liger_kernel_config": _FORWARD,
    "use_cache": "training reads whole sequences at once and keeps no keys and values",
    "auto_find_batch_size": "an update would train on fewer rows than is said; lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps",
    "optim_target_modules": "it is of GaLore and APOLLO, which are refused (optim)",
    "parallelism_config": "sequences are scored whole by one process: use FSDP or ZeRO-3 for models that do not fit",
}  # fmt: skip

_LOADER = "what an update trains on follows from its number and seed; no data loader reads it"
# By FineTuner alone, whose loss and data loader are TRL's.
FINE_TUNING_ONLY = {
    "neftune_noise_alpha": "noise on the student's embeddings is not in the objective, and its log-probabilities would no longer be those "
    "of the student that is sampled",
    "label_smoothing_factor": "the loss is the objective's, of the student's and the teacher's distributions",
    "average_tokens_across_devices": "losses are divided by token counts over all processes (objective.normalise)",
    "include_num_input_tokens_seen": "updates log their own tokens and tokens a second",
    "train_sampling_strategy": "rows are drawn at random by seed, those of like length together in a micro-batch",
    "remove_unused_columns": "rows are read by the names of their columns", "data_seed": "seed orders the data too",
    "ignore_data_skip": "what an update trains on follows from its number, so that nothing is skipped at a resume",
    **dict.fromkeys((
        "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    ), _LOADER),
}  # fmt: skip

_PUSH = "set push_to_hub at the top of the recipe, which uploads the finished student"
_SCRIPT = "stages say what is done"
# Besides, in a recipe: what belongs to the stage, not to the user.
IN_A_RECIPE = {
    "output_dir": "it follows from run_dir", "seed": "set seed at the top of the recipe",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _PUSH),
    "do_train": _SCRIPT, "do_eval": _SCRIPT, "do_predict": _SCRIPT,
    "resume_from_checkpoint": "a stage goes on from its own last checkpoint",
    "save_only_model": "a stage goes on from its last checkpoint, which needs the optimiser's state",
    "enable_jit_checkpoint": "a stage that it stopped would count as finished; Ctrl-C (SIGINT) lets the update end and saves",
    "local_rank": "the launcher says it",
}  # fmt: skip

RENAMED = {
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of the updates", "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu", "group_by_length": "train_sampling_strategy: group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
}  # fmt: skip
"""Names of transformers 4."""

# What numbers have to be.
_AT_LEAST = {
    "learning_rate": 0.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "weight_decay": 0.0, "max_grad_norm": 0.0,
    "warmup_steps": 0.0, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 0.0, "save_total_limit": 1, "eval_delay": 0.0,
    "torch_empty_cache_steps": 1, "label_smoothing_factor": 0.0, "neftune_noise_alpha": 0.0, "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1, "ddp_timeout": 1, "ddp_bucket_cap_mb": 1,
}  # fmt: skip
_MORE_THAN = {"logging_steps": 0, "eval_steps": 0, "save_steps": 0}
_BELOW = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1}

_CHECKPOINTING = {
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn", "every_n_layers", "offload",
}  # fmt: skip
_FP16 = "float16 is computed on GPUs only: leave it out on a CPU"

_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
# transformers' hint of fsdp is of the command line; a parallelism_config is no value of YAML.
_HINTS: dict[str, Any] = typing.get_type_hints(TrainingArguments) | {
    "fsdp": bool | str | None,
    "parallelism_config": Any,
}
# What making arguments would start, or look for on this machine.
_APART: dict[str, Any] = {
    "tf32": None, "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None, "fsdp": None, "deepspeed": None,
    "load_best_model_at_end": False,
}  # fmt: skip
NAMES = frozenset(_FIELDS)


# Where a trainer begins


def check_arguments(
    args: TrainingArguments, *, fine_tuning: bool = False, eval_dataset: Any = None, reads_teacher: bool,
    metrics: Mapping[str, bool | None] = METRICS,
) -> None:  # fmt: skip
    """Refuse what a trainer would ignore or fall over, and settle which checkpoint is the best.

    Args:
        reads_teacher: validation can take KL(q‖p), because the teacher is a model in this process.
        metrics: what validation measures, and whether more of it is better.

    Raises:
        ValueError: a line for each fault, with the argument, what is wrong and what is allowed.
    """
    if not isinstance(args, TrainingArguments):
        raise InputError(f"args: transformers.TrainingArguments are needed (given: {type(args).__name__})")
    missing = "eval_dataset" if eval_dataset is None else None
    found = list(_eval_faults(eval_dataset))
    if args.fp16 and args.device.type == "cpu":
        found.append(("fp16", _FP16))
    if args.fsdp and args.parallel_mode.value != "distributed":
        found.append(("fsdp", "it deals the student out over several processes: start with accelerate launch"))
    found += _faults(args, fine_tuning, missing, reads_teacher, metrics)
    if found:
        raise InputError(
            "\n".join(f"args.{name}: {fault}" if name in vars(args) else f"{name}: {fault}" for name, fault in found)
        )
    warn_of_defaults(args, fine_tuning)


# In a recipe


def setting_faults(
    given: dict[str, Any], *, fine_tuning: bool, validated: bool, reads_teacher: bool, runs: bool = True
) -> Iterator[Fault]:  # fmt: skip
    """What is wrong with a section of a recipe; values get the types of their fields.

    Args:
        given: names of `TrainingArguments` and values as YAML has them.
        validated: there are rows to validate on.
        runs: whether the section's stage is among the recipe's; of others, what validation needs is not looked for.
    """
    faulty: set[str] = set()
    for name, value in given.items():
        if name in ("output_dir", "seed"):
            fault = f"not set here: {IN_A_RECIPE[name]}"
        elif not (fault := _value_fault(name, value)):
            given[name] = TypeAdapter(_HINTS[name]).validate_python(value)
            continue
        faulty.add(name)
        yield name, fault
    files = [
        (name, fault)
        for name in ("deepspeed", "fsdp_config", "accelerator_config")
        if (fault := _file_fault(given.get(name)))
    ]
    yield from files
    faulty |= {name for name, _ in files}
    try:
        args = _built({name: value for name, value in given.items() if name not in faulty})
    except Exception as error:  # transformers' own checks, of whatever type
        text = " ".join(str(error).split())
        name = max((name for name in given if _plain(name) in _plain(text)), key=len, default="")
        yield name, f"{text} (given: {given[name]!r})" if name else text
        return
    fresh = _untouched(args, IN_A_RECIPE)
    for name in IN_A_RECIPE:
        if name in given and name not in faulty and getattr(args, name) != getattr(fresh, name):
            yield name, f"not set here: {IN_A_RECIPE[name]} (given: {given[name]!r})"
    if args.accelerator_config.use_configured_state:
        yield "accelerator_config", "use_configured_state: a stage sets up its processes itself (given: True)"
    if args.fp16 and given.get("use_cpu"):
        yield "fp16", _FP16
    missing = None if validated or not runs else "data.validation"
    for name, fault in _faults(args, fine_tuning, missing, reads_teacher or not runs, METRICS):
        if name not in faulty:
            yield name, fault


def _value_fault(name: str, value: Any) -> str | None:
    """What is wrong with a value by itself."""
    hint = _HINTS[name]
    kinds = typing.get_args(hint) or (hint,)
    try:
        if isinstance(value, bool) and bool not in kinds and {int, float} & {*kinds}:
            return f"Input should be a number (given: {value!r})"
        checked = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        bare = '; YAML reads a bare no as false: write "no"' if value is False and name.endswith("_strategy") else ""
        return f"{error.errors()[0]['msg']} (given: {value!r}{bare})"
    enum = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)
    names = [str(member.value) for member in enum] if enum else [*(_FIELDS[name].metadata.get("choices") or ())]
    if names and checked is not None and checked not in names:
        return f"no such value: {one_of(str(checked), names)} (given: {value!r})"
    return _number_fault(name, checked)


def _number_fault(name: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    fault = None
    if math.isnan(value) or (math.isinf(value) and name != "max_grad_norm"):
        fault = "must be a finite number"
    elif name in _AT_LEAST and value < _AT_LEAST[name]:
        fault = f"must be at least {_AT_LEAST[name]}"
    elif name in _MORE_THAN and value <= _MORE_THAN[name]:
        fault = f"must be more than {_MORE_THAN[name]}"
    elif name in _BELOW and value >= _BELOW[name]:
        fault = f"must be below {_BELOW[name]}"
    elif name == "max_steps" and value < 1 and value != -1:
        fault = "must be at least 1, or -1 for num_train_epochs"
    elif name == "warmup_steps" and value > 1 and value != int(value):
        fault = "must be a whole number of updates, or a share of them below 1"
    return fault and f"{fault} (given: {value:g})"


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _file_fault(value: Any) -> str | None:
    """What is wrong with a configuration that may be the name of a JSON file."""
    if not isinstance(value, str) or value.startswith("{"):
        return None
    try:
        json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError:
        return f"no such file: {value}"
    except ValueError as error:
        return f"{value} is not JSON: {error}"
    return None


def _built(given: Mapping[str, Any]) -> Any:
    """The arguments, without starting devices, processes or DeepSpeed, and whatever this machine can compute in."""
    args: Any = object.__new__(TrainingArguments)
    values = {name: given.get(name, _default(field)) for name, field in _FIELDS.items()}
    vars(args).update(values | _APART | {"use_cpu": True, "_setup_devices": torch.device("cpu"), "_n_gpu": 0})
    args.__post_init__()
    vars(args).update({name: values[name] for name in _APART})
    return with_given(args, given)


# Both


def _faults(
    args: Any, fine_tuning: bool, missing: str | None, reads_teacher: bool, metrics: Mapping[str, bool | None]
) -> Iterator[Fault]:  # fmt: skip
    """`missing`: what would say which rows to validate on, where nothing does."""
    refused = REFUSED if fine_tuning else REFUSED | FINE_TUNING_ONLY
    known = HONOURED | refused.keys() | (FINE_TUNING_ONLY.keys() if fine_tuning else frozenset())
    unknown = NAMES - known
    fresh = _untouched(args, {*refused, *extra_names(args), *unknown})
    for name in (*refused, *unknown):
        value = getattr(args, name)
        if value != getattr(fresh, name):
            yield (
                name,
                f"not honoured here: {refused.get(name, 'this version of minillm does not know it')} (given: {value!r})",
            )
    yield from extra_faults(args, fresh, fine_tuning)
    yield from _accelerator_faults(args, fine_tuning)
    yield from _checkpointing_faults(args, fine_tuning)
    numbers = list(_number_faults(args))
    yield from numbers
    if not numbers:
        yield from optimiser_faults(args)
        yield from scheduler_faults(args)
    yield from tracker_faults(args)
    yield from best_faults(args, missing, reads_teacher, metrics)


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _untouched(args: Any, names: Collection[str]) -> Any:
    """`args` had these fields been left alone: what their class then fills in is nobody's choice."""
    fresh = copy.copy(args)
    vars(fresh).update({field.name: _default(field) for field in dataclasses.fields(args) if field.name in names})
    vars(fresh).update(_APART)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fresh.__post_init__()
        except Exception:  # the class insists on what was taken away: then its declared defaults count
            logger.debug("%s cannot be made of its defaults.", type(args).__name__, exc_info=True)
    return fresh


def _eval_faults(rows: Any) -> Iterator[Fault]:
    if isinstance(rows, dict):
        yield "eval_dataset", "one list of rows is needed, not several by name"
    elif rows is not None and not len(rows):
        yield "eval_dataset", "there are no rows in it: leave it out"


def _number_faults(args: Any) -> Iterator[Fault]:
    yield from ((name, fault) for name in _FIELDS if (fault := _number_fault(name, getattr(args, name))))
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        yield "num_train_epochs", f"must be more than 0 (given: {args.num_train_epochs:g})"


def _accelerator_faults(args: Any, fine_tuning: bool) -> Iterator[Fault]:
    given = {
        key: value
        for key, value in vars(args.accelerator_config).items()
        if value != getattr(type(args.accelerator_config), key)
    }
    accumulation = given.pop("gradient_accumulation_kwargs", None) or {}
    if accumulation.get("num_steps", 1) != 1:
        yield "accelerator_config", f"num_steps: set gradient_accumulation_steps (given: {accumulation['num_steps']!r})"
    if not fine_tuning:
        given.pop("use_configured_state", None)
        yield from (
            ("accelerator_config", f"{key}: not honoured here: {_LOADER} (given: {value!r})")
            for key, value in given.items()
        )


def _checkpointing_faults(args: Any, fine_tuning: bool) -> Iterator[Fault]:
    given = args.gradient_checkpointing_kwargs or {}
    if not isinstance(given, dict):
        yield "gradient_checkpointing_kwargs", f"a mapping is needed (given: {given!r})"
        return
    if given and not args.gradient_checkpointing:
        yield "gradient_checkpointing_kwargs", "they do nothing without gradient_checkpointing: true"
    allowed = _CHECKPOINTING | ({"selective"} if fine_tuning else set())
    for key in given.keys() - allowed:
        yield "gradient_checkpointing_kwargs", f"{key} is unknown; {one_of(key, allowed)}"
