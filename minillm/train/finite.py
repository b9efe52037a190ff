"""Stops training at the first number that is not finite, before such a number is saved."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from minillm.errors import TrainingDiverged
from minillm.train.mixin import TrainerPart


class Finite(TrainerPart):
    """The part of a `transformers.Trainer` that stops every process at the update where a number is not finite.

    The losses and the gradient norm are checked before the optimiser's step. The weights and the optimiser's state are
    checked after it, before anything is saved. With float16, gradients that overflow are left to the loss scaler, which
    skips the step and scales down; they stop the training only once nothing is left to scale down. DeepSpeed steps in
    the backward pass: a loss is checked before that, and the gradient norm after its step.

    A trainer calls `begin` with the micro-batches of an update and `see` with every loss, and names the rows of a
    micro-batch (`rows_of`).

    Raises:
        TrainingDiverged: the message names the update, its rows, and the last checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[Tensor] = []
        self._micro_batches: list[Any] = []
        self.add_callback(_AfterTheStep(self))

    @abstractmethod
    def global_sum(self, value: Tensor | float) -> float:
        """The sum of a number over all processes; see `StudentMixin.global_sum`."""

    @abstractmethod
    def rows_of(self, micro_batch: Any) -> str:
        """The rows of the data that a micro-batch holds, in words."""

    def begin(self, micro_batches: list[Any]) -> list[Any]:
        """Note the micro-batches of the next update, and return them."""
        self._losses, self._micro_batches = [], micro_batches
        return micro_batches

    def see(self, loss: Tensor) -> Tensor:
        """Note the loss of the next micro-batch, before its backward pass, and return it."""
        self._losses.append(loss.detach())
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.accelerator.sync_gradients:
            self.stop_at(self._loss_faults())
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As in transformers; notes the micro-batches."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.begin(batches), count

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; notes the loss."""
        found: Any = super().compute_loss(*args, **kwargs)
        self.see(found[0] if isinstance(found, tuple) else found)
        return found

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Losses come first: a bad one spoils the norm in every process, but only its own process can name its rows.
        self.stop_at(self._loss_faults())
        size = 0.0 if norm is None else float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        excused = math.isfinite(size) or self._scales_down()
        self.stop_at([] if excused else [f"the gradient norm is {size} on {self._rows_of_update()}"])
        return norm

    def check_state(self) -> None:
        """Check the weights and the optimiser's state after its step."""
        model: Any = self.model
        optimizer: Any = self.optimizer
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moments = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
        faults = [
            name
            for name, tensors in (("weights", trained), ("the optimiser's state", moments))
            if not _are_finite(tensors)
        ]
        self.stop_at(
            [f"the step left {' and '.join(faults)} that are not finite, on {self._rows_of_update()}"] if faults else []
        )

    def _loss_faults(self) -> list[str]:
        losses = torch.stack(self._losses).tolist() if self._losses else []
        found = [(value, index) for index, value in enumerate(losses) if not math.isfinite(value)]
        return [f"the loss is {value} on {self.rows_of(self._micro_batches[index])}" for value, index in found]

    def _rows_of_update(self) -> str:
        return " and ".join(self.rows_of(micro_batch) for micro_batch in self._micro_batches)

    def _scales_down(self) -> bool:
        """Whether a loss scaler handles gradients that overflow."""
        scaler = self.accelerator.scaler
        return self.accelerator.mixed_precision == "fp16" and (scaler is None or scaler.get_scale() > 1)

    def stop_at(self, faults: list[str]) -> None:
        """Stop the training in every process, if any of them has found a fault.

        Args:
            faults: what this process has found, in words; empty if nothing.

        Raises:
            TrainingDiverged: in every process, with the faults of all.
        """
        if not self.global_sum(float(bool(faults))):
            return
        found = gather_object(faults) if self.accelerator.num_processes > 1 else faults
        folder: Any = self.args.output_dir
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = f"the last checkpoint is {last}" if last else "no checkpoint had been saved before (save_steps)"
        raise TrainingDiverged(
            f"update {self.state.global_step + 1}: {'; '.join(found)}. The weights of this update are "
            f"not saved; {kept}. Lower learning_rate or max_grad_norm, and use bf16 rather than fp16"
        )


def listed(what: str, numbers: Sequence[int], most: int = 20) -> str:
    """Format a noun with its numbers, such as `row 3` or `rows 3, 8`; after `most` of them the others are counted."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"


def _are_finite(tensors: Iterable[Any]) -> bool:
    """Whether the sum of all tensors is finite. On a CPU this takes a tenth of the time of checking each number."""
    local = [
        value.to_local() if isinstance(value, DTensor) else getattr(value, "ds_tensor", value) for value in tensors
    ]
    wide = [
        (value.detach(), torch.float32 if value.dtype.itemsize < 4 else value.dtype)
        for value in local
        if value.is_floating_point()
    ]
    return math.isfinite(float(sum(value.sum(dtype=dtype) for value, dtype in wide)))


class _AfterTheStep(TrainerCallback):
    """Checks weights and optimiser state after every step."""

    def __init__(self, trainer: Finite) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.check_state()
