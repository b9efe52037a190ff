"""Compares the memory that `minillm plan` predicts for a stage with the memory that the stage uses.

    python eval/memory.py recipes/quickstart.yaml finetune warmup minillm [section.key=value]... [--json]

Each stage runs in a fresh process, on the CPU or a GPU, and makes three updates. The data is made up: prompts have
`data.max_prompt_tokens` tokens and the answers that a stage trains on have `responses.max_new_tokens`, as the plan
assumes. The measured number is the largest resident size of the process (Linux). On a GPU it is the most memory that
NVML saw the process hold, sampled every 5 ms.

The script also compares seconds: of the last update, which no longer compiles anything, and of a batch of rollouts,
including the teacher's scores. For a CPU the plan takes the speed that `minillm plan --calibrate` has measured, or
measures a product. The plan assumes that a rollout is half as long as it may be, so it is too optimistic for a student
that never ends its responses.
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

from minillm.models.device import machine
from minillm.models.load import load_tokenizer
from minillm.run.plan.machine import Machine, machine_for
from minillm.run.plan.phases import Plan, plan
from minillm.run.plan.work import updates_of_batch
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from minillm.run.runner import run_recipe
from minillm.run.stages import stage_named

_UPDATES = 3


def write_made_up_data(folder: Path, source: str, prompt: int, answer: int) -> list[str]:
    """Write files with rows of full length.

    Args:
        folder: where the files are written.
        source: the model whose tokenizer counts the tokens.
        prompt: tokens of a prompt.
        answer: tokens of an answer.

    Returns:
        The overrides of the recipe that name the files.
    """
    tokenizer = load_tokenizer(source)
    words = [f" word{i}" for i in range(3 * max(prompt, answer))]

    def text(tokens: int) -> str:
        ids = tokenizer("".join(words), add_special_tokens=False)["input_ids"][:tokens]
        return tokenizer.decode(ids)

    rows = [{"instruction": f"{i} {text(prompt - 12)}", "output": text(answer + 8)} for i in range(64)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    responses = [
        {
            "row": i,
            "prompt_ids": tokenizer(row["instruction"])["input_ids"][:prompt],
            "response_ids": tokenizer(row["output"])["input_ids"][:answer],
            "finished": False,
        }
        for i, row in enumerate(rows)
    ]
    answers = folder / "responses.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in responses), encoding="utf-8")
    return [
        f"data.train={file}",
        f"data.heldout={file}",
        "data.validation=null",
        "data.template=plain",
        "data.system=null",  # the plain template has no room for one
        f"responses.file={answers}",
        "warmup.targets=teacher",
    ]


class _UpdateClock(TrainerCallback):
    """Records the time at which each update of this process ended."""

    ends: ClassVar[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def measure_stage(recipe: str, overrides: list[str], stage: str) -> dict[str, Any]:
    """Run one stage in this process.

    Returns:
        `bytes`, the peak memory; `update`, the seconds of the last update, for a stage that trains; and `rollouts`, the
        seconds of the last batch of rollouts with the teacher's scores, for a stage that samples.
    """
    torch.manual_seed(0)
    DEFAULT_CALLBACKS.append(_UpdateClock)  # pyright: ignore[reportArgumentType]
    loaded = load_recipe(recipe, overrides)
    with _gpu_peak() as peak:
        run_recipe(loaded, stage)
    out: dict[str, Any] = {
        "bytes": peak[0] if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    }
    if len(_UpdateClock.ends) > 1:
        out["update"] = _UpdateClock.ends[-1] - _UpdateClock.ends[-2]
    for state in Path(loaded.run_dir).glob("*/trainer_state.json"):
        logs = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        sampling = [log for log in logs if log.get("rollout_seconds")]
        if sampling:
            out["rollouts"] = sampling[-1]["rollout_seconds"] + sampling[-1]["teacher_seconds"]
    return out


def planned_seconds(recipe: Recipe, planned: Plan, stage: str) -> dict[str, float]:
    """The planned seconds of an update and of a batch of rollouts, under the names that `measure_stage` uses."""
    seconds = {phase.name: phase.seconds for phase in planned.phases}
    if stage != "minillm":
        return {"update": seconds[stage] / _UPDATES}
    batches = math.ceil(_UPDATES / updates_of_batch(recipe, planned.machine))
    return {"update": seconds["minillm: update"] / _UPDATES, "rollouts": seconds["minillm: rollouts"] / batches}


@contextmanager
def _gpu_peak() -> Iterator[list[int]]:
    """Measure the most memory, in bytes, that this process held of the first GPU.

    The context yields a list with one number, which is final once the context ends. Where NVML does not tell processes
    apart (in a container, for example), it is the growth of the whole card's memory since the start, so the card must
    be idle otherwise.
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

    def own_bytes() -> list[int]:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
        return [process.usedGpuMemory for process in processes if process.pid == os.getpid() and process.usedGpuMemory]

    reports_processes = bool(own_bytes())

    def watch() -> None:
        while not done.wait(0.005):
            used = own_bytes() if reports_processes else [pynvml.nvmlDeviceGetMemoryInfo(card).used - before]
            peak[0] = max(peak[0], *used, 0)

    watching = Thread(target=watch, daemon=True)
    watching.start()
    yield peak
    done.set()
    watching.join()


