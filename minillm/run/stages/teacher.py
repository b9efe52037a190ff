"""Stage `teacher`: a teacher that is a GGUF file, or that has an adapter, is saved as a plain model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.run.stages.stage import Stage

if TYPE_CHECKING:
    from minillm.run.context import Run


class Teacher(Stage):
    name = "teacher"
    reads = ("teacher.source", "teacher.adapter")
    folder = "teacher"

    def run(self, run: Run) -> None:
        from minillm.models.adapters import merge_adapter
        from minillm.models.load import load_model

        if run.untuned == run.recipe.teacher.source:
            return  # it is a plain folder or hub id, which needs no copy
        model: Any = load_model(run.recipe.teacher.source)
        if run.recipe.teacher.adapter:
            model = merge_adapter(model, run.recipe.teacher.adapter)
        model.save_pretrained(run.untuned)
        run.conventions.tokenizer.save_pretrained(run.untuned)
