"""Several methods from one start: tuned on validation alike, trained with their seeds, tested once.

Everything is made of ordinary runs below one directory, whose finished stages are skipped: a comparison can be stopped
anywhere and goes on.

    start/                 teacher, healed student, teacher's answers: shared
    METHOD/tuning-N/       one tuning run
    METHOD/seed-N/         the best of them with every training seed (the first seed's run is the tuning run itself)
    METHOD/*.log           what a run printed, where `jobs` run at once
    tests/                 answers and scores of the tested methods
    compare.json           what was tuned, what was chosen, and the results; report.html shows it
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data.files import finite, write_json
from minillm.errors import DataError, InputError, RecipeError
from minillm.evaluation.report.comparison import write_comparison_report
from minillm.evaluation.sets import check_suite
from minillm.evaluation.suite import answer_suite, pooled_differences, run_suite
from minillm.models.device import machine
from minillm.redaction import redacted
from minillm.run.context import Run
from minillm.run.directory import RunState
from minillm.run.experiments.config import Comparison, Method
from minillm.run.experiments.jobs import Job, run_jobs
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import recipe_of
from minillm.run.runner import run_recipe
from minillm.run.stages import stage_named
from minillm.run.tree import merge


def _folder(method: Method) -> str:
    """The folder of a run directory in which the method leaves its student."""
    return str(stage_named(method.stage).folder)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Do what is left of a comparison; returns and keeps its results (`compare.json`).

    Raises:
        RecipeError: a method's settings are wrong; all are checked before anything runs.
        ValueError: under several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "a comparison runs in one process, whose tests each of several would make again: start it without accelerate launch"
        )
    root, suite = Path(comparison.recipe["run_dir"]), comparison.suite
    shared = {"run_dir": str(root / "start"), "stages": comparison.start}
    start = Run(recipe_of(merge(comparison.recipe, shared), "the shared recipe"))
    plans = {
        name: [_recipe(comparison, start, name, tuning, method.seeds[0], f"tuning-{i}") for i, tuning in enumerate(method.tuning)]
        for name, method in comparison.methods.items()
    }  # fmt: skip
    _check(comparison, start, plans)
    run_recipe(start.recipe)
    methods, tested = comparison.methods, _tested(comparison)
    results: dict[str, Any] = {"tuning": {}}
    seeded: dict[str, dict[int, Recipe]] = {}

    def keep() -> None:
        """What is known so far, and the report of it."""
        results["tuning"] = _tuned(comparison, plans, seeded)
        if "warmup" in comparison.start:
            results["start"] = _validated(Path(start.warmed))
        write_json(root / "compare.json", results)
        write_comparison_report(root)

    tuning = {
        name: [(f"{name}/tuning-{i}", plan, methods[name]) for i, plan in enumerate(plans[name])] for name in methods
    }
    _train([run for name in methods if name in tested for run in tuning[name]], comparison.jobs, keep)
    chosen = {name: _best(_tried(methods[name], plans[name])) for name in tested}
    seeded |= {
        name: {
            seed: _recipe(comparison, start, name, methods[name].tuning[chosen[name]], seed, f"seed-{seed}")
            for seed in methods[name].seeds[1:]
        }
        for name in tested
    }  # fmt: skip
    others = [
        (f"{name}/seed-{seed}", plan, methods[name]) for name, some in seeded.items() for seed, plan in some.items()
    ]
    _train(others, comparison.jobs, keep)
    folders = {
        name: {
            seed: plan.run_dir / _folder(methods[name])
            for seed, plan in {methods[name].seeds[0]: plans[name][chosen[name]], **seeded[name]}.items()
        }
        for name in tested
    }  # fmt: skip
    models = {f"{name}-{seed}": str(folder) for name, some in folders.items() for seed, folder in some.items()}
    models |= {"start": start.warmed, "teacher": start.teacher}
    if comparison.jobs > 1:
        run_jobs(
            [
                Job(name, answer_suite, (suite, {name: folder}), suite.out / f"{name}.log")
                for name, folder in models.items()
            ],
            comparison.jobs,
        )
    found = run_suite(suite, models)
    results |= {
        "tests": found, "methods": _over_training_seeds(found, folders),
        "differences": pooled_differences(suite, {name: [f"{name}-{seed}" for seed in some] for name, some in folders.items()}),
        "machine": machine(), "settings": redacted(comparison.model_dump(mode="json")),
    }  # fmt: skip
    keep()
    _train([run for name in methods if name not in tested for run in tuning[name]], comparison.jobs, keep)
    keep()
    return finite(results)


def _check(comparison: Comparison, start: Run, plans: dict[str, list[Recipe]]) -> None:
    """Refuse what could not be chosen on validation, or tested, once everything is trained.

    Raises:
        RecipeError: several tuning runs, and nothing to choose among them by.
        DataError, VocabularyError: the test sets and the teacher of the tests, as `check_suite`; no set has a reference.
    """
    for name, tried in plans.items():
        for plan in tried if len(tried) > 1 else []:
            training = stage_named(comparison.methods[name].stage).arguments(plan)
            if plan.data.validation is None or training.get("eval_strategy", "no") == "no":
                raise RecipeError(
                    f"methods.{name}: the best of {len(tried)} tuning runs is chosen on validation: set recipe.data.validation, and "
                    "eval_strategy: steps where the method trains"
                )
    suite = comparison.suite
    if suite.teacher is not None and Path(suite.teacher).resolve().is_relative_to(start.dir.parent.resolve()):
        suite = suite.model_copy(update={"teacher": None})  # one that the comparison makes: it is not there yet
    sets, _ = check_suite(suite, {"teacher": start.recipe.teacher.source})
    if not any(example.references for examples in sets.values() for example in examples):
        raise DataError(f"suite.sets: no row of {', '.join(sets)} has a reference to score answers by")


def _tested(comparison: Comparison) -> list[str]:
    """The baseline first: a suite compares with its first model."""
    names = [name for name, method in comparison.methods.items() if method.tested]
    return sorted(names, key=lambda name: name != comparison.baseline)


def _recipe(comparison: Comparison, start: Run, name: str, tuning: dict[str, Any], seed: int, folder: str) -> Recipe:
    """A method's run: the shared settings, its own, those that are tried, and what the shared stages leave."""
    method = comparison.methods[name]
    own = {
        "run_dir": str(start.dir.parent / name / folder), "seed": seed, "stages": [method.stage],
        "teacher": {"source": start.teacher, "adapter": None},
        "student": {"source": start.warmed}, "responses": {"file": str(start.dir / "responses.jsonl")},
    }  # fmt: skip
    return recipe_of(merge(merge(merge(comparison.recipe, method.recipe), tuning), own), f"methods.{name}")


def _train(runs: Sequence[tuple[str, Recipe, Method]], at_once: int, after: Callable[[], object]) -> None:
    """Do what is left of some runs."""
    left = [
        Job(name, run_recipe, (plan,), plan.run_dir.with_suffix(".log"))
        for name, plan, method in runs
        if not _finished(plan, method)
    ]
    if at_once > 1:
        left.sort(
            key=lambda job: job.arguments[0].stages != ["minillm"]
        )  # the longest first, that none is waited for at the end
    run_jobs(left, at_once, after)


def _finished(plan: Recipe, method: Method) -> bool:
    state = RunState(plan)
    state.check(method.stage)
    return state.finished(method.stage)


def _tuned(
    comparison: Comparison, plans: dict[str, list[Recipe]], seeded: dict[str, dict[int, Recipe]]
) -> dict[str, Any]:
    """Of every method whose tuning is finished: what was tried, which was best, and what that came to with other seeds."""
    out = {}
    for name, method in comparison.methods.items():
        if all(_finished(plan, method) for plan in plans[name]):
            tried = _tried(method, plans[name])
            out[name] = {
                "tried": [{"settings": tuning, **one} for tuning, one in zip(method.tuning, tried, strict=True)], "chosen": _best(tried)
            }  # fmt: skip
            others = {seed: plan for seed, plan in seeded.get(name, {}).items() if _finished(plan, method)}
            if others:
                out[name]["other_seeds"] = [{"seed": seed, **_outcome(plan, method)} for seed, plan in others.items()]
    return out


def _tried(method: Method, plans: Sequence[Recipe]) -> list[dict[str, Any]]:
    return [_outcome(plan, method) for plan in plans]


def _best(tried: Sequence[dict[str, Any]]) -> int:
    return max(range(len(tried)), key=lambda i: -1.0 if tried[i]["rouge_l"] is None else tried[i]["rouge_l"])


def _outcome(plan: Recipe, method: Method) -> dict[str, Any]:
    return {"run": str(plan.run_dir), **_validated(plan.run_dir / _folder(method))}


def _validated(folder: Path) -> dict[str, Any]:
    """What a finished run logged: its scores on validation, the best of them (None without validation), and what some means were at its
    two ends (a tenth each)."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    curve = [entry for entry in history if "eval_rouge_l" in entry]
    best = max(curve, key=lambda entry: entry["eval_rouge_l"], default={})
    scores = ("eval_rouge_l", "eval_reverse_kl", "eval_length", "step")
    updates = [entry for entry in history if "loss" in entry]
    n = -(-len(updates) // 10)
    ends: dict[str, list[float]] = {}
    for key in ("entropy", "reverse_kl", "response_length"):
        values = [entry[key] for entry in updates if key in entry]
        if values:
            ends[key] = [float(np.mean(values[:n])), float(np.mean(values[-n:]))]
    return {
        "rouge_l": best.get("eval_rouge_l"), "update": best.get("step"),
        "curve": [{key: entry[key] for key in scores if key in entry} for entry in curve], "while_training": ends,
    }  # fmt: skip


def _over_training_seeds(found: dict[str, Any], tested: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Mean and spread (one standard deviation; None of a single one) of the average Rouge-L over a method's training seeds."""
    out = {}
    for name, folders in tested.items():
        values = [found["models"][f"{name}-{seed}"]["average"]["rouge_l"]["mean"] for seed in folders]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[name] = {"mean": float(np.mean(values)), "spread": spread, "by_training_seed": values}
    return out
