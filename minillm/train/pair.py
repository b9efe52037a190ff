"""Student and teachers of a distillation trainer: loaded, checked against each other, and prepared for scoring."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
from minillm.teacher.absent import NoTeacher
from minillm.teacher.config import teacher_label
from minillm.teacher.local import AdapterOff, LocalTeacher
from minillm.teacher.routed import RoutedTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.teacher.sharded import shard
from minillm.teacher.states import StatesTeacher
from minillm.train.checks import STATES_REMEDY

logger = logging.getLogger(__name__)

NamedSource = str | PreTrainedModel | ServedTeacher
"""A folder or hub id, a model, or a served teacher."""
TeacherSource = NamedSource | Mapping[str, NamedSource] | NoTeacher | None
"""A teacher; several by name; None for the base model of a student with an adapter; or `NO_TEACHER`."""


@dataclass
class ModelPair:
    """A student and its teacher, or its teachers.

    Attributes:
        student: the student, prepared for scoring.
        teacher_models: the teachers' models in this process by name; a single teacher has an empty name. A served
            teacher has none.
        source: what the caller gave as the teacher.
        conventions: vocabulary and end tokens that both share.
        compute_dtype: the dtype of a teacher that is given by name or served, and that the student is sampled in.
    """

    student: Any
    teacher_models: dict[str, Any]
    source: TeacherSource
    conventions: Conventions
    compute_dtype: torch.dtype

    def teacher(
        self, args: TrainingArguments, *, sharded: bool, longest: int
    ) -> StatesTeacher | ServedLogprobs | RoutedTeacher | NoTeacher:
        """The teacher, or the teachers, on this process's device.

        Args:
            args: device and batch size.
            sharded: whether to shard a single teacher over processes, which a served one is not.
            longest: tokens of the longest sequence that it will score, which servers have to accept.

        Raises:
            EngineError: a served teacher is unreachable, or cannot score such sequences.
            InputError: one of several returns log-probabilities of some tokens only.
        """
        if isinstance(self.source, NoTeacher):
            return self.source
        if self.source is None:
            return AdapterOff(self.student, batch_size=_batch_size(args))
        if not isinstance(self.source, Mapping):
            return self._one(self.source, self.teacher_models.get(""), args, longest, sharded=sharded)
        teachers: dict[str, StatesTeacher] = {}
        try:
            for name, source in self.source.items():
                teacher = self._one(source, self.teacher_models.get(name), args, longest)
                if isinstance(teacher, ServedLogprobs):
                    teacher.close()
                    raise _without_states(name)
                teachers[name] = teacher
        except BaseException:
            for teacher in teachers.values():
                teacher.close()
            raise
        return RoutedTeacher(teachers)

    def _one(
        self, source: NamedSource, model: Any, args: TrainingArguments, longest: int, *, sharded: bool = False
    ) -> StatesTeacher | ServedLogprobs:
        """One teacher on this process's device; `model` is its model, if it is not served."""
        if isinstance(source, ServedTeacher):
            return source.attach(longest, self.compute_dtype, args.device)
        if sharded:
            model = shard(model, args.device)
        return LocalTeacher(
            model.to(args.device), _batch_size(args), source=source if isinstance(source, str) else None
        )


def _batch_size(args: TrainingArguments) -> int:
    return max(args.per_device_train_batch_size, 16)


def _without_states(name: str) -> InputError:
    return InputError(
        f"the servers of {teacher_label(name)} return log-probabilities of some tokens only, which are not combined "
        f"with the scores of other teachers: {STATES_REMEDY}"
    )


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
    """Load a student and its teacher, or its teachers.

    Args:
        model: the student; given by name, it is loaded in float32.
        teacher: the teacher, or several by name.
        args: the arguments of the training.
        tokenizer: the student's tokenizer.
        conventions: vocabulary and end tokens, if they are settled already; otherwise they follow from the tokenizer
            and the teacher.

    Raises:
        VocabularyError: the tokenizers differ.
        InputError: the models cannot be used together, or not in this way.
    """
    named = _by_name(teacher)
    for name, source in named.items():
        _check_tokens(tokenizer, source, teacher_label(name))
    for name, source in named.items() if isinstance(teacher, Mapping) else ():
        if isinstance(source, ServedTeacher) and not source.returns_states():
            raise _without_states(name)
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
    models = {
        name: load_model(source, dtype) if isinstance(source, str) else source
        for name, source in named.items()
        if not isinstance(source, ServedTeacher)
    }
    if teacher is None:
        models[""] = student.get_base_model()
    _warn_of_dtypes(student, args)
    served_widths = {name: source.vocab_size for name, source in named.items() if isinstance(source, ServedTeacher)}
    widths = served_widths | {name: head_width(model) for name, model in models.items()}
    own = head_width(student)
    width = min((_shared_width(own, rows, teacher_label(name)) for name, rows in widths.items()), default=own)
    if conventions is None:
        first, *others = [
            source.source if isinstance(source, ServedTeacher) else models[name] for name, source in named.items()
        ] or [None]
        conventions = settle(tokenizer, first, [student, *others])
    conventions = replace(conventions, vocab_size=min(width, conventions.vocab_size))
    _prepare(student, models)
    return ModelPair(student, models, teacher, conventions, dtype)


def teacher_names(teacher: TeacherSource) -> list[str]:
    """The names that rows of the data give to the teachers; none if one teacher scores all rows."""
    return list(teacher) if isinstance(teacher, Mapping) else []


def _by_name(teacher: TeacherSource) -> dict[str, NamedSource]:
    """The teachers by name. A single one has an empty name; the base model of the student is left out.

    Raises:
        InputError: a mapping names no teacher, or has None for one.
    """
    if teacher is None or isinstance(teacher, NoTeacher):
        return {}
    if not isinstance(teacher, Mapping):
        return {"": teacher}
    if not teacher or None in teacher.values():
        raise InputError("teacher: a mapping needs a model, a name or a ServedTeacher for each teacher, and not None")
    return dict(teacher)


def _check_tokens(tokenizer: Any, teacher: NamedSource, label: str) -> None:
    """Refuse a teacher with another tokenizer. If it is given by name, that is found before any weights load."""
    if isinstance(teacher, ServedTeacher):
        source = teacher.source
    else:
        source = teacher if isinstance(teacher, str) else str(getattr(teacher, "name_or_path", ""))
    is_named = isinstance(teacher, ServedTeacher | str)
    if is_named or (source and Path(source, "tokenizer_config.json").is_file()):
        check_same_tokens(tokenizer, load_tokenizer(source), label)


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


def _shared_width(student: int, teacher: int, label: str) -> int:
    """Rows of the output head that both models have."""
    if student != teacher:
        logger.warning(
            "The heads are %d (student) and %d (%s) tokens wide; both are used up to %d.",
            student,
            teacher,
            label,
            min(student, teacher),
        )
    return min(student, teacher)


def _prepare(student: Any, teachers: Mapping[str, Any]) -> None:
    """Switch dropout off, check the heads, and bind the scoring to the student's forward."""
    without_dropout(student)
    check_head(student, "student")
    for name, model in teachers.items():
        check_head(model, teacher_label(name))
    bind_scoring(student)
    if is_deepspeed_zero3_enabled():
        gather_head(student)
