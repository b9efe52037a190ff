"""Stage `finetune`: the teacher is fine-tuned on the references of the data before it teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.errors import InputError
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe

SFT_CURVES = (
    ("Loss, nats a token", {"loss": "cross-entropy"}),
    ("Gradient norm", {"grad_norm": "before clipping"}),
    ("Entropy, nats a token", {"entropy": "of the model"}),
)
SFT_WATCHED = {"loss": "its loss"}


class FineTune(Stage):
    name = "finetune"
    fields = {"finetune": (dict[str, Any], {}, "`transformers.TrainingArguments` of the finetune stage.")}
    needs = ("teacher",)
    reads = (*PROMPT_SETTINGS, "finetune", "responses.max_new_tokens", "seed")
    default = False
    training = "finetune"
    trains = "teacher"
    folder = "tuned"
    response_section = "responses"
    uses_trl = True
    curve_title = "Fine-tuning of the teacher (finetune)"
    curves = SFT_CURVES
    watched = SFT_WATCHED

    def trains_on_references(self, recipe: Recipe) -> bool:
        return True

    def refusal(self, recipe: Recipe, processes: int) -> str | None:
        if not recipe.teacher.several:
            return None
        return (
            "stages: finetune trains a single teacher: fine-tune each of several in a run of its own, and name the "
            "folders tuned/ of those runs as their sources"
        )

    def run(self, run: Run) -> None:
        from minillm.run.stages.shared import fine_tune

        if refusal := self.refusal(run.recipe, 1):  # asked for by --stage, without being listed
            raise InputError(refusal)
        fine_tune(run, self, source=run.untuned, target=run.teacher)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.supervised(self.name)
