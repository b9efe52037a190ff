"""Checks of `transformers.TrainingArguments`: which are honoured, which are refused and why, and what values they take.

Faults are found before any weights load: by `setting_faults` for a section of a recipe, by `check_arguments` where a
trainer is built.
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
from minillm.train.supported_arguments import (
    AT_LEAST,
    BELOW,
    CHECKPOINTING_OPTIONS,
    FINE_TUNING_ONLY,
    HONOURED,
    IN_A_RECIPE,
    LOADER,
    MORE_THAN,
    REFUSED,
    RENAMED,
)
from minillm.train.trl_arguments import extra_faults, extra_names, handed_to_trl, warn_of_defaults

__all__ = [
    "FINE_TUNING_ONLY",
    "HONOURED",
    "IN_A_RECIPE",
    "NAMES",
    "REFUSED",
    "RENAMED",
    "check_arguments",
    "setting_faults",
]

logger = logging.getLogger(__name__)

_FP16 = "float16 is computed on GPUs only: leave it out on a CPU"

_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
# transformers annotates fsdp for its command line; a parallelism_config cannot be written in YAML.
_HINTS: dict[str, Any] = typing.get_type_hints(TrainingArguments) | {
    "fsdp": bool | str | None,
    "parallelism_config": Any,
}
# Arguments that are built for a check have these values instead of the given ones, which would start something or
# search this machine for it.
_NEUTRAL: dict[str, Any] = {
    "tf32": None,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "fsdp": None,
    "deepspeed": None,
    "load_best_model_at_end": False,
}
NAMES = frozenset(_FIELDS)
"""All fields of `TrainingArguments`."""


# Checks of a trainer's arguments


def check_arguments(
    args: TrainingArguments,
    *,
    fine_tuning: bool = False,
    eval_dataset: Any = None,
    reads_teacher: bool,
    metrics: Mapping[str, bool | None] = METRICS,
    honoured: frozenset[str] = frozenset(),
) -> None:
    """Refuse arguments that a trainer would ignore or fail on, and settle which checkpoint is the best.

    Args:
        args: the arguments.
        fine_tuning: whether the trainer is `FineTuner`, whose loss and data loader are TRL's.
        eval_dataset: the rows for validation.
        reads_teacher: whether validation can compute KL(q‖p), because the teacher is a model in this process.
        metrics: what validation measures, and whether more of it is better.
        honoured: fields beyond those of `TrainingArguments` that the trainer reads.

    Raises:
        InputError: the message has one line per fault, with the argument, what is wrong and what is allowed.
    """
    if not isinstance(args, TrainingArguments):
        raise InputError(f"args: transformers.TrainingArguments are needed (given: {type(args).__name__})")
    honoured |= handed_to_trl(args) if fine_tuning else frozenset()
    missing = "eval_dataset" if eval_dataset is None else None
    found = list(_eval_faults(eval_dataset))
    if args.fp16 and args.device.type == "cpu":
        found.append(("fp16", _FP16))
    if args.fsdp and args.parallel_mode.value != "distributed":
        found.append(("fsdp", "it shards the student over several processes: start with accelerate launch"))
    found += _faults(args, fine_tuning, missing, reads_teacher, metrics)
    found += extra_faults(args, _untouched(args, extra_names(args)), honoured)
    if found:
        raise InputError(
            "\n".join(f"args.{name}: {fault}" if name in vars(args) else f"{name}: {fault}" for name, fault in found)
        )
    warn_of_defaults(args, honoured)


# Checks of a section of a recipe


def setting_faults(
    given: dict[str, Any],
    *,
    fine_tuning: bool,
    validated: bool,
    reads_teacher: bool,
    runs: bool = True,
    validates_on: str = "data.validation",
    metrics: Mapping[str, bool | None] = METRICS,
) -> Iterator[Fault]:
    """Faults of a section of a recipe.

    Args:
        given: fields of `TrainingArguments` with the values that YAML gave; they are converted to the types of the
            fields.
        fine_tuning: whether the stage uses `FineTuner`.
        validated: whether there are rows to validate on.
        reads_teacher: whether validation can compute KL(q‖p), because the teacher is a model in the process.
        runs: whether the recipe runs the section's stage; for other stages the needs of validation are not checked.
        validates_on: the setting that names these rows.
        metrics: what validation measures, and whether more of it is better.

    Yields:
        The field and its fault.
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
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        if fault := _file_fault(given.get(name)):
            faulty.add(name)
            yield name, fault
    try:
        args = _built({name: value for name, value in given.items() if name not in faulty})
    except Exception as error:  # transformers' own checks raise errors of several types
        text = " ".join(str(error).split())
        name = max((name for name in given if _letters(name) in _letters(text)), key=len, default="")
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
    missing = None if validated or not runs else validates_on
    for name, fault in _faults(args, fine_tuning, missing, reads_teacher or not runs, metrics):
        if name not in faulty:
            yield name, fault


