"""Stage `teacher`: a teacher that is a GGUF file, or that has an adapter, is saved as a plain model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.run.stages.stage import Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe


class Teacher(Stage):
    name = "teacher"
    reads = ("teacher.source", "teacher.adapter")
    folder = "teacher"

    def check_models(self, recipe: Recipe) -> None:
        from minillm.models.adapters import check_adapter_files

        teacher = recipe.teacher.first  # several have no adapters
        if teacher.adapter:
            check_adapter_files(teacher.source, teacher.adapter)

    def check_rows(self, run: Run) -> None:
        """The stage reads no rows."""

    def run(self, run: Run) -> None:
        from minillm.models.adapters import merge_adapter
        from minillm.models.load import load_model
        from minillm.models.sources import find_gguf
        from minillm.run.processes import print_progress

        teacher = run.recipe.teacher.first
        if run.untuned == teacher.source:
            return  # it is a plain folder or hub id, as every one of several teachers is, and needs no copy
        file = find_gguf(teacher.source)
        if file is not None:
            size = file.stat().st_size / 1e6
            print_progress(f"  {file.name}, {size:.0f} MB: the vocabulary is read, then the weights are dequantised")
        model: Any = load_model(teacher.source)
        if teacher.adapter:
            model = merge_adapter(model, teacher.adapter)
        model.save_pretrained(run.untuned)
        run.conventions.tokenizer.save_pretrained(run.untuned)
