"""Stage `evaluate`: every model of the run answers the held-out prompts, and is scored on them and on held-out text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        "data.heldout_text",
        "data.heldout_blocks",
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
        _ = run.heldout_prompts, run.heldout_texts

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
            settings={key: value for key, value in recorded.items() if _decides_answers(key)},
            teachers={name: each.quantization for name, each in recipe.teacher.by_name.items()},
        )
        if run.heldout_texts is not None:
            results["text"] = self._on_text(run, models)
        write_json(run.dir / "results.json", results)

    def _on_text(self, run: Run, models: dict[str, str]) -> dict[str, Any]:
        """The models on held-out text; with several teachers none says what p is, because text names none."""
        from minillm.evaluation.heldout_text import evaluate_text
        from minillm.evaluation.language_model import heldout_blocks

        recipe, first = run.recipe, run.recipe.teacher.first
        block, limit = recipe.pretrain.block, recipe.data.heldout_blocks
        return evaluate_text(
            run.dir / "evaluate",
            models,
            heldout_blocks(run.heldout_texts or [], run.conventions.tokenizer, block, limit),
            run.conventions,
            teacher=None if recipe.teacher.several else run.teacher,
            quantization=None if recipe.teacher.several else first.quantization,
            bootstrap=recipe.evaluate.bootstrap,
        )


def _decides_answers(key: str) -> bool:
    return key.startswith(_ANSWER_SETTINGS) and not key.startswith("data.heldout_")
