"""Stage `evaluate`: every model of the run answers the held-out prompts, and the answers are scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.evaluation.config import EvaluateConfig
from minillm.run.stages.stage import RENDERING_SETTINGS, Stage
from minillm.teacher.config import teacher_label

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner

_ANSWER_SETTINGS = ("evaluate.", "data.", "rollout.stop", "teacher.")  # others decide what the models are


class Evaluate(Stage):
    name = "evaluate"
    fields = {"evaluate": (EvaluateConfig, EvaluateConfig(), "How the models of the run are compared.")}
    needs = ("minillm", "sft")
    reads = (
        "data.heldout",
        *RENDERING_SETTINGS,
        "evaluate",
        "rollout.stop",
        "student.source",
        "teacher.quantization",
    )
    engine = True
    keeps_work = True  # answers of models that are as they were
    response_section = "evaluate"

    def check_rows(self, run: Run) -> None:
        super().check_rows(run)
        _ = run.heldout_prompts

    def has_made_something(self, run_dir: Path) -> bool:
        return any((run_dir / "evaluate").glob("*"))

    def discard(self, run: Run, requested: bool) -> None:
        if requested:
            shutil.rmtree(run.dir / "evaluate", ignore_errors=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.evaluation()

    def run(self, run: Run) -> None:
        from minillm.data.files import write_json
        from minillm.evaluation.heldout import evaluate_heldout

        recipe, recorded = run.recipe, run.state.settings(self.name)
        untrained = "pruned" if recipe.student.source == "prune" else "student"
        teachers = {teacher_label(name): folder for name, folder in run.teachers.items()}
        models = {**teachers, untrained: run.start, **run.trained_by_label()}
        results = evaluate_heldout(
            run.dir / "evaluate",
            models,
            run.heldout_prompts,
            run.conventions,
            run.rollout(),
            recipe.evaluate,
            settings={key: value for key, value in recorded.items() if key.startswith(_ANSWER_SETTINGS)},
            teachers={name: each.quantization for name, each in recipe.teacher.by_name.items()},
        )
        write_json(run.dir / "results.json", results)
