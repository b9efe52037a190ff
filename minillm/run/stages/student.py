"""Stage `student`: if the recipe asks for it, the student is made from the teacher by depth pruning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.recipe import Recipe


class Student(Stage):
    name = "student"
    needs = ("finetune",)
    reads = (*PROMPT_SETTINGS, "student.source", "student.keep_layers", "student.probe_prompts")
    folder = "pruned"

    def check_models(self, recipe: Recipe) -> None:
        from minillm.models.configs import read_config
        from minillm.models.pruning.depth import check_keep_layers, check_prunable

        if recipe.student.source == "prune" and recipe.student.keep_layers is not None:
            config = read_config(recipe.teacher.first.source)
            check_keep_layers(config.get_text_config().num_hidden_layers, recipe.student.keep_layers)
            check_prunable(config)

    def run(self, run: Run) -> None:
        import torch

        from minillm.models.device import device, working_dtype
        from minillm.models.load import load_model
        from minillm.models.pruning.apply import prune
        from minillm.models.pruning.depth import block_similarity, layers_to_keep
        from minillm.run.processes import print_progress

        settings = run.recipe.student
        if settings.source != "prune" or settings.keep_layers is None:
            return
        teacher: Any = load_model(run.teacher, working_dtype())
        prompts = run.train_prompts[: settings.probe_prompts]
        similarity = block_similarity(teacher.to(device()), [prompt.ids for prompt in prompts])
        kept = layers_to_keep(similarity, settings.keep_layers)
        prune(teacher.to(torch.bfloat16), kept).save_pretrained(run.start)
        run.conventions.tokenizer.save_pretrained(run.start)
        notes = {"kept": kept, "block_similarity": [round(float(x), 4) for x in similarity]}
        (Path(run.start) / "pruning.json").write_text(json.dumps(notes), encoding="utf-8")
        dropped = sorted(set(range(len(similarity))) - set(kept))
        print_progress(f"  of {len(similarity)} layers, dropped {dropped}")
