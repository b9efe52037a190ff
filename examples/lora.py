"""Train an adapter against a teacher, and merge it into the student.

    python examples/lora.py ORG/SMALL ORG/LARGE

Only the adapter's weights have gradients and optimiser states, so this is the way to a large student on a small card.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from minillm import MiniLLMTrainer, RolloutConfig

PROMPTS = ("Name three fruits.", "Say why leaves are green.", "What is a prime number?", "Write a line about rain.")


def main(student: str, teacher: str, out: str = "runs/lora") -> None:
    trainer = MiniLLMTrainer(
        model=student,
        teacher=teacher,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        args=TrainingArguments(
            out, learning_rate=1e-4, max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to="none"
        ),
        rollout=RolloutConfig(num_rollouts=4, max_prompt_tokens=64, max_new_tokens=32, teacher_mix=0.0),
        train_dataset=[{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS * 4],
    )
    trainer.train()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    merged = Path(out) / "student"
    trained.merge_and_unload().save_pretrained(merged)
    trainer.processing_class.save_pretrained(merged)  # pyright: ignore[reportOptionalMemberAccess]
    AutoModelForCausalLM.from_pretrained(merged)  # an ordinary model: nothing of this library is needed to read it
    print(f"Student: {merged}")


if __name__ == "__main__":
    main(*sys.argv[1:])
