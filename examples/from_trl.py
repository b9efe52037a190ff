"""A script for TRL's DistillationTrainer, with the import changed.

    python examples/from_trl.py ORG/SMALL ORG/LARGE

`DistillationConfig` says what it says in TRL: with `beta=1` the loss is the reverse KL on the student's
own samples, one token at a time. `docs/tutorials/from-trl.md` says what this library adds, and how to switch it on.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from trl import DistillationConfig

from minillm import MiniLLMTrainer  # in TRL: from trl import DistillationTrainer

PROMPTS = ("Name three fruits.", "Say why leaves are green.", "What is a prime number?", "Write a line about rain.")


def main(student: str, teacher: str, out: str = "runs/from-trl") -> None:
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS * 4])
    trainer = MiniLLMTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            out,
            learning_rate=1e-5,
            max_steps=4,
            per_device_train_batch_size=4,
            max_completion_length=32,
            temperature=1.0,
            beta=1.0,  # the reverse KL
            use_cpu=not torch.cuda.is_available(),  # TRL's configurations ask for bf16, hence this
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model(f"{out}/student")
    print(f"Student: {out}/student")


if __name__ == "__main__":
    main(*sys.argv[1:])
