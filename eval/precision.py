"""Whether rounding the logits to bfloat16 makes a student's entropy drift: the same training with either.

    python eval/precision.py runs/quickstart/warmed runs/quickstart/teacher [--updates 200] [--out runs/precision]

Each arm trains in a process of its own, with the same prompts, seed and settings, and differs in one thing: `float32`
takes the logits as the library does on a CPU (products of bfloat16 factors, summed and returned in float32), `rounded`
rounds the student's and the teacher's logits to bfloat16 before anything is made of them, as a plain bfloat16 matmul
would. Printed are the mean entropy of the student by fifths of the training, and the difference of the arms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainingArguments

import minillm.loss.teacher_spans
import minillm.loss.token_scores
from minillm import MiniLLMTrainer, Objective, RolloutConfig
from minillm.data.files import read_jsonl
from minillm.models.head import project

ARMS = ("float32", "rounded")
PROMPTS = Path(__file__).parents[1] / "recipes" / "quickstart" / "train.jsonl"


def rounded(states: Tensor, weight: Tensor) -> Tensor:
    """`project`, with logits that are rounded to bfloat16."""
    return project(states, weight).to(torch.bfloat16).float()


def train(student: str, teacher: str, arm: str, seed: int, updates: int, folder: Path) -> None:
    """Train one arm, and write the student's entropy at each update to `entropy.json` of its folder."""
    if arm == "rounded":
        minillm.loss.teacher_spans.project = minillm.loss.token_scores.project = rounded
    settings = TrainingArguments(
        output_dir=str(folder / "work"),
        max_steps=updates,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        seed=seed,
        disable_tqdm=True,
    )
    trainer = MiniLLMTrainer(
        student,
        teacher,
        settings,
        objective=Objective.recommended(),
        rollout=RolloutConfig(num_rollouts=32, inner_epochs=2, max_new_tokens=32, teacher_mix=0.0),
        train_dataset=read_jsonl(PROMPTS),
    )
    trainer.train()
    trail = [row["entropy"] for row in trainer.state.log_history if "entropy" in row]
    (folder / "entropy.json").write_text(json.dumps(trail), encoding="utf-8")


def fifths(trail: list[float]) -> list[float]:
    """The means of five equal parts."""
    size = max(1, len(trail) // 5)
    return [sum(trail[i * size : (i + 1) * size]) / size for i in range(5)]


def main() -> None:
    """Train what is missing, one process after the other, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a folder")
    parser.add_argument("teacher", help="a folder")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for seed in given.seeds:
        found = {}
        for arm in ARMS if given.arm is None else (given.arm,):
            folder = given.out / f"{arm}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            if given.arm is not None:
                train(given.student, given.teacher, arm, seed, given.updates, folder)
                return
            if not (folder / "entropy.json").is_file():
                again = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--seeds", str(seed)]
                subprocess.run(again, check=True)
            found[arm] = fifths(json.loads((folder / "entropy.json").read_text(encoding="utf-8")))
            print(f"seed {seed}, {arm}: " + ", ".join(f"{value:.3f}" for value in found[arm]), flush=True)
        difference = [b - a for a, b in zip(found["float32"], found["rounded"], strict=True)]
        print(f"seed {seed}, difference: " + ", ".join(f"{value:+.3f}" for value in difference))


if __name__ == "__main__":
    main()
