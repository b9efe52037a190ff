"""Distillation on fixed responses: cross-entropy and forward KL (word-level KD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from minillm.data.batches import bucket, pad, permutation
from minillm.loss.objective import SupervisedLoss
from minillm.train.base import DistillationTrainer


class SupervisedTrainer(DistillationTrainer):
    """Minimises λ·CE + (1−λ)·KL(p‖q) over the tokens of given responses.

    Args:
        train_dataset: rows with `prompt_ids` and `response_ids` (the EOS included). An epoch drops what does not fill
            a last update; another epoch drops other rows.
        cross_entropy: λ.
    """

    def __init__(
        self, model: str | PreTrainedModel, teacher: str | PreTrainedModel, args: TrainingArguments, *,
        train_dataset: Sequence[dict[str, Any]], cross_entropy: float = 0.5, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, teacher, args, train_dataset=train_dataset, **kwargs)
        self._cross_entropy = cross_entropy
        self._rows = train_dataset
        self._processes = self.accelerator.num_processes
        self._micro = args.per_device_train_batch_size * self._processes
        self._size = self._micro * args.gradient_accumulation_steps
        if len(train_dataset) < self._size:
            raise ValueError(
                f"{len(train_dataset)} training rows are fewer than the {self._size} of one update "
                "(per_device_train_batch_size × gradient_accumulation_steps × processes)"
            )

    def updates_per_epoch(self) -> int:
        return len(self._rows) // self._size

    def micro_batches(self, update: int) -> list[tuple[list[int], int]]:
        """(this process's rows, the update's response tokens over all processes), rows of like length together."""
        epoch, number = divmod(update, self.updates_per_epoch())
        order = permutation(len(self._rows), self.args.seed, "epoch", epoch)
        rows = order[number * self._size : (number + 1) * self._size]
        count = sum(len(self._rows[row]["response_ids"]) for row in rows)
        lengths = [len(self._rows[row]["prompt_ids"]) + len(self._rows[row]["response_ids"]) for row in rows]
        rank = self.accelerator.process_index
        return [([rows[i] for i in group[rank :: self._processes]], count) for group in bucket(lengths, self._micro)]

    def training_step(self, model: Any, inputs: tuple[list[int], int], num_items_in_batch: Any = None) -> Tensor:
        indices, count = inputs
        rows = [self._rows[i] for i in indices]
        prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
        batch = pad(prompts, responses, self.args.device)
        with self.phase("teacher", len(batch.targets)):
            hidden = self.local_teacher.hidden(prompts, responses)
        loss = SupervisedLoss(self._cross_entropy, count)
        value = self.update_on(model, batch, loss, torch.cat(hidden), self._processes)
        self.tally(loss.tally.sums)
        return value
