"""Fine-tuning on reference responses with TRL's SFTTrainer: for the teacher, and for the baseline of the student."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from minillm.errors import InputError
from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import Conventions, settle
from minillm.models.load import load_model, load_tokenizer, without_dropout
from minillm.models.vocabulary import head_width
from minillm.rollout.config import RolloutConfig
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import RoutedTeacher
from minillm.train.arguments import NAMES, check_arguments
from minillm.train.datasets import tokenize_answered, tokenize_validation
from minillm.train.finite import Finite, listed
from minillm.train.pair import compute_dtype
from minillm.train.student import check_one_gpu
from minillm.train.trl_arguments import handed_to_trl
from minillm.train.trl_names import accepts_trl_names
from minillm.train.validation import ValidationMixin

_IGNORED = -100  # the label of a token that is not trained on, in PyTorch's cross-entropy


# TRL overrides `create_model_card` of transformers with other parameters.
class FineTuner(ValidationMixin, Finite, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Minimises −log q over the tokens of given responses.

    Args:
        model: the student: a folder or hub id, loaded in float32; or a loaded model, whose tokenizer is
            `processing_class`.
        args: the arguments of the training.
        train_dataset: rows with `prompt_ids` and `response_ids` (the EOS included), or in another form that
            `tokenize_answered` reads.
        rollout: how the student is sampled for validation.
        eval_dataset: rows for validation; see `ValidationMixin`.
        teacher: the model p in the KL(q‖p) of validation, if there is one: a folder, a hub id or a loaded model; or
            several of them by name, of which each row of `eval_dataset` names its own in `teacher`.
        processing_class: the student's tokenizer.
        conventions: vocabulary and end tokens, if they are settled already.

    TRL's `teacher_model` and `peft_config` are taken too.
    """

    @accepts_trl_names
    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[dict[str, Any]],
        rollout: RolloutConfig | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        teacher: str | PreTrainedModel | Mapping[str, str | PreTrainedModel] | None = None,
        processing_class: Any = None,
        conventions: Conventions | None = None,
    ) -> None:
        check_arguments(
            args,
            fine_tuning=True,
            eval_dataset=eval_dataset,
            reads_teacher=teacher is not None,
            metrics=self.validation_metrics,
        )
        check_one_gpu(args)
        if not len(train_dataset):
            raise InputError("train_dataset is empty")
        tokenizer = processing_class or (conventions.tokenizer if conventions else load_tokenizer(str(model)))
        train_dataset = tokenize_answered(train_dataset, tokenizer)
        eval_dataset = tokenize_validation(eval_dataset, tokenizer)
        student: Any = load_model(model, torch.float32) if isinstance(model, str) else model
        without_dropout(student)
        bind_scoring(student)
        # TRL would prepare all rows before the first update, and the evaluation rows, which are prompts to sample from,
        # for its own loss. It is given one row, and reads ours after that.
        stand_in = Dataset.from_list([TrainingRows(train_dataset)[0]])
        super().__init__(
            model=student,
            args=_trl_config(args),
            train_dataset=stand_in,
            eval_dataset=None if eval_dataset is None else stand_in,
            processing_class=tokenizer,
        )
        self._rows = TrainingRows(train_dataset)
        self.train_dataset, self.eval_dataset = self._rows, eval_dataset  # pyright: ignore[reportAttributeAccessIssue]
        dtype = compute_dtype(args)
        conventions = conventions or settle(tokenizer, None, [student])
        width = min(head_width(student), conventions.vocab_size)
        self.set_up_sampling(rollout or RolloutConfig(), replace(conventions, vocab_size=width), dtype)
        if teacher is not None and eval_dataset is not None:
            self.teacher = _scoring_teacher(teacher, dtype, args.device)

    def rows_of(self, micro_batch: dict[str, Any]) -> str:
        """The rows of a micro-batch, in words. The collator drops row numbers, so rows are found by their tokens."""
        rows = [
            ids[seen.bool()].tolist()
            for ids, seen in zip(micro_batch["input_ids"], micro_batch["attention_mask"], strict=True)
        ]
        return listed("train_dataset row", sorted(map(self._rows.index, rows)))

    def contents_of(self, micro_batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What a micro-batch holds, for the file of a refused update."""
        columns = {name: value.tolist() for name, value in micro_batch.items() if isinstance(value, torch.Tensor)}
        return [{"rows": self.rows_of(micro_batch), **columns}]


def _scoring_teacher(
    teacher: str | PreTrainedModel | Mapping[str, str | PreTrainedModel], dtype: torch.dtype, device: torch.device
) -> LocalTeacher | RoutedTeacher:
    """The teacher, or the teachers, as models in this process."""
    if isinstance(teacher, Mapping):
        return RoutedTeacher({name: _local_teacher(model, dtype, device) for name, model in teacher.items()})
    return _local_teacher(teacher, dtype, device)


def _local_teacher(teacher: str | PreTrainedModel, dtype: torch.dtype, device: torch.device) -> LocalTeacher:
    model: Any = load_model(teacher, dtype) if isinstance(teacher, str) else teacher
    return LocalTeacher(model.to(device))


class TrainingRows(TorchDataset[dict[str, list[int]]]):
    """Rows in the format that TRL's collator reads, each converted when it is asked for.

    Args:
        rows: rows with `prompt_ids` and `response_ids`.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows
        self._recent: deque[int] = deque(maxlen=4096)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """Return the tokens of a row, and its labels, which leave the prompt out."""
        self._recent.append(number)
        row = self._rows[number]
        return {
            "input_ids": [*row["prompt_ids"], *row["response_ids"]],
            "labels": [_IGNORED] * len(row["prompt_ids"]) + list(row["response_ids"]),
        }

    def index(self, ids: list[int]) -> int:
        """Return the number of the row with the given tokens. The rows that were read last are searched first."""
        for number in chain(reversed(self._recent), range(len(self))):
            row = self._rows[number]
            if [*row["prompt_ids"], *row["response_ids"]] == ids:
                return number
        raise ValueError("no row has these tokens")


def _trl_config(args: TrainingArguments) -> SFTConfig:
    """The arguments for TRL, with its own preparation switched off.

    Nothing is truncated or packed. The labels of the rows say what is trained on.
    """
    shared = NAMES | handed_to_trl(args)
    given = {name: value for name, value in args.to_dict().items() if value is not None and name in shared}
    given |= {name: getattr(args, name) for name in given if name.endswith("_token")}  # to_dict masks their values
    return SFTConfig(**given | {"max_length": None, "packing": False})
