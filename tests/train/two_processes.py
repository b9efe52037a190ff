"""A short run of MiniLLMTrainer that means the same in one process and in two; started by accelerate launch."""

from __future__ import annotations

import sys

import torch
from transformers import TrainingArguments

from minillm import MiniLLMTrainer, Objective, RolloutConfig

PROMPTS = [{"prompt": f"<user> w{i} w{i + 1} <bot>"} for i in range(12)]


def run(student: str, teacher: str, folder: str) -> int:
    """Two rollout batches of 8, an update on each; returns the number of processes."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = TrainingArguments(
        folder, optim="sgd", learning_rate=0.05, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4 // world,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rollout = RolloutConfig(
        engine="transformers", num_rollouts=8, inner_epochs=1, teacher_mix=0.3, max_new_tokens=10, max_prompt_tokens=8, draft_tokens=4
    )
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(8)]
    objective = Objective.recommended(language_model=0.3, language_model_block=16)
    trainer = MiniLLMTrainer(student, teacher, arguments, objective=objective, rollout=rollout, train_dataset=PROMPTS, text_dataset=text)
    trainer.train()
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save({"world": trainer.accelerator.num_processes, "weights": weights}, f"{folder}/weights.pt")
    return trainer.accelerator.num_processes


if __name__ == "__main__":
    from accelerate import PartialState

    state = PartialState(cpu=True)
    run(*sys.argv[1:])
    # Left to the interpreter's exit, gloo's threads end in std::terminate now and then.
    state.wait_for_everyone()
    state.destroy_process_group()