def run_in_fresh_process(recipe: str, overrides: list[str], stage: str) -> dict[str, Any]:
    """Return what `measure_stage` measures in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, recipe, *overrides, "--worker", stage], capture_output=True, text=True
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("MEASURED")), None)
    if line is None:
        raise SystemExit(f"{stage} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("MEASURED"))


def compare_stage(recipe: str, overrides: list[str], stage: str) -> tuple[dict[str, Any], str]:
    """Plan one stage and run it.

    Returns:
        A row of the results, and the same in one line of text.
    """
    gpu = torch.cuda.is_available()
    loaded = load_recipe(recipe, overrides)
    planned = plan(loaded, Machine() if gpu else machine_for(gpus=0)[0])
    found = run_in_fresh_process(recipe, overrides, stage)
    row: dict[str, Any] = {
        "stage": stage,
        "planned": planned.peak,
        "measured": found["bytes"],
        "ratio": planned.peak / found["bytes"],
        "parts": max(planned.phases, key=lambda phase: phase.peak).parts,
    }
    text = f"{stage}: planned {planned.peak / 1e9:.2f} GB, measured {found['bytes'] / 1e9:.2f} GB, {row['ratio']:.2f}"
    row["seconds"] = {
        name: [seconds, found.get(name)] for name, seconds in planned_seconds(loaded, planned, stage).items()
    }
    for name, (seconds, measured) in row["seconds"].items():
        text += f"; {name} {seconds:.2f} s, measured {measured or 0:.2f} s"
    return row, text


def short_run(stages: list[str]) -> list[str]:
    """The overrides that limit the stages to a few updates and turn off saving and validating."""
    settings = (
        f"max_steps={_UPDATES}",
        "logging_steps=1",
        'save_strategy="no"',
        'eval_strategy="no"',
        "load_best_model_at_end=false",
    )
    sections = [stage_named(stage).training for stage in stages]
    return [f"{section}.{setting}" for section in sections for setting in settings if section]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("given", nargs="*", help="stages, and settings")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    stages = [text for text in options.given if "=" not in text]
    overrides = [text for text in options.given if "=" in text]
    if options.worker:
        print("MEASURED", json.dumps(measure_stage(options.recipe, overrides, options.worker)))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = load_recipe(options.recipe, overrides)
        overrides += [
            f"run_dir={folder / 'run'}",
            *short_run(stages),
            *write_made_up_data(
                folder, recipe.teacher.first.source, recipe.data.max_prompt_tokens, recipe.responses.max_new_tokens
            ),
        ]
        # In processes of their own: a process inherits the peak of the one that starts it.
        for stage in ("teacher", "student"):
            run_in_fresh_process(options.recipe, [*overrides, "stages=[teacher, student]"], stage)
        teacher, student = folder / "run" / "teacher", folder / "run" / "pruned"
        for stage in stages:
            own = [
                f"stages=[{stage}]",
                f"teacher.source={teacher if teacher.is_dir() else recipe.teacher.first.source}",
                f"student.source={student if student.is_dir() else recipe.student.source}",
                f"run_dir={folder / stage}",
            ]
            row, text = compare_stage(options.recipe, [*overrides, *own], stage)
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)
            results.append(row)
    if options.json:
        report = {"machine": machine(), "recipe": options.recipe, "overrides": options.given, "results": results}
        print(json.dumps(report))


if __name__ == "__main__":
    main()
