"""Model FLOPs utilisation: the multiplications of an update, compared with what this process's device could do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from minillm.data.batches import Padded
from minillm.data.rollouts import Rollout
from minillm.models.flops import Dimensions, dimensions_of
from minillm.models.hardware import peak_flops
from minillm.models.head import TeacherStates
from minillm.rollout.engines.base import Engine
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import RoutedTeacher
from minillm.train.log import Metrics

if TYPE_CHECKING:
    from minillm.loss.teacher_spans import Teacher as TeacherScores
    from minillm.teacher.base import Teacher


class Utilisation(TrainerCallback):
    """Logs `model_flops_utilization`: operations of updates / (their seconds × the peak of the process's device).

    An update lasts from `begin` to the end of its optimiser step. Validation and checkpoints are outside. Operations
    are those of `minillm.models.flops`, counted when their phase runs: sampling and the teacher's forward pass count in
    the first update on a batch, as their time does. What servers compute is not counted, because it is not done by this
    process's device. If the peak is not known, nothing is logged.

    Args:
        student: The student, before it is wrapped for training.
        teacher: The teacher, or several, of which those in this process compute here.
        metrics: Where the result is added.
        device: The device of this process.
        dtype: The dtype of forward passes.
    """

    def __init__(
        self, student: Any, teacher: Teacher | None, metrics: Metrics, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._student, self._teachers = dimensions_of(student), _dimensions_of_teachers(teacher)
        self._metrics, self._device, self._dtype = metrics, device, dtype
        self._peak: float | None = None
        self._started: float | None = None
        self._flops = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Look the peak up, or measure it while nothing else runs."""
        self._peak = peak_flops(self._device, self._dtype, self._student.products())

    def begin(self) -> None:
        """Note that an update begins."""
        self._flops, self._started = 0.0, time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add the update that has ended to the metrics."""
        if self._started is None or not self._peak:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the optimiser's kernels are only queued
        self._metrics.add_mean(
            "model_flops_utilization", self._flops, (time.perf_counter() - self._started) * self._peak
        )
        self._started = None

    def sampled(self, rollouts: Sequence[Rollout], engine: Engine | None, *, mixed: bool) -> None:
        """Count the sampling of responses; a prompt of several responses is read once.

        Args:
            rollouts: What the engine has sampled.
            engine: The engine.
            mixed: Whether the teacher was mixed in.
        """
        if engine is None or engine.capabilities.supports_overlap:  # it computes in other processes
            return
        seen: set[tuple[int, ...]] = set()
        cached = []
        for rollout in rollouts:
            prompt = tuple(rollout.prompt_ids)
            # The last token of a prompt is read each time, because it predicts the first token of the response.
            cached.append(len(prompt) - 1 if prompt in seen else 0)
            seen.add(prompt)
        lengths = [len(r.prompt_ids) for r in rollouts], [len(r.response_ids) for r in rollouts]
        for model in (self._student, self._teachers.get("") if mixed else None):
            self._flops += 0.0 if model is None else model.decoding(*lengths, cached)

    def read_by_teacher(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], names: Sequence[str | None]
    ) -> int:
        """Count the teacher's forward pass over prompts with their responses.

        Args:
            sequences: Each prompt with its response.
            names: The name of each response's teacher, which is read where there are several.

        Returns:
            The number of response tokens.
        """
        for (prompt, response), name in zip(sequences, names, strict=True):
            model = self._teachers.get("", self._teachers.get(name or ""))
            self._flops += 0.0 if model is None else model.forward([len(prompt) + len(response)])
        return sum(len(response) for _, response in sequences)

    def scored(self, batch: Padded, teacher: TeacherScores | None, width: int, *, trained: bool) -> None:
        """Count the student's pass over a batch, with the products of the heads.

        Args:
            batch: The sequences.
            teacher: What the student is compared with: states of one teacher or of several, which the heads multiply,
                or rows, which they do not.
            width: Size of the shared vocabulary.
            trained: Whether there is a backward pass.
        """
        student, tokens, lengths = self._student, len(batch.targets), batch.sequence_lengths()
        if trained:
            self._flops += student.backward(lengths) + student.head_training(tokens, width)
        else:
            self._flops += student.head(tokens, width)
        self._flops += student.forward(lengths)
        for states in teacher if isinstance(teacher, Sequence) else [teacher]:
            if isinstance(states, TeacherStates):
                count, hidden = states.hidden.shape
                self._flops += student.head(count, width) * hidden / student.hidden


def _dimensions_of_teachers(teacher: Teacher | None) -> dict[str, Dimensions]:
    """The dimensions of the teachers in this process by name, without an adapter of the student that one is part of.

    A single teacher has an empty name.
    """
    by_name = teacher.by_name if isinstance(teacher, RoutedTeacher) else {"": teacher}
    return {
        name: replace(dimensions_of(each.model), trained=0.0, head_trained=False)
        for name, each in by_name.items()
        if isinstance(each, LocalTeacher)
    }
