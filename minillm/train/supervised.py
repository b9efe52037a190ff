"""Training on given responses: cross-entropy (SFT, SeqKD), a divergence from the teacher (word-level KD), or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from minillm.data.batches import bucket, pad
from minillm.data.seeding import ShuffledPasses
from minillm.errors import InputError
from minillm.loss.config import DivergenceConfig
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.terms import extra_divergence
from minillm.teacher.routed import join_states
from minillm.train.base import DistillationTrainer
from minillm.train.checks import check_teacher_names
from minillm.train.datasets import longest_row, tokenize_answered
from minillm.train.finite import listed
from minillm.train.pair import TeacherSource, resolve_tokenizer, teacher_names
from minillm.train.trl_names import accepts_trl_names


class SupervisedTrainer(DistillationTrainer):
    """Minimises λ·CE + (1−λ)·D over the tokens of given responses.

    Args:
        model: the student: a folder, a hub id or a loaded model.
        teacher: the teacher, given in the same ways, or a `ServedTeacher` whose servers return states; a mapping of
            several by name; None for the base model of a student with an adapter.
        args: the arguments of the training.
        train_dataset: rows with `prompt_ids` and `response_ids` (the EOS included), or in another form that
            `tokenize_answered` reads; and with `teacher` if there are several, as in `eval_dataset`. Each epoch leaves
            out the rows that do not fill a last update; they differ between epochs.
        cross_entropy: λ; at 1 the teacher is not read.
        divergence: D, the forward KL by default, at `temperature`.
        cross_entropy_temperature: divides the student's logits in CE.
        **kwargs: further parameters of `DistillationTrainer`, and TRL's `teacher_model` and `peft_config`.

    Raises:
        InputError: there are fewer rows than one update needs, or a row does not name one of several teachers.
    """

    @accepts_trl_names
    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: TeacherSource,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[dict[str, Any]],
        cross_entropy: float = 0.5,
        divergence: DivergenceConfig | None = None,
        cross_entropy_temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        rows = {"train_dataset": train_dataset, "eval_dataset": kwargs.get("eval_dataset")}
        check_teacher_names(teacher_names(teacher), rows)
        if len(train_dataset) and "prompt_ids" not in train_dataset[0]:
            train_dataset = tokenize_answered(train_dataset, resolve_tokenizer(model, kwargs.get("processing_class")))
        longest = longest_row(train_dataset)
        super().__init__(model, teacher, args, train_dataset=train_dataset, longest=longest, **kwargs)
        _ = self.states_teacher  # refuses log-probabilities of some tokens before anything is trained
        self.text_temperature = cross_entropy_temperature
        self._cross_entropy = cross_entropy
        self._divergence = divergence or DivergenceConfig(name="forward_kl")
        self._rows, self._passes = train_dataset, ShuffledPasses(max(len(train_dataset), 1), args.seed, "epoch")
        self._processes = self.accelerator.num_processes
        self._micro_batch_size = self.args.per_device_train_batch_size * self._processes
        self._update_size = self._micro_batch_size * self.args.gradient_accumulation_steps
        if len(train_dataset) < self._update_size:
            raise InputError(
                f"{len(train_dataset)} training rows are fewer than the {self._update_size} of one update "
                "(responses_per_update, or per_device_train_batch_size × gradient_accumulation_steps × processes)"
            )

    def updates_per_epoch(self) -> int:
        """Updates in one pass over the rows."""
        return len(self._rows) // self._update_size

    def micro_batches(self, update: int) -> list[tuple[list[int], int]]:
        """The micro-batches of an update, rows of similar length together.

        Returns:
            For each micro-batch, this process's rows, and the update's response tokens over all processes.
        """
        epoch, number = divmod(update, self.updates_per_epoch())
        first = epoch * len(self._rows) + number * self._update_size
        rows = [self._passes[position] for position in range(first, first + self._update_size)]
        sizes = [(len(row["prompt_ids"]), len(row["response_ids"])) for row in map(self._rows.__getitem__, rows)]
        count, lengths = sum(response for _, response in sizes), [prompt + response for prompt, response in sizes]
        rank = self.accelerator.process_index
        groups = bucket(lengths, self._micro_batch_size)
        return [([rows[i] for i in group[rank :: self._processes]], count) for group in groups]

    def rows_of(self, micro_batch: tuple[list[int], int]) -> str:
        """The rows of the data that a micro-batch holds, in words."""
        return listed("train_dataset row", sorted(micro_batch[0]))

    def contents_of(self, micro_batch: tuple[list[int], int]) -> list[dict[str, Any]]:
        """What a micro-batch holds, for the file of a refused update."""
        return [
            {"row": i, **{key: self._rows[i].get(key) for key in ("teacher", "prompt_ids", "response_ids")}}
            for i in micro_batch[0]
        ]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, an item of `micro_batches`; returns the loss."""
        indices, count = inputs
        rows = [self._rows[i] for i in indices]
        prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
        batch = pad(prompts, responses, self.args.device)
        teacher = None
        if self._cross_entropy < 1:
            with self.phase("teacher", len(batch.targets)):
                names = [row.get("teacher") for row in rows]
                teacher = join_states(self.states_teacher, self.states_of_teacher(prompts, responses, names), names)
        loss = SupervisedLoss(self._cross_entropy, count, self._divergence)
        divergence = None if teacher is None else extra_divergence(self._divergence)
        value = self.update_on(model, batch, loss, teacher, self._processes, divergence)
        self.metrics.add_sums(loss.tally.sums)
        return value
