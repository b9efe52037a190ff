"""Stage `evaluate`: every model of the run answers the held-out prompts, and the answers are scored."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from minillm.evaluation.config import EvaluateConfig
from minillm.run.stages.stage import RENDERING_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner


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
    response_section = "evaluate"

    def check_rows(self, run: Run) -> None:
        super().check_rows(run)
        _ = run.heldout_prompts

    def discard(self, run: Run, requested: bool) -> None:
        if requested:
            shutil.rmtree(run.dir / "evaluate", ignore_errors=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.evaluation()

    def run(self, run: Run) -> None:
        from minillm.evaluation.heldout import TEACHER, evaluate_heldout

        recipe = run.recipe
        untrained = "pruned" if recipe.student.source == "prune" else "student"
        models = {TEACHER: run.teacher, untrained: run.start, **run.trained_by_label()}
        evaluate_heldout(
            run.dir,
            models,
            run.heldout_prompts,
            run.conventions,
            run.rollout(),
            recipe.evaluate,
            recorded=run.state.settings(self.name),
            quantization=recipe.teacher.quantization,
        )
