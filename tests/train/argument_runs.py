"""What the tests of TrainingArguments share: rows, short runs and their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minillm.train.finetune import FineTuner
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.train.common import arguments

ROWS = [{"prompt_ids": [2, 4 + i % 20, 3], "response_ids": [5 + i % 20, 9, 6 + i % 7, 1]} for i in range(16)]

VALIDATION = [{"prompt_ids": row["prompt_ids"], "references": ["w5"]} for row in ROWS[:3]]

NOWHERE: Any = "no/such-model"  # faults are found before weights load, so none are needed

Weights = dict[str, torch.Tensor]


def weights_of(trainer: Any) -> Weights:
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def supervised(folder: Path, **changes: Any) -> SupervisedTrainer:
    student, teacher = tiny_llama(1, layers=1, width=32), tiny_llama(2, layers=1, width=32)
    args = arguments(folder, **({"max_steps": 3, "learning_rate": 1e-2} | changes))
    return SupervisedTrainer(
        student, teacher, args, train_dataset=ROWS, processing_class=tiny_tokenizer(), eval_dataset=VALIDATION
    )


def fine_tuned(folder: Path, **changes: Any) -> Weights:
    args = arguments(folder, **({"max_steps": 3, "learning_rate": 1e-2} | changes))
    return weights_of(
        FineTuner(tiny_llama(1, layers=1, width=32), args, train_dataset=ROWS, processing_class=tiny_tokenizer())
    )


def furthest(one: Weights, other: Weights) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)
