"""Checks of a whole recipe before anything is trained or sampled, and before any weights load."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minillm.data.config import Source
from minillm.data.examples import Example
from minillm.distribution import install_command, shipped_path
from minillm.errors import DataError, InputError
from minillm.models.configs import context_length, text_config
from minillm.models.conventions import Conventions
from minillm.models.lora import check_student
from minillm.models.quantization import check_quantization
from minillm.models.sources import check_source, find_gguf
from minillm.models.vocabulary import check_tokenizer_fits, token_count
from minillm.rollout.engines.base import padding_bias
from minillm.rollout.engines.choose import check_student_engine, choose_engine
from minillm.rollout.engines.vllm_memory import check_lora_rank
from minillm.run.processes import world_size
from minillm.run.stages import STAGES
from minillm.run.stages.stage import Stage
from minillm.run.training_arguments import update_size_refusal
from minillm.teacher.config import TeacherConfig, teacher_label

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe

logger = logging.getLogger(__name__)


def check_sizes(recipe: Recipe) -> None:
    """Refuse sizes that do not divide, engines and packages that are missing, and students that cannot be sharded.

    Raises:
        EngineError: `rollout.engine` is not available.
        InputError: naming the setting.
    """
    if _samples(recipe):
        choose_engine(recipe.rollout.engine)
    lora = recipe.student.lora
    if "minillm" in recipe.stages:
        check_student_engine(recipe.rollout)
        if lora is not None and recipe.rollout.lora == "adapter" and choose_engine(recipe.rollout.engine) == "vllm":
            check_lora_rank(lora.rank)
    arguments = [stage.arguments(recipe) for stage in STAGES if stage.trains == "student"]
    if lora is not None and lora.quantization and any(map(_shards_the_student, arguments)):
        raise InputError(
            "student.lora.quantization: a quantised student cannot be sharded over processes (FSDP, ZeRO-3): use "
            + shipped_path("recipes/accelerate/8-gpus.yaml")
        )
    if refusal := update_size_refusal(recipe, world_size()):
        raise InputError(refusal)
    for stage in _stages(recipe):
        if refusal := stage.refusal(recipe, world_size()):
            raise InputError(refusal)
    for stage, given in recipe.trainings():
        if given.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                f"{stage.training}.deepspeed: DeepSpeed is not installed ({install_command('deepspeed')}): leave it "
                "out, or use FSDP2"
            )


def check_models(recipe: Recipe, conventions: Conventions) -> None:
    """Refuse models that are not there or not whole, or that cannot do what the recipe asks of them.

    Raises:
        MinillmError: naming the model, and the setting to change.
    """
    teacher, student = recipe.teacher.first.source, recipe.student.source
    made, teachers = recipe.student.is_made, recipe.teacher.by_name
    for source in [each.source for each in teachers.values()] + [student] * (not made):
        check_source(source)
    if not made:
        if find_gguf(student):
            raise InputError(
                f"student.source: {student} is a GGUF file, which is not trained as it is: name a model folder (the "
                "teacher stage of a run with this file as the teacher leaves the folder teacher/)"
            )
        _check_model(recipe, conventions, student, "student")
    if recipe.student.lora is not None:
        check_student(teacher if made else student, recipe.student.lora)
    for name, each in teachers.items():
        _check_model(recipe, conventions, each.source, teacher_label(name))
        _check_teacher(recipe, each, teacher_label(name))
    for stage in _stages(recipe):
        stage.check_models(recipe)


def _stages(recipe: Recipe) -> list[Stage]:
    """The stages that the recipe lists, in the order in which they build on each other."""
    return [stage for stage in STAGES if stage.name in recipe.stages]


def _samples(recipe: Recipe) -> bool:
    return any(stage.engine for stage in _stages(recipe))


def _check_model(recipe: Recipe, conventions: Conventions, source: str, role: str) -> None:
    """What is asked of student and teacher alike: the tokenizer, the engine, the context."""
    config = text_config(source)
    check_tokenizer_fits(conventions.tokenizer, config, role)
    if _samples(recipe):
        chosen = choose_engine(recipe.rollout.engine, config)
        if chosen == "vllm" and torch.cuda.is_available():
            padding_bias(token_count(conventions.tokenizer), config.vocab_size)  # raises where vLLM has no room for it
    limit = context_length(config)
    if limit is None:
        return
    for settings, tokens in (found for stage in _stages(recipe) for found in stage.longest_sequences(recipe)):
        if tokens > limit:
            raise InputError(f"{settings} the {role}'s context of {limit} tokens ({source})")


def _check_teacher(recipe: Recipe, teacher: TeacherConfig, label: str) -> None:
    source = teacher.source
    config = text_config(source)
    if recipe.teacher.several and find_gguf(source):
        raise InputError(
            f"{label}: {source} is a GGUF file, which is read with a single teacher alone: name a model folder (the "
            "teacher stage of a run with this teacher alone leaves the folder teacher/)"
        )
    if teacher.quantization:
        check_quantization(teacher.quantization)
        if find_gguf(source):
            raise InputError(f"teacher.quantization: {source} is a GGUF file, which is read whole: leave it out")
    if "minillm" in recipe.stages:
        student, mixed = recipe.student.model_like(source), None
        if recipe.rollout.teacher_mix:
            mixed = copy.deepcopy(config)
            if teacher.quantization:
                mixed.quantization_config = teacher.quantization
        check_student_engine(recipe.rollout, text_config(student), mixed)


def check_teacher_names(recipe: Recipe, examples: Sequence[Example], source: Source) -> None:
    """Refuse rows that do not name one of several teachers, and warn of a teacher that no row names.

    Args:
        recipe: the recipe; with one teacher nothing is checked.
        examples: the rows.
        source: where they come from.

    Raises:
        DataError: naming the row, and the names that are allowed.
    """
    if not recipe.teacher.several:
        return
    names = recipe.teacher.by_name
    for example in examples:
        if example.teacher not in names:
            column = source.columns.get("teacher", "teacher")
            what = "is missing" if example.teacher is None else f"is {example.teacher!r}"
            other = "" if "teacher" in source.columns else "; columns: {teacher: …} names another column"
            raise DataError(
                f"{example.place}: {column} {what}: with several teachers it names that of the row, one of "
                f"{', '.join(names)}{other}"
            )
    for name in names.keys() - {example.teacher for example in examples}:
        logger.warning("%s: no row names %s", source.name, teacher_label(name))


def check_rows(run: Run) -> None:
    """Render everything that the stages will read, so that no row fails after the stages before, which take hours.

    Raises:
        DataError, InputError: naming the file and the row.
    """
    for stage in _stages(run.recipe):
        stage.check_rows(run)


def _shards_the_student(training: dict[str, Any]) -> bool:
    """Whether training arguments, or accelerate's variables, shard the student over processes: FSDP or ZeRO-3."""
    zero = training.get("deepspeed") or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(zero, str | Path) and Path(zero).is_file():
        zero = json.loads(Path(zero).read_text(encoding="utf-8"))
    if isinstance(zero, dict) and zero.get("zero_optimization", {}).get("stage") == 3:
        return True
    return (
        bool(training.get("fsdp"))
        or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )
