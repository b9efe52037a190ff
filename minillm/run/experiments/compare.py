"""Comparison of several methods from one start: all are tuned alike on validation, trained with seeds, and tested once.

The runs are ordinary ones in subfolders of one directory. Finished stages are skipped, so that a comparison can be
interrupted at any time and continues.

    start/                 teacher, warmed-up student and the teacher's responses, which all methods share
    METHOD/tuning-N/       one tuning run
    METHOD/seed-N/         the best settings with another training seed (with the first seed it is the tuning run)
    METHOD/*.log           what a run printed, where several run at once (`jobs`)
    tests/                 answers and scores of the tested methods
    compare.json           the tuning runs, the chosen ones, and the results; report.html shows it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from minillm.run.processes import world_size
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import recipe_of
from minillm.run.runner import run_recipe
from minillm.run.stages import stage_named
from minillm.run.tree import merge

_Runs = Sequence[tuple[str, Recipe, Method]]
"""Runs with their names and methods."""


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run a comparison. What earlier calls have finished is not run again.

    Args:
        comparison: its settings.

    Returns:
        The results, as `compare.json` in the run directory keeps them.

    Raises:
        RecipeError: the settings of a method are wrong, or its tuning runs have no validation. All are checked before
            anything runs.
        DataError: a data file or a test set cannot be used.
        InputError: there are several processes.
        JobError: runs failed in processes of their own.
        Interrupted: after Ctrl-C; the same call continues.
    """
    if world_size() > 1:
        raise InputError(
            "a comparison runs in one process, because each of several would make all tests again: start it without "
            "accelerate launch"
        )
    run = _ComparisonRun(comparison)
    run.check()
    run_recipe(run.start.recipe)
    run.train(run.tuning_runs(tested=True))
    run.choose()
    run.train(run.seed_runs())
    run.test()
    run.train(run.tuning_runs(tested=False))
    run.save()
    return finite(run.results)


class _ComparisonRun:
    """A comparison in its run directory.

    Attributes:
        comparison: its settings.
        root: the run directory.
        start: the run of the stages that all methods share.
        tested: names of the tested methods. The baseline comes first, because a suite compares with its first model.
        tuned: the recipes of the tuning runs of each method.
        chosen: the number of the best tuning run of each tested method, once it is chosen.
        seeded: the recipes of each tested method with its other training seeds, once its tuning run is chosen.
        results: what is known so far.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.root = Path(comparison.recipe["run_dir"])
        shared = {"run_dir": str(self.root / "start"), "stages": comparison.start, "keep_checkpoint": False}
        recipe = recipe_of(merge(comparison.recipe, shared), "the shared recipe")
        if recipe.teacher.several:
            raise RecipeError("recipe.teacher: a comparison has one teacher for all methods: name one source")
        self.start = Run(recipe)
        names = [name for name, method in comparison.methods.items() if method.tested]
        self.tested = sorted(names, key=lambda name: name != comparison.baseline)
        self.tuned = {
            name: [self._recipe(name, tuning, method.seeds[0], f"tuning-{i}") for i, tuning in enumerate(method.tuning)]
            for name, method in comparison.methods.items()
        }
        self.chosen: dict[str, int] = {}
        self.seeded: dict[str, dict[int, Recipe]] = {}
        self.results: dict[str, Any] = {"tuning": {}}

    def _recipe(self, name: str, tuning: dict[str, Any], seed: int, folder: str) -> Recipe:
        """The recipe of one run of a method.

        It merges the shared recipe, the method's own settings, those that are tuned, and the results of the shared
        stages.
        """
        method, start = self.comparison.methods[name], self.start
        own = {
            "run_dir": str(self.root / name / folder),
            "seed": seed,
            "stages": [method.stage],
            "keep_checkpoint": False,  # of dozens of runs, none of which goes on for longer than the others
            "teacher": {"source": start.teacher, "adapter": None},
            "student": {"source": start.warmed},
            "responses": {"file": str(start.dir / "responses.jsonl")},
        }
        return recipe_of(merge(merge(merge(self.comparison.recipe, method.recipe), tuning), own), f"methods.{name}")

    def check(self) -> None:
        """Refuse what would only fail on validation or in the tests, after everything is trained.

        Raises:
            RecipeError: a method has several tuning runs, and no validation that chooses among them.
            DataError: a test set cannot be used, or no row of any has a reference.
            VocabularyError: the models and the teacher of the tests have different vocabularies.
        """
        for name, recipes in self.tuned.items():
            for recipe in recipes if len(recipes) > 1 else []:
                training = stage_named(self.comparison.methods[name].stage).arguments(recipe)
                if recipe.data.validation is None or training.get("eval_strategy", "no") == "no":
                    raise RecipeError(
                        f"methods.{name}: the best of {len(recipes)} tuning runs is chosen on validation: set "
                        "recipe.data.validation, and eval_strategy: steps where the method trains"
                    )
        suite = self.comparison.suite
        if suite.teacher is not None and Path(suite.teacher).resolve().is_relative_to(self.root.resolve()):
            suite = suite.model_copy(update={"teacher": None})  # the comparison makes it, so that it does not exist yet
        sets, _ = check_suite(suite, {"teacher": self.start.recipe.teacher.first.source})
        if not any(example.references for examples in sets.values() for example in examples):
            raise DataError(f"suite.sets: no row of {', '.join(sets)} has a reference to score answers by")

    def tuning_runs(self, *, tested: bool) -> _Runs:
        """The tuning runs of all methods that are tested, or of all others."""
        return [
            (f"{name}/tuning-{i}", recipe, method)
            for name, method in self.comparison.methods.items()
            if method.tested == tested
            for i, recipe in enumerate(self.tuned[name])
        ]

    def seed_runs(self) -> _Runs:
        """The runs of the tested methods with their other training seeds."""
        return [
            (f"{name}/seed-{seed}", recipe, self.comparison.methods[name])
            for name, recipes in self.seeded.items()
            for seed, recipe in recipes.items()
        ]

    def train(self, runs: _Runs) -> None:
        """Run those of the given runs that are not finished, and save the results after each.

        Raises:
            JobError: runs failed in processes of their own.
        """
        jobs = [
            Job(name, run_recipe, (recipe,), recipe.run_dir.with_suffix(".log"))
            for name, recipe, method in runs
            if not _finished(recipe, method)
        ]
        if self.comparison.jobs > 1:
            # The longest runs start first, so that none is waited for at the end.
            jobs.sort(key=lambda job: job.arguments[0].stages != ["minillm"])
        run_jobs(jobs, self.comparison.jobs, self.save)

    def choose(self) -> None:
        """Choose the best tuning run of each tested method, and make its recipes with the other training seeds."""
        for name in self.tested:
            method = self.comparison.methods[name]
            self.chosen[name] = best_outcome([_outcome(recipe, method) for recipe in self.tuned[name]])
            tuning = method.tuning[self.chosen[name]]
            self.seeded[name] = {seed: self._recipe(name, tuning, seed, f"seed-{seed}") for seed in method.seeds[1:]}

    def test(self) -> None:
        """Read the test sets with the tested methods, where all started, and the teacher; save their results.

        Raises:
            JobError: answers failed in processes of their own.
        """
        suite, jobs = self.comparison.suite, self.comparison.jobs
        students = {name: self._students(name) for name in self.tested}
        models = {
            f"{name}-{seed}": str(folder) for name, folders in students.items() for seed, folder in folders.items()
        }
        models |= {"start": self.start.warmed, "teacher": self.start.teacher}
        if jobs > 1:
            answering: list[Job] = []
            for name, folder in models.items():
                answering.append(Job(name, answer_suite, (suite, {name: folder}), suite.out / f"{name}.log"))
            run_jobs(answering, jobs)
        found = run_suite(suite, models)
        groups = {name: [f"{name}-{seed}" for seed in folders] for name, folders in students.items()}
        self.results |= {
            "tests": found,
            "methods": _over_training_seeds(found, students),
            "differences": pooled_differences(suite, groups),
            "machine": machine(),
            "settings": redacted(self.comparison.model_dump(mode="json")),
        }
        self.save()

    def _students(self, name: str) -> dict[int, Path]:
        """The folder of a tested method's student, for each training seed."""
        method = self.comparison.methods[name]
        recipes = {method.seeds[0]: self.tuned[name][self.chosen[name]], **self.seeded[name]}
        return {seed: recipe.run_dir / _folder(method) for seed, recipe in recipes.items()}

    def save(self) -> None:
        """Write what is known so far to `compare.json`, and its report."""
        self.results["tuning"] = self._tuning()
        if "warmup" in self.comparison.start:
            self.results["start"] = validation_summary(Path(self.start.warmed))
        write_json(self.root / "compare.json", self.results)
        write_comparison_report(self.root)

    def _tuning(self) -> dict[str, Any]:
        """The tuning of every method whose tuning runs are finished.

        It has the settings and the outcome of each run, which one is the best, and the outcomes with other seeds.
        """
        out: dict[str, Any] = {}
        for name, method in self.comparison.methods.items():
            recipes = self.tuned[name]
            if not all(_finished(recipe, method) for recipe in recipes):
                continue
            outcomes = [_outcome(recipe, method) for recipe in recipes]
            tried = [{"settings": tuning, **one} for tuning, one in zip(method.tuning, outcomes, strict=True)]
            out[name] = {"tried": tried, "chosen": best_outcome(outcomes)}
            others = [
                {"seed": seed, **_outcome(recipe, method)}
                for seed, recipe in self.seeded.get(name, {}).items()
                if _finished(recipe, method)
            ]
            if others:
                out[name]["other_seeds"] = others
        return out


def _folder(method: Method) -> str:
    """The folder of a run directory in which the method leaves its student."""
    return str(stage_named(method.stage).folder)


def _finished(recipe: Recipe, method: Method) -> bool:
    state = RunState(recipe)
    state.check(method.stage)
    return state.finished(method.stage)


def best_outcome(outcomes: Sequence[dict[str, Any]]) -> int:
    """Choose the run with the highest Rouge-L on validation; a run without validation is the worst.

    Args:
        outcomes: what `validation_summary` says of each run.

    Returns:
        The index of the best run.
    """
    return max(range(len(outcomes)), key=lambda i: -1.0 if outcomes[i]["rouge_l"] is None else outcomes[i]["rouge_l"])


def _outcome(recipe: Recipe, method: Method) -> dict[str, Any]:
    return {"run": str(recipe.run_dir), **validation_summary(recipe.run_dir / _folder(method))}


def validation_summary(folder: Path) -> dict[str, Any]:
    """Summarise the log of a finished run.

    Args:
        folder: the folder of the run's student, which holds `trainer_state.json`.

    Returns:
        `rouge_l` and `update`: the best Rouge-L on validation and the update that had it, None without validation;
        `curve`: all validations; `while_training`: the means of some metrics over the first and the last tenth of the
        updates.
    """
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    curve = [entry for entry in history if "eval_rouge_l" in entry]
    best = max(curve, key=lambda entry: entry["eval_rouge_l"], default={})
    scores = ("eval_rouge_l", "eval_reverse_kl", "eval_length", "step")
    updates = [entry for entry in history if "loss" in entry]
    tenth = -(-len(updates) // 10)
    means: dict[str, list[float]] = {}
    for key in ("entropy", "reverse_kl", "response_length"):
        values = [entry[key] for entry in updates if key in entry]
        if values:
            means[key] = [float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))]
    return {
        "rouge_l": best.get("eval_rouge_l"),
        "update": best.get("step"),
        "curve": [{key: entry[key] for key in scores if key in entry} for entry in curve],
        "while_training": means,
    }


def _over_training_seeds(found: dict[str, Any], students: dict[str, dict[int, Path]]) -> dict[str, Any]:
    """Statistics of the average Rouge-L on the tests over the training seeds of each method.

    Args:
        found: the results of the suite.
        students: the folders of the students, by method and training seed.

    Returns:
        For each method its `mean`, its standard deviation as `spread` (None with a single seed), and the values in the
        order of the seeds.
    """
    out = {}
    for name, folders in students.items():
        values = [found["models"][f"{name}-{seed}"]["average"]["rouge_l"]["mean"] for seed in folders]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[name] = {"mean": float(np.mean(values)), "spread": deviation, "by_training_seed": values}
    return out
