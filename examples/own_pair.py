"""Distil a teacher of your own into a student of your own, from Python.

    python examples/own_pair.py --student ORG/SMALL --teacher ORG/LARGE --prompts prompts.jsonl

`prompts.jsonl` has one JSON object a line: `{"instruction": "Name three fruits."}`, or a conversation in `messages`.
Both models need one vocabulary. The student is written to `--out`, as transformers and vLLM read it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import TrainingArguments

from minillm import MiniLLMTrainer, Objective, RolloutConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="folder or hub id of the model that learns")
    parser.add_argument("--teacher", required=True, help="folder or hub id of the model that it learns from")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines with a prompt in each")
    parser.add_argument("--out", type=Path, default=Path("runs/own-pair"))
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--responses", type=int, default=16, help="responses of an update")
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of a response")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    trainer = MiniLLMTrainer(
        model=options.student,
        teacher=options.teacher,
        args=TrainingArguments(
            str(options.out),
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            max_steps=options.updates,
            per_device_train_batch_size=4,  # the largest micro-batch: lower it if memory runs out
            logging_steps=1,
            report_to="none",
        ),
        responses_per_update=options.responses,
        objective=Objective.recommended(),
        rollout=RolloutConfig(num_rollouts=options.responses, max_new_tokens=options.tokens),
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model(str(options.out / "student"))
    # What training lowers, on the answers of the batch; a validation set (`eval_dataset`) tells more.
    logged = [entry for entry in trainer.state.log_history if "reverse_kl" in entry]
    first, last = logged[0]["reverse_kl"], logged[-1]["reverse_kl"]
    print(f"KL(q‖p) a token: {first:.3f} in the first update, {last:.3f} in the last")
    print(f"Student: {options.out / 'student'}")


if __name__ == "__main__":
    main()
