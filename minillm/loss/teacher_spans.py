"""Which teacher scores which tokens of a batch, and the teacher's projections of a chunk of them.

A batch may hold responses of several teachers. Consecutive tokens of one teacher are a span. The order of the tokens is
never changed, so a batch has at least as many spans as it has changes of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.data.rollouts import SparseTargets, TeacherRows
from minillm.errors import InputError
from minillm.loss.elementwise import Precision, Transforms, complete_with_student
from minillm.models.head import LogitTransform, TeacherStates, project

if TYPE_CHECKING:
    from jaxtyping import Float

Teacher = TeacherStates | TeacherRows | SparseTargets | Sequence[TeacherStates]
"""Where log p comes from: hidden states and head of a teacher; the log-probabilities that a served teacher gives;
weights of a few tokens, as a store keeps them; or, where several teachers score parts of a batch, the states of each
part in the order of the tokens."""


@dataclass(frozen=True)
class TeacherSpan:
    """Consecutive tokens that one teacher scores; without a teacher, the student stands in for it.

    Attributes:
        start: Position of the first token.
        stop: Position after the last token.
        transforms: What turns projections of student and teacher into logits.
        text_transforms: The same at the temperature of text; None if that is not another one.
        states: Hidden states of the teacher, one for each token of the span.
        weight: Weight of the teacher's head, without padding.
        rows: Log-probabilities of a few tokens, in place of states.
    """

    start: int
    stop: int
    transforms: Transforms
    text_transforms: Transforms | None
    states: Float[Tensor, "tokens hidden"] | None = None
    weight: Float[Tensor, "vocab hidden"] | None = None
    rows: TeacherRows | None = None

    def chunks(self, size: int) -> Iterator[slice]:
        """Yield the positions of chunks of at most `size` tokens, from the last chunk to the first."""
        for first in reversed(range(self.start, self.stop, size)):
            yield slice(first, min(first + size, self.stop))

    def projection(
        self, part: slice, student: Float[Tensor, "chunk vocab"], wide: torch.dtype
    ) -> Float[Tensor, "chunk vocab"]:
        """Return the teacher's projections of a chunk of the span.

        Args:
            part: Positions of the chunk's tokens in the batch.
            student: Projections of the student.
            wide: Dtype of logits.
        """
        if self.states is not None and self.weight is not None:
            return project(self.states[part.start - self.start : part.stop - self.start], self.weight)
        if self.rows is None:
            return student
        logits = self.transforms.student.logits(student, wide)
        return complete_with_student(logits, self.rows.ids[part], self.rows.logprobs[part])


@dataclass(frozen=True)
class SpanSettings:
    """What the spans of a batch have in common.

    Attributes:
        student: Turns the student's projections into logits.
        text_temperature: The temperature of text, if it is not that of the other scores.
        width: Size of the vocabulary.
        precision: The dtypes of the computation.
    """

    student: LogitTransform
    text_temperature: float | None
    width: int
    precision: Precision

    def transforms(self, teacher: LogitTransform | None) -> tuple[Transforms, Transforms | None]:
        """Return the transforms, and those at the temperature of text. Without a teacher, both sides are one object.

        torch.compile would compile once more for two equal objects.
        """
        pair = Transforms(self.student, self.student if teacher is None else teacher)
        if self.text_temperature is None:
            return pair, None
        text = self.student._replace(temperature=self.text_temperature)
        return pair, Transforms(text, text if teacher is None else teacher._replace(temperature=self.text_temperature))

    def of_rows(self) -> tuple[Transforms, Transforms | None]:
        """Return the transforms for rows of log-probabilities, which no temperature divides again."""
        teacher = LogitTransform(None, 1.0, None, 1.0)
        pair, text = self.transforms(teacher)
        return pair, None if text is None else Transforms(text.student, teacher)


def teacher_spans(teacher: Teacher | None, num_tokens: int, settings: SpanSettings) -> list[TeacherSpan]:
    """Divide a batch into the spans of its teachers.

    Args:
        teacher: The teacher, the teachers, or None.
        num_tokens: Number of tokens in the batch.
        settings: What the spans have in common.

    Returns:
        The spans, in the order of the tokens. A single teacher has one span of all tokens.

    Raises:
        InputError: The states of several teachers are not as many as the tokens.
    """
    if teacher is None or isinstance(teacher, SparseTargets):  # these are compared with the student's scores alone
        return [TeacherSpan(0, num_tokens, *settings.transforms(None))]
    if isinstance(teacher, TeacherRows):  # they are log-probabilities already
        return [TeacherSpan(0, num_tokens, *settings.of_rows(), rows=teacher)]
    parts = [teacher] if isinstance(teacher, TeacherStates) else list(teacher)
    dtype, wide, _ = settings.precision
    # One copy of each head as it is multiplied, however many spans use it.
    weights: dict[int, Tensor] = {}
    spans, start = [], 0
    for states in parts:
        head, key = states.head.narrow(settings.width), id(states.head.weight)
        if key not in weights:
            weights[key] = settings.precision.factor(head.weight)
        transforms = settings.transforms(LogitTransform.of(head, settings.student.temperature, wide))
        stop = start + len(states.hidden)
        spans.append(TeacherSpan(start, stop, *transforms, states=states.hidden.to(dtype), weight=weights[key]))
        start = stop
    if start != num_tokens:
        raise InputError(f"the teachers have {start} hidden states for {num_tokens} tokens")
    return spans
