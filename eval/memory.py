"""What `minillm plan` says of a stage's memory, against what the stage takes: each in a fresh process, on the CPU or a GPU.

    python eval/memory.py recipes/quickstart.yaml finetune warmup minillm [section.key=value]... [--json]

The data is made up, so that prompts have `data.max_prompt_tokens` and the answers that are trained on
`responses.max_new_tokens`, as the plan assumes; a stage makes three updates. Measured is the largest resident size of
its process (Linux), or the most that NVML saw the process hold of the card, looking every 5 ms. On a GPU the plan's seconds
stand beside those of the last update, which compiles nothing any more, and of a batch of rollouts with the teacher's reading;
the plan takes rollouts for half as long as they may be, so that those of a student that never ends are planned too quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from minillm.models.device import cpu_multiplies_bfloat16, machine
from minillm.models.load import load_tokenizer
from minillm.run import runner
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import updates_of_batch
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe

_SECTIONS = {"finetune": "finetune", "warmup": "warmup.training", "sft": "sft", "minillm": "training"}
_UPDATES = 3


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


class _Clock(TrainerCallback):
    """When each update of this process ended."""

    ends: ClassVar[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measured(recipe: str, overrides: list[str], stage: str) -> dict[str, Any]:
    """Bytes, and seconds where something is trained, in this process."""
    torch.manual_seed(0)
    DEFAULT_CALLBACKS.append(_Clock)  # pyright: ignore[reportArgumentType]
    loaded = load_recipe(recipe, overrides)
    with _peak_of_the_card() as peak:
        runner.run_recipe(loaded, stage)
    out: dict[str, Any] = {
        "bytes": peak[0] if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    }
    if len(_Clock.ends) > 1:
        out["update"] = _Clock.ends[-1] - _Clock.ends[-2]
    for state in Path(loaded.run_dir).glob("*/trainer_state.json"):
        drawn = [
            log for log in json.loads(state.read_text(encoding="utf-8"))["log_history"] if log.get("rollout_seconds")
        ]
        if drawn:
            out["rollouts"] = drawn[-1]["rollout_seconds"] + drawn[-1]["teacher_seconds"]
    return out


def planned_seconds(recipe: Recipe, found: Plan, stage: str) -> dict[str, float]:
    """Of an update, and of a batch of rollouts, by the phases' names here."""
    seconds = {phase.name: phase.seconds for phase in found.phases}
    if stage != "minillm":
        return {"update": seconds[stage] / _UPDATES}
    batches = math.ceil(_UPDATES / updates_of_batch(recipe, found.machine))
    return {"update": seconds["minillm: update"] / _UPDATES, "rollouts": seconds["minillm: rollouts"] / batches}


@contextmanager
def _peak_of_the_card() -> Iterator[list[int]]:
    """The most bytes this process held of the first GPU, in a list of one, once it is left.

    Where NVML does not tell processes apart (in a container, say), what the whole card holds more than at the start: it must be idle.
    """
    peak = [0]
    if not torch.cuda.is_available():
        yield peak
        return
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    done, before = Event(), pynvml.nvmlDeviceGetMemoryInfo(card).used
    torch.zeros(1, device="cuda")
    told = any(p.pid == os.getpid() and p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card))

    def look() -> None:
        while not done.wait(0.005):
            if told:
                held = [
                    p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card) if p.pid == os.getpid()
                ]
            else:
                held = [pynvml.nvmlDeviceGetMemoryInfo(card).used - before]
            peak[0] = max(peak[0], *held, 0)

    looking = Thread(target=look, daemon=True)
    looking.start()
    yield peak
    done.set()
    looking.join()


def worked(recipe: str, overrides: list[str], stage: str) -> dict[str, Any]:
    """What a fresh process measured."""
    done = subprocess.run(
        [sys.executable, __file__, recipe, *overrides, "--worker", stage], capture_output=True, text=True
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("MEASURED")), None)
    if line is None:
        raise SystemExit(f"{stage} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("MEASURED"))


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
        print("MEASURED", json.dumps(measured(options.recipe, overrides, options.worker)))
        return
    gpu = torch.cuda.is_available()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = load_recipe(options.recipe, overrides)
        overrides += [f"run_dir={folder / 'run'}"]
        briefly = (
            f"max_steps={_UPDATES}",
            "logging_steps=1",
            'save_strategy="no"',
            'eval_strategy="no"',
            "load_best_model_at_end=false",
        )
        overrides += [f"{_SECTIONS[stage]}.{setting}" for stage in wanted for setting in briefly]
        made = made_up(folder, recipe.teacher.source, recipe.data.max_prompt_tokens, recipe.responses.max_new_tokens)
        for stage in ("teacher", "student"):  # not here: a process begins with the peak of the one that starts it
            worked(options.recipe, [*overrides, *made, "stages=[teacher, student]"], stage)
        source = str(folder / "run" / "teacher") if (folder / "run" / "teacher").is_dir() else recipe.teacher.source
        start = str(folder / "run" / "pruned") if (folder / "run" / "pruned").is_dir() else recipe.student.source
        for stage in wanted:
            own = [
                f"stages=[{stage}]",
                f"teacher.source={source}",
                f"student.source={start}",
                f"run_dir={folder / stage}",
            ]
            run = [*overrides, *made, *own]
            loaded = load_recipe(options.recipe, run)
            found = plan(loaded, Machine(gpu=gpu, bf16=gpu or cpu_multiplies_bfloat16()))
            seen = worked(options.recipe, run, stage)
            row = {
                "stage": stage, "planned": found.peak, "measured": seen["bytes"], "ratio": found.peak / seen["bytes"],
                "parts": max(found.phases, key=lambda p: p.peak).parts,
            }  # fmt: skip
            text = (
                f"{stage}: planned {found.peak / 1e9:.2f} GB, measured {seen['bytes'] / 1e9:.2f} GB, {row['ratio']:.2f}"
            )
            if gpu:
                row["seconds"] = {
                    name: [of, seen.get(name)] for name, of in planned_seconds(loaded, found, stage).items()
                }
                text += "".join(
                    f"; {name} {of:.2f} s, measured {took or 0:.2f} s" for name, (of, took) in row["seconds"].items()
                )
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)
            results.append(row)
    if options.json:
        print(
            json.dumps({"machine": machine(), "recipe": options.recipe, "overrides": options.given, "results": results})
        )


if __name__ == "__main__":
    main()
