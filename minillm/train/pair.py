"""Student and teacher of a distillation trainer: loaded, checked against each other, and prepared for scoring."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm.errors import InputError
from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import Conventions, settle
from minillm.models.device import fast_bfloat16
from minillm.models.head import check_head, gather_head
from minillm.models.load import load_model, load_tokenizer, without_dropout
from minillm.models.shards import is_sharded
from minillm.models.vocabulary import check_same_tokens, head_width
from minillm.teacher.local import AdapterOff, LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.teacher.sharded import shard
from minillm.teacher.states import StatesTeacher

logger = logging.getLogger(__name__)

TeacherSource = str | PreTrainedModel | ServedTeacher | None
"""A name, a model or a served teacher; None for the base model of a student with an adapter."""


@dataclass
class ModelPair:
    """A student and its teacher.

    Attributes:
        student: the student, prepared for scoring.
        teacher_model: the teacher's model in this process; None for a served teacher.
        source: what the caller gave as the teacher.
        conventions: vocabulary and end tokens that both share.
        compute_dtype: the dtype of a teacher that is given by name or served, and that the student is sampled in.
    """

    student: Any
    teacher_model: Any
    source: TeacherSource
    conventions: Conventions
    compute_dtype: torch.dtype

    def teacher(self, args: TrainingArguments, *, sharded: bool, longest: int) -> StatesTeacher | ServedLogprobs:
        """The teacher on this process's device.

        Args:
            args: device and batch size.
            sharded: whether to shard the teacher over processes.
            longest: tokens of the longest sequence that it will score, which servers have to accept.

        Raises:
            EngineError: a served teacher is unreachable, or cannot score such sequences.
        """
        batch_size = max(args.per_device_train_batch_size, 16)
        if isinstance(self.source, ServedTeacher):
            return self.source.attach(longest, self.compute_dtype, args.device)
        if self.source is None:
            return AdapterOff(self.student, batch_size=batch_size)
        model = shard(self.teacher_model, args.device) if sharded else self.teacher_model.to(args.device)
        return LocalTeacher(model, batch_size, source=self.source if isinstance(self.source, str) else None)


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of forwards under these arguments."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def resolve_tokenizer(model: str | PreTrainedModel, processing_class: Any) -> Any:
    """The tokenizer that was given, or the one in the student's folder.

    Raises:
        InputError: the student is a model object, and no tokenizer was given.
    """
    if processing_class is not None:
        return processing_class
    if not isinstance(model, str):
        raise InputError("processing_class: a tokenizer is needed when the student is given as a model object")
    return load_tokenizer(model)


def load_pair(
    model: str | PreTrainedModel,
    teacher: TeacherSource,
    args: TrainingArguments,
    tokenizer: Any,
    conventions: Conventions | None,
) -> ModelPair:
    """Load a student and its teacher.

    Args:
        model: the student; given by name, it is loaded in float32.
        teacher: the teacher.
        args: the arguments of the training.
        tokenizer: the student's tokenizer.
        conventions: vocabulary and end tokens, if they are settled already; otherwise they follow from the tokenizer
            and the teacher.

    Raises:
        VocabularyError: the tokenizers differ.
        InputError: the models cannot be used together, or not in this way.
    """
    served = teacher if isinstance(teacher, ServedTeacher) else None
    # If the teacher is given by name, a different tokenizer is found before any weights load.
    source = _tokenizer_source(teacher)
    if served or isinstance(teacher, str) or (source and Path(source, "tokenizer_config.json").is_file()):
        check_same_tokens(tokenizer, load_tokenizer(source))
    student: Any = load_model(model, torch.float32) if isinstance(model, str) else model
    if teacher is None and not hasattr(student, "get_base_model"):
        raise InputError(
            "teacher: None takes the student's base model as the teacher, with its adapter disabled; "
            "this student has no adapter (PEFT): give a teacher"
        )
    if is_deepspeed_zero3_enabled() and is_sharded(student):
        raise InputError(
            "ZeRO-3 sharded the student's weights when it was loaded: give its name, or load it with "
            "minillm.models.load.load_model"
        )
    dtype = compute_dtype(args)
    teacher_model: Any = None
    if teacher is None:
        teacher_model = student.get_base_model()
    elif served is None:
        teacher_model = load_model(teacher, dtype) if isinstance(teacher, str) else teacher
    _warn_of_dtypes(student, args)
    width = _shared_width(head_width(student), served.vocab_size if served else head_width(teacher_model))
    if conventions is None:
        named = served.source if served else teacher_model if teacher is not None else None
        conventions = settle(tokenizer, named, [student])
    conventions = replace(conventions, vocab_size=min(width, conventions.vocab_size))
    _prepare(student, teacher_model)
    return ModelPair(student, teacher_model, teacher, conventions, dtype)


def _tokenizer_source(teacher: TeacherSource) -> str:
    """The folder or hub id that the teacher's tokenizer can be read from; empty if there is none."""
    if isinstance(teacher, ServedTeacher):
        return teacher.source
    return teacher if isinstance(teacher, str) else str(getattr(teacher, "name_or_path", ""))


def _warn_of_dtypes(student: PreTrainedModel, args: TrainingArguments) -> None:
    """Warn of dtypes that are slow here, or that lose updates."""
    if args.bf16 and args.device.type == "cpu" and not fast_bfloat16():
        logger.warning("bf16=True on a CPU that emulates bfloat16, many times slower than float32: leave it out.")
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    if trained & {torch.bfloat16, torch.float16}:
        logger.warning(
            "The student is trained in %s: at small learning rates most updates round away; load it in float32.",
            trained,
        )


def _shared_width(student: int, teacher: int) -> int:
    """Rows of the output head that both models have."""
    if student != teacher:
        logger.warning(
            "The heads are %d (student) and %d (teacher) tokens wide; both are used up to %d.",
            student,
            teacher,
            min(student, teacher),
        )
    return min(student, teacher)


def _prepare(student: Any, teacher_model: Any) -> None:
    """Switch dropout off, check the heads, and bind the scoring to the student's forward."""
    without_dropout(student)
    check_head(student, "student")
    if teacher_model is not None:
        check_head(teacher_model, "teacher")
    bind_scoring(student)
    if is_deepspeed_zero3_enabled():
        gather_head(student)
