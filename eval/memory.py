"""What `minillm plan` says of a stage's memory, against what the stage takes: each in a fresh process, on the CPU or a GPU.

    python eval/memory.py recipes/quickstart.yaml finetune warmup minillm [section.key=value]... [--json]

The data is made up, so that prompts have `data.max_prompt_tokens` and the answers that are trained on
`responses.max_new_tokens`, as the plan assumes; a stage makes three updates. Measured is the largest resident size of
its process (Linux), or the most that NVML saw the process hold of the card, looking every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from minillm import stages
from minillm.hardware import cpu_multiplies_bfloat16, machine
from minillm.models.load import load_tokenizer
from minillm.plan import Machine, plan
from minillm.recipe_file import load_recipe

_SECTIONS = {"finetune": "finetune", "warmup": "warmup.training", "sft": "sft", "minillm": "training"}


def made_up(folder: Path, source: str, prompt: int, answer: int) -> list[str]:
    """Files of full-length rows; returns the overrides that name them."""
    tokenizer = load_tokenizer(source)
    words = [f" word{i}" for i in range(3 * max(prompt, answer))]

    def text(tokens: int) -> str:
        ids = tokenizer("".join(words), add_special_tokens=False)["input_ids"][:tokens]
        return tokenizer.decode(ids)

    rows = [{"instruction": f"{i} {text(prompt - 12)}", "output": text(answer + 8)} for i in range(64)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ids = [{"row": i, "prompt_ids": tokenizer(row["instruction"])["input_ids"][:prompt],
            "response_ids": tokenizer(row["output"])["input_ids"][:answer], "finished": False} for i, row in enumerate(rows)]  # fmt: skip
    answers = folder / "responses.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ids), encoding="utf-8")
    return [
        f"data.train={file}", f"data.heldout={file}", "data.validation=null", "data.template=plain", f"responses.file={answers}",
        "warmup.targets=teacher",
    ]  # fmt: skip


def measured(recipe: str, overrides: list[str], stage: str) -> float:
    """Bytes, in this process."""
    torch.manual_seed(0)
    with _peak_of_the_card() as peak:
        stages.run(load_recipe(recipe, overrides), stage)
    return peak[0] if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _peak_of_the_card() -> Iterator[list[int]]:
    """The most bytes this process held of the first GPU, in a list of one, once it is left."""
    peak = [0]
    if not torch.cuda.is_available():
        yield peak
        return
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    done = Event()

    def look() -> None:
        while not done.wait(0.005):
            mine = (p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card) if p.pid == os.getpid())
            peak[0] = max(peak[0], *mine, 0)

    looking = Thread(target=look, daemon=True)
    looking.start()
    yield peak
    done.set()
    looking.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("given", nargs="*", help="stages, and settings")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wanted = [text for text in options.given if "=" not in text]
    overrides = [text for text in options.given if "=" in text]
    if options.worker:
        print("MEASURED", measured(options.recipe, overrides, options.worker))
        return
    gpu = torch.cuda.is_available()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = load_recipe(options.recipe, overrides)
        overrides += [f"run_dir={folder / 'run'}"]
        overrides += [
            f"{_SECTIONS[stage]}.{setting}" for stage in wanted for setting in ("max_steps=3", 'save_strategy="no"', 'eval_strategy="no"')
        ]
        made = made_up(folder, recipe.teacher.source, recipe.data.max_prompt_tokens, recipe.responses.max_new_tokens)
        for stage in ("teacher", "student"):  # not here: a process begins with the peak of the one that starts it
            subprocess.run(
                [sys.executable, __file__, options.recipe, *overrides, *made, "--worker", stage], capture_output=True, check=True
            )
        source = str(folder / "run" / "teacher") if (folder / "run" / "teacher").is_dir() else recipe.teacher.source
        start = str(folder / "run" / "pruned") if (folder / "run" / "pruned").is_dir() else recipe.student.source
        for stage in wanted:
            run = [
                *overrides,
                *made,
                f"stages=[{stage}]",
                f"teacher.source={source}",
                f"student.source={start}",
                f"run_dir={folder / stage}",
            ]
            found = plan(load_recipe(options.recipe, run), Machine(gpu=gpu, bf16=gpu or cpu_multiplies_bfloat16()))
            done = subprocess.run([sys.executable, __file__, options.recipe, *run, "--worker", stage], capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("MEASURED")), None)
            if line is None:
                raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
            if not float(line.split()[1]):
                raise SystemExit(f"{stage}: NVML does not tell this process's memory here (a process namespace of its own?)")
            results.append(
                {
                    "stage": stage,
                    "planned": found.peak,
                    "measured": float(line.split()[1]),
                    "parts": max(found.phases, key=lambda p: p.peak).parts,
                }
            )
    for row in results:
        row["ratio"] = row["planned"] / row["measured"]
    if options.json:
        print(json.dumps({"machine": machine(), "recipe": options.recipe, "overrides": options.given, "results": results}))
        return
    for row in results:
        print(f"{row['stage']}: planned {row['planned'] / 1e9:.2f} GB, measured {row['measured'] / 1e9:.2f} GB, {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