def _value_fault(name: str, value: Any) -> str | None:
    """The fault of a value by itself, if it has one."""
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
    """The fault of a number that is outside the allowed range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    fault = None
    if math.isnan(value) or (math.isinf(value) and name != "max_grad_norm"):
        fault = "must be a finite number"
    elif name in AT_LEAST and value < AT_LEAST[name]:
        fault = f"must be at least {AT_LEAST[name]}"
    elif name in MORE_THAN and value <= MORE_THAN[name]:
        fault = f"must be more than {MORE_THAN[name]}"
    elif name in BELOW and value >= BELOW[name]:
        fault = f"must be below {BELOW[name]}"
    elif name == "max_steps" and value < 1 and value != -1:
        fault = "must be at least 1, or -1 for num_train_epochs"
    elif name == "warmup_steps" and value > 1 and value != int(value):
        fault = "must be a whole number of updates, or a share of them below 1"
    return fault and f"{fault} (given: {value:g})"


def _letters(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _file_fault(value: Any) -> str | None:
    """The fault of a configuration that may be the name of a JSON file."""
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
    """Build arguments without starting devices, processes or DeepSpeed, whatever dtypes this machine supports."""
    args: Any = object.__new__(TrainingArguments)
    values = {name: given.get(name, _default(field)) for name, field in _FIELDS.items()}
    vars(args).update(values | _NEUTRAL | {"use_cpu": True, "_setup_devices": torch.device("cpu"), "_n_gpu": 0})
    args.__post_init__()
    vars(args).update({name: values[name] for name in _NEUTRAL})
    return with_given(args, given)


# Checks that both share


def _faults(
    args: Any, fine_tuning: bool, missing: str | None, reads_teacher: bool, metrics: Mapping[str, bool | None]
) -> Iterator[Fault]:
    """Faults of built arguments.

    Args:
        args: the arguments.
        fine_tuning: whether the trainer is `FineTuner`.
        missing: the setting that would name the rows to validate on; None if there are such rows.
        reads_teacher: whether validation can compute KL(q‖p).
        metrics: what validation measures, and whether more of it is better.
    """
    refused = REFUSED if fine_tuning else REFUSED | FINE_TUNING_ONLY
    known = HONOURED | refused.keys() | (FINE_TUNING_ONLY.keys() if fine_tuning else frozenset())
    unknown = NAMES - known
    fresh = _untouched(args, {*refused, *unknown})
    for name in (*refused, *unknown):
        value = getattr(args, name)
        if value != getattr(fresh, name):
            reason = refused.get(name, "this version of minillm does not know it")
            yield name, f"not honoured here: {reason} (given: {value!r})"
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
    """The default of a dataclass field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _untouched(args: Any, names: Collection[str]) -> Any:
    """Copy `args` with the defaults of these fields. What their class then fills in is not the user's choice."""
    fresh = copy.copy(args)
    vars(fresh).update({field.name: _default(field) for field in dataclasses.fields(args) if field.name in names})
    vars(fresh).update(_NEUTRAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fresh.__post_init__()
        except Exception:  # the class needs other values: compare with the declared defaults
            logger.debug("%s cannot be built from its defaults.", type(args).__name__, exc_info=True)
    return fresh


def _eval_faults(rows: Any) -> Iterator[Fault]:
    """Faults of the rows for validation."""
    if isinstance(rows, dict):
        yield "eval_dataset", "one list of rows is needed, not a dictionary of several"
    elif rows is not None and hasattr(rows, "__len__") and not len(rows):
        yield "eval_dataset", "there are no rows in it: leave it out"


def _number_faults(args: Any) -> Iterator[Fault]:
    """Faults of numbers outside their allowed ranges."""
    yield from ((name, fault) for name in _FIELDS if (fault := _number_fault(name, getattr(args, name))))
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        yield "num_train_epochs", f"must be more than 0 (given: {args.num_train_epochs:g})"


def _accelerator_faults(args: Any, fine_tuning: bool) -> Iterator[Fault]:
    """Faults of `accelerator_config`, most of which is about the data loader."""
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
            ("accelerator_config", f"{key}: not honoured here: {LOADER} (given: {value!r})")
            for key, value in given.items()
        )


def _checkpointing_faults(args: Any, fine_tuning: bool) -> Iterator[Fault]:
    """Faults of the options of gradient checkpointing."""
    given = args.gradient_checkpointing_kwargs or {}
    if not isinstance(given, dict):
        yield "gradient_checkpointing_kwargs", f"a mapping is needed (given: {given!r})"
        return
    if given and not args.gradient_checkpointing:
        yield "gradient_checkpointing_kwargs", "they do nothing without gradient_checkpointing: true"
    allowed = CHECKPOINTING_OPTIONS | ({"selective"} if fine_tuning else set())
    for key in given.keys() - allowed:
        yield "gradient_checkpointing_kwargs", f"{key} is unknown; {one_of(key, allowed)}"
