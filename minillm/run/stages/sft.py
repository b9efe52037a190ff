"""Stage `sft`: the student is fine-tuned on the references of the data, the baseline of supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.run.stages.finetune import SFT_CURVES, SFT_WATCHED
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage, describe_supervised

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe


class SFT(Stage):
    name = "sft"
    fields = {"sft": (dict[str, Any], {}, "`transformers.TrainingArguments` of the sft stage.")}
    needs = ("pretrain",)
    reads = (*PROMPT_SETTINGS, "sft", "responses.max_new_tokens", "student.lora", "student.dtype", "seed")
    default = False
    training = "sft"
    trains = "student"
    folder = "sft"
    label = "sft"
    response_section = "responses"
    uses_trl = True
    curve_title = "Fine-tuning of the student (sft)"
    curves = SFT_CURVES
    watched = {"eval_reverse_kl": "KL(q‖p) of the validation", **SFT_WATCHED}

    def trains_on_references(self, recipe: Recipe) -> bool:
        return True

    def run(self, run: Run) -> None:
        from minillm.run.stages.shared import fine_tune

        fine_tune(run, self, source=run.pretrained, target=run.fine_tuned)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.supervised(self.name)

    def describe(self, recipe: Recipe) -> str:
        return describe_supervised(recipe, self.name)

    def tags(self, recipe: Recipe) -> list[str]:
        return ["sft"]
