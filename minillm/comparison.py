"""Several methods from one start: tuned on validation alike, trained with their seeds, tested once.

Everything is made of ordinary runs below one directory, whose finished stages are skipped: a comparison can be stopped
anywhere and goes on.

    start/                 teacher, healed student, teacher's answers: shared
    METHOD/tuning-N/       one tuning run
    METHOD/seed-N/         the best of them with every training seed (the first seed's run is the tuning run itself)
    tests/                 answers and scores of the tested methods
    compare.json           what was tuned, what was chosen, and the results; report.html shows it
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from minillm import stages
from minillm.hardware import machine
from minillm.recipe import Comparison, Method, Recipe, Suite
from minillm.recipe_file import merge, recipe_of
from minillm.report import write_comparison_report
from minillm.suite import run_suite

_FOLDERS = {"warmup": "warmed", "sft": "sft", "minillm": "student"}


def compare(comparison: Comparison) -> dict[str, Any]:
    """Do what is left of a comparison; returns and keeps its results (`compare.json`).

    Raises:
        RecipeError: a method's settings are wrong; all are checked before anything runs.
        ValueError: under several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "a comparison runs in one process, whose tests each of several would make again: start it without accelerate launch"
        )
    root = Path(comparison.recipe["run_dir"])
    suite = Suite.model_validate({**comparison.suite, "out": root / "tests"})
    shared = {"run_dir": str(root / "start"), "stages": comparison.start}
    start = stages.Run(recipe_of(merge(comparison.recipe, shared), "the shared recipe"))
    plans = {
        name: [_recipe(comparison, start, name, tuning, method.seeds[0], f"tuning-{i}") for i, tuning in enumerate(method.tuning)]
        for name, method in comparison.methods.items()
    }  # fmt: skip
    stages.run(start.recipe)
    tuned: dict[str, Any] = {}
    runs: dict[str, dict[int, Path]] = {}
    for name, method in comparison.methods.items():
        tried = [{"settings": tuning, **_trained(plan, method)} for tuning, plan in zip(method.tuning, plans[name], strict=True)]
        best = max(range(len(tried)), key=lambda i: tried[i]["rouge_l"])
        tuned[name] = {"tried": tried, "chosen": best}
        _keep(root, {"tuning": tuned})
        runs[name] = {method.seeds[0]: plans[name][best].run_dir / _FOLDERS[method.stage]}
        for seed in method.seeds[1:]:
            plan = _recipe(comparison, start, name, method.tuning[best], seed, f"seed-{seed}")
            tuned[name].setdefault("other_seeds", []).append({"seed": seed, **_trained(plan, method)})
            runs[name][seed] = plan.run_dir / _FOLDERS[method.stage]
    tested = {name: runs[name] for name in _tested(comparison)}
    models = {f"{name}-{seed}": str(folder) for name, folders in tested.items() for seed, folder in folders.items()}
    models |= {"start": start.warmed, "teacher": start.teacher}
    found = run_suite(suite, models)
    results = {
        "tuning": tuned, "tests": found, "methods": _over_training_seeds(found, tested), "machine": machine(),
        "settings": comparison.model_dump(mode="json"),
    }  # fmt: skip
    _keep(root, results)
    return results


def _keep(root: Path, results: dict[str, Any]) -> None:
    """What is known so far, and the report of it."""
    (root / "compare.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_comparison_report(root)


def _tested(comparison: Comparison) -> list[str]:
    """The baseline first: a suite compares with its first model."""
    names = [name for name, method in comparison.methods.items() if method.tested]
    return sorted(names, key=lambda name: name != comparison.baseline)


def _recipe(comparison: Comparison, start: stages.Run, name: str, tuning: dict[str, Any], seed: int, folder: str) -> Recipe:
    """A method's run: the shared settings, its own, those that are tried, and what the shared stages leave."""
    method = comparison.methods[name]
    own = {
        "run_dir": str(start.dir.parent / name / folder), "seed": seed, "stages": [method.stage], "teacher": {"source": start.teacher},
        "student": {"source": start.warmed}, "responses": {"file": str(start.dir / "responses.jsonl")},
    }  # fmt: skip
    return recipe_of(merge(merge(merge(comparison.recipe, method.recipe), tuning), own), f"methods.{name}")


def _trained(plan: Recipe, method: Method) -> dict[str, Any]:
    """Run what is left of a method's recipe; its best scores on validation."""
    stages.run(plan)
    state = json.loads((plan.run_dir / _FOLDERS[method.stage] / "trainer_state.json").read_text(encoding="utf-8"))
    curve = [entry for entry in state["log_history"] if "eval_rouge_l" in entry]
    best = max(curve, key=lambda entry: entry["eval_rouge_l"], default={})
    keys = ("eval_rouge_l", "eval_reverse_kl", "step")
    return {"run": str(plan.run_dir), "rouge_l": best.get("eval_rouge_l", float("nan")), "update": best.get("step"), "curve": [
        {key: entry[key] for key in keys if key in entry} for entry in curve
    ]}  # fmt: skip


def _over_training_seeds(found: dict[str, Any], tested: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Mean and spread of the average Rouge-L over a method's training seeds."""
    out = {}
    for name, folders in tested.items():
        values = [found["models"][f"{name}-{seed}"]["average"]["rouge_l"]["mean"] for seed in folders]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[name] = {"mean": float(np.mean(values)), "spread": spread, "by_training_seed": values}
    return out
