"""Stops training at the first update that cannot be trusted, or skips it, before anything of it is saved."""

from __future__ import annotations

import logging
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from minillm.data.files import write_json
from minillm.errors import TrainingDiverged
from minillm.train.journal import Journal
from minillm.train.log import Metrics
from minillm.train.mixin import TrainerPart

logger = logging.getLogger(__name__)

_ADVICE = "Lower learning_rate or max_grad_norm, and use bf16 rather than fp16"


class Finite(TrainerPart):
    """The part of a `transformers.Trainer` that stops every process at the update where a number is not finite.

    `on_fault` says what happens there. By default the training ends. With `skip` an update whose fault is found before
    the optimiser's step is not made: weights and optimiser stay as they are, the update counts in `skipped_updates` of
    the log, and training goes on with the next one. DeepSpeed and a float16 loss scaler have made the step, or part of
    it, by then, so with these the training ends. In either case the batch is written to a file, which is named.

    The losses and the gradient norm are checked before the optimiser's step. The weights and the optimiser's state are
    checked after it, before anything is saved. With float16, gradients that overflow are left to the loss scaler, which
    skips the step and scales down; they stop the training only once nothing is left to scale down. DeepSpeed steps in
    the backward pass: a loss is checked before that, and the gradient norm after its step.

    A trainer calls `begin` with the micro-batches of an update and `see` with every loss, and names the rows of a
    micro-batch (`rows_of`). What else is wrong with a micro-batch it calls `suspect` with.

    Attributes:
        on_fault: `stop` or `skip`.
        fault_folder: where the batches of refused updates are written; by default `faults` in the output folder.
        journal: where refused updates and alarms are noted.
        skipped_updates: how many updates were skipped.

    Raises:
        TrainingDiverged: the message names the update, its rows, and the last checkpoint.
    """

    on_fault: Literal["stop", "skip"] = "stop"
    fault_folder: Path | None = None
    journal: Journal
    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[Tensor] = []
        self._micro_batches: list[Any] = []
        self._suspected: list[str] = []
        self.skipped_updates = 0
        self.add_callback(_AfterTheStep(self))

    @abstractmethod
    def global_sum(self, value: Tensor | float) -> float:
        """The sum of a number over all processes; see `StudentMixin.global_sum`."""

    @abstractmethod
    def rows_of(self, micro_batch: Any) -> str:
        """The rows of the data that a micro-batch holds, in words."""

    def contents_of(self, micro_batch: Any) -> list[dict[str, Any]]:
        """What a micro-batch holds, for the file of a refused update; by default its rows in words."""
        return [{"rows": self.rows_of(micro_batch)}]

    def begin(self, micro_batches: list[Any]) -> list[Any]:
        """Note the micro-batches of the next update, and return them."""
        self._losses, self._micro_batches, self._suspected = [], micro_batches, []
        self.metrics.mark()
        return micro_batches

    def suspect(self, fault: str, micro_batch: Any) -> None:
        """Note something else that is wrong with a micro-batch; the update is refused before its step."""
        self._suspected.append(f"{fault} on {self.rows_of(micro_batch)}")

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
        refused = self.refuse(self._loss_faults() or self._suspected)
        if not refused:
            size = 0.0 if norm is None else float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            excused = math.isfinite(size) or self._scales_down()
            refused = self.refuse([] if excused else [f"the gradient norm is {size} on {self._rows_of_update()}"])
        if not refused:
            return norm
        model.zero_grad(set_to_none=True)  # no optimiser moves a weight that has no gradient
        self.metrics.rewind()
        return torch.zeros(())

    def check_state(self) -> None:
        """Check the weights and the optimiser's state after its step."""
        model: Any = self.model
        optimizer: Any = self.optimizer
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moments = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
        faults = [
            name
            for name, tensors in (("weights", trained), ("the optimiser's state", moments))
            if not are_finite(tensors)
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

    def refuse(
        self, faults: list[str], contents: Sequence[dict[str, Any]] | None = None, advice: str = _ADVICE
    ) -> bool:
        """Refuse an update in every process, if any of them has found a fault.

        Args:
            faults: what this process has found, in words; empty if nothing.
            contents: what is written down; by default what the micro-batches of the update hold.
            advice: what may help, as a sentence.

        Returns:
            Whether the update is to be skipped.

        Raises:
            TrainingDiverged: updates are not skipped, or this one cannot be.
        """
        if not self.global_sum(float(bool(faults))):
            return False
        by_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.on_fault == "stop" or by_deepspeed or self.accelerator.scaler is not None:
            self.stop_at(faults, contents, advice)
        found, file = self._gathered(faults), self._write_batch(faults, contents)
        self.skipped_updates += 1
        update = self.state.global_step + 1
        self.journal.write("skip", update=update, what=found, batch=file)
        if self.accelerator.is_main_process:
            kept = f"; its batch is in {file}" if file else ""
            logger.warning("update %d is skipped (on_fault: skip): %s%s", update, "; ".join(found), kept)
        return True

    def stop_at(
        self, faults: list[str], contents: Sequence[dict[str, Any]] | None = None, advice: str = _ADVICE
    ) -> None:
        """Stop the training in every process, if any of them has found a fault; see `refuse`.

        Raises:
            TrainingDiverged: in every process, with the faults of all.
        """
        if not self.global_sum(float(bool(faults))):
            return
        found, file = self._gathered(faults), self._write_batch(faults, contents)
        folder: Any = self.args.output_dir
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = f"the last checkpoint is {last}" if last else "no checkpoint had been saved before (save_steps)"
        batch = f" The batch is in {file}." if file else ""
        update = self.state.global_step + 1
        self.journal.write("stop", update=update, what=found, batch=file)
        raise TrainingDiverged(
            f"update {update}: {'; '.join(found)}. The weights of this update are not saved; {kept}.{batch} {advice}"
        )

    def _gathered(self, faults: list[str]) -> list[str]:
        return gather_object(faults) if self.accelerator.num_processes > 1 else faults

    def _write_batch(self, faults: list[str], contents: Sequence[dict[str, Any]] | None) -> str | None:
        """Write what this process read for a refused update.

        Returns:
            The file, or of several processes the pattern of their files; None if this process's cannot be written.
        """
        update, folder = self.state.global_step + 1, self.fault_folder or Path(str(self.args.output_dir), "faults")
        file = folder / f"update-{update}-process-{self.accelerator.process_index}.json"
        if contents is None:
            contents = [row for micro_batch in self._micro_batches for row in self.contents_of(micro_batch)]
        try:
            write_json(file, {"update": update, "faults": faults, "batch": spelled(list(contents))})
        except OSError as error:
            logger.warning("%s: the batch of the refused update cannot be written: %s", file, error.strerror or error)
            return None
        return str(file if self.accelerator.num_processes == 1 else folder / f"update-{update}-process-*.json")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; once updates were skipped, every entry says how many."""
        if self.skipped_updates and "loss" in logs:
            logs["skipped_updates"] = float(self.skipped_updates)
        super().log(logs, *args, **kwargs)


def spelled(value: Any) -> Any:
    """Return a copy of what JSON can hold, and of tensors, with NaN and infinities as the words that Python has."""
    if isinstance(value, Tensor):
        return spelled(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: spelled(inner) for key, inner in value.items()}
    return [spelled(inner) for inner in value] if isinstance(value, list | tuple) else value


def listed(what: str, numbers: Sequence[int], most: int = 20) -> str:
    """Format a noun with its numbers, such as `row 3` or `rows 3, 8`; after `most` of them the others are counted."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"


def are_finite(tensors: Iterable[Any]) -> bool:
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
