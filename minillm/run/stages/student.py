"""Stage `student`: if the recipe asks for it, the student is made: by depth pruning, or with random weights."""

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
    reads = (
        *PROMPT_SETTINGS,
        "student.source",
        "student.keep_layers",
        "student.probe_prompts",
        "student.like",
        "student.shape",
    )
    folder = "pruned"

    def settings_read(self, recipe: Recipe) -> set[str]:
        return super().settings_read(recipe) | ({"seed"} if recipe.student.source == "config" else set())

    def check_models(self, recipe: Recipe) -> None:
        from minillm.models.configs import read_config
        from minillm.models.pruning.depth import check_keep_layers, check_prunable

        if recipe.student.source == "prune" and recipe.student.keep_layers is not None:
            config = read_config(recipe.teacher.first.source)
            check_keep_layers(config.get_text_config().num_hidden_layers, recipe.student.keep_layers)
            check_prunable(config)
        if recipe.student.source == "config":
            _random_config(recipe)

    def run(self, run: Run) -> None:
        if run.recipe.student.source == "config":
            _initialise(run)
        elif run.recipe.student.source == "prune" and run.recipe.student.keep_layers is not None:
            self._prune(run, run.recipe.student.keep_layers)

    def _prune(self, run: Run, keep_layers: int) -> None:
        import torch

        from minillm.models.device import device, working_dtype
        from minillm.models.load import load_model
        from minillm.models.pruning.apply import prune
        from minillm.models.pruning.depth import block_similarity, layers_to_keep
        from minillm.run.processes import print_progress

        teacher: Any = load_model(run.teacher, working_dtype())
        prompts = run.train_prompts[: run.recipe.student.probe_prompts]
        similarity = block_similarity(teacher.to(device()), [prompt.ids for prompt in prompts])
        kept = layers_to_keep(similarity, keep_layers)
        prune(teacher.to(torch.bfloat16), kept).save_pretrained(run.start)
        run.conventions.tokenizer.save_pretrained(run.start)
        notes = {"kept": kept, "block_similarity": [round(float(x), 4) for x in similarity]}
        (Path(run.start) / "pruning.json").write_text(json.dumps(notes), encoding="utf-8")
        dropped = sorted(set(range(len(similarity))) - set(kept))
        print_progress(f"  of {len(similarity)} layers, dropped {dropped}")


def _random_config(recipe: Recipe) -> Any:
    """The config of a student with random weights, of the teacher's vocabulary."""
    from minillm.models.configs import read_config, text_config
    from minillm.models.initialise import config_like

    student, teacher = recipe.student, recipe.teacher.first.source
    return config_like(read_config(student.model_like(teacher)), student.shape, text_config(teacher).vocab_size)


def _initialise(run: Run) -> None:
    """Make the student with random weights, and the teacher's tokenizer beside it."""
    from minillm.models.initialise import random_model
    from minillm.run.processes import print_progress

    model = random_model(_random_config(run.recipe), run.recipe.seed)
    run.conventions.write_to(model)
    model.save_pretrained(run.start)
    run.conventions.tokenizer.save_pretrained(run.start)
    print_progress(f"  {type(model).__name__} with {model.num_parameters() / 1e6:.1f} million random weights")
