"""Model FLOPs utilisation: the multiplications of an update, compared with what this process's device could do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from minillm.data.batches import Padded
from minillm.data.rollouts import Rollout
from minillm.models.flops import Dimensions, dimensions_of
from minillm.models.hardware import peak_flops
from minillm.rollout.engines.base import Engine
from minillm.teacher.local import LocalTeacher
from minillm.train.log import Metrics

if TYPE_CHECKING:
    from minillm.teacher.base import Teacher


class Utilisation(TrainerCallback):
    """Logs `model_flops_utilization`: operations of updates / (their seconds × the peak of the process's device).

    An update lasts from `begin` to the end of its optimiser step. Validation and checkpoints are outside. Operations
    are those of `minillm.models.flops`, counted when their phase runs: sampling and the teacher's forward pass count in
    the first update on a batch, as their time does. What servers compute is not counted, because it is not done by this
    process's device. If the peak is not known, nothing is logged.

    Args:
        student: The student, before it is wrapped for training.
        teacher: The teacher, of which only one in this process computes here.
        metrics: Where the result is added.
        device: The device of this process.
        dtype: The dtype of forward passes.
    """

    def __init__(
        self, student: Any, teacher: Teacher | None, metrics: Metrics, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._student, self._teacher = dimensions_of(student), _dimensions_of_teacher(teacher)
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
        for model in (self._student, self._teacher if mixed else None):
            self._flops += 0.0 if model is None else model.decoding(*lengths, cached)

    def read_by_teacher(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
        """Count the teacher's forward pass over prompts with their responses.

        Returns:
            The number of response tokens.
        """
        if self._teacher is not None:
            self._flops += self._teacher.forward(len(prompt) + len(response) for prompt, response in sequences)
        return sum(len(response) for _, response in sequences)

    def scored(self, batch: Padded, teacher: object, width: int, *, trained: bool) -> None:
        """Count the student's pass over a batch, with the products of the heads.

        Args:
            batch: The sequences.
            teacher: What the student is compared with: hidden states [tokens, hidden], or something that is not
                multiplied.
            width: Size of the shared vocabulary.
            trained: Whether there is a backward pass.
        """
        student, tokens, lengths = self._student, len(batch.targets), batch.sequence_lengths()
        states = teacher.shape[-1] if isinstance(teacher, Tensor) else None
        if trained:
            self._flops += student.backward(lengths) + student.head_training(tokens, width, states)
        else:
            self._flops += student.head(tokens, width) * (1 + (states or 0) / student.hidden)
        self._flops += student.forward(lengths)


def _dimensions_of_teacher(teacher: Teacher | None) -> Dimensions | None:
    """The dimensions of a teacher in this process, without an adapter of the student that it shares weights with."""
    if not isinstance(teacher, LocalTeacher):
        return None
    found = dimensions_of(teacher.model)
    return replace(found, trained=0.0, head_trained=False)
