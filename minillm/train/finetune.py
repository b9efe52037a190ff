"""Fine-tuning on reference responses with TRL's SFTTrainer: for the teacher, and for the baseline of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import Conventions, settle
from minillm.models.load import load_model, load_tokenizer, without_dropout
from minillm.models.vocabulary import head_width
from minillm.rollout.config import RolloutConfig
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import RoutedTeacher
from minillm.train.arguments import NAMES, check_arguments
from minillm.train.finite import Finite, listed
from minillm.train.pair import compute_dtype
from minillm.train.student import check_one_gpu
from minillm.train.trl_arguments import handed_to_trl
from minillm.train.validation import ValidationMixin


# TRL overrides `create_model_card` of transformers with other parameters.
class FineTuner(ValidationMixin, Finite, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Minimises −log q over the tokens of given responses.

    Args:
        model: the student: a folder or hub id, loaded in float32; or a loaded model, whose tokenizer is
            `processing_class`.
        args: the arguments of the training.
        train_dataset: rows with `prompt_ids` and `response_ids` (the EOS included).
        rollout: how the student is sampled for validation.
        eval_dataset: rows for validation; see `ValidationMixin`.
        teacher: the model p in the KL(q‖p) of validation, if there is one: a folder, a hub id or a loaded model; or
            several of them by name, of which each row of `eval_dataset` names its own in `teacher`.
        processing_class: the student's tokenizer.
        conventions: vocabulary and end tokens, if they are settled already.
    """

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
        tokenizer = processing_class or (conventions.tokenizer if conventions else load_tokenizer(str(model)))
        student: Any = load_model(model, torch.float32) if isinstance(model, str) else model
        without_dropout(student)
        bind_scoring(student)
        data = _trl_rows(train_dataset)
        # TRL would prepare the evaluation rows for its own loss, but ours are prompts to sample from.
        stand_in = None if eval_dataset is None else data.select([0])
        super().__init__(
            model=student,
            args=_trl_config(args),
            train_dataset=data,
            eval_dataset=stand_in,
            processing_class=tokenizer,
        )
        self.eval_dataset = eval_dataset
        dtype = compute_dtype(args)
        conventions = conventions or settle(tokenizer, None, [student])
        width = min(head_width(student), conventions.vocab_size)
        self.set_up_sampling(rollout or RolloutConfig(), replace(conventions, vocab_size=width), dtype)
        if teacher is not None and eval_dataset is not None:
            self.teacher = _scoring_teacher(teacher, dtype, args.device)

    def rows_of(self, micro_batch: dict[str, Any]) -> str:
        """The rows of a micro-batch, in words. The collator drops row numbers, so rows are found by their tokens."""
        dataset: Any = self.train_dataset
        known = [list(ids) for ids in dataset["input_ids"]]
        rows = [
            ids[seen.bool()].tolist()
            for ids, seen in zip(micro_batch["input_ids"], micro_batch["attention_mask"], strict=True)
        ]
        return listed("train_dataset row", sorted(known.index(row) for row in rows))


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


def _trl_rows(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Convert rows to the format that TRL has for tokenised rows."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*row["prompt_ids"], *row["response_ids"]],
                "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"]),
            }
            for row in (rows[i] for i in range(len(rows)))
        ]
    )


def _trl_config(args: TrainingArguments) -> SFTConfig:
    """The arguments for TRL, with its own preparation switched off.

    Nothing is truncated or packed, and only the prompt is masked.
    """
    shared = NAMES | handed_to_trl(args)
    given = {name: value for name, value in args.to_dict().items() if value is not None and name in shared}
    given |= {name: getattr(args, name) for name in given if name.endswith("_token")}  # to_dict masks their values
    return SFTConfig(**given | {"completion_only_loss": True, "max_length": None, "packing": False})
