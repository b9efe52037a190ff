"""Stage `warmup`: the student is trained on given answers, with cross-entropy, a divergence to the teacher, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from minillm.config import Section, Share
from minillm.loss.config import DivergenceConfig
from minillm.run.stages.stage import PROMPT_SETTINGS, Stage, describe_supervised

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe


class WarmupConfig(Section):
    """Supervised distillation on given answers, before the student's own samples are good enough to learn from."""

    cross_entropy: Share = 0.5
    """λ in λ·CE + (1−λ)·D on given answers. The word-level KD of the paper uses 0.5; 1 is fine-tuning."""
    divergence: DivergenceConfig = DivergenceConfig(name="forward_kl")
    """D: the name of a divergence, or a section with its name and parameters."""
    targets: Literal["teacher", "references"] = "teacher"
    """`teacher`: answers of the teacher (SeqKD). `references`: the answers in the data (SFT, word-level KD)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher in D."""
    cross_entropy_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the student's logits in the cross-entropy. With 1, it fits the student's own distribution."""
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of this stage."""


class Warmup(Stage):
    name = "warmup"
    fields = {"warmup": (WarmupConfig, WarmupConfig(), "Supervised distillation before the minillm stage.")}
    needs = ("pretrain", "responses")
    reads = (
        *PROMPT_SETTINGS,
        "warmup",
        "responses",
        "student.lora",
        "student.dtype",
        "teacher.quantization",
        "seed",
    )
    training = "warmup.training"
    trains = "student"
    folder = "warmed"
    label = "warmed"
    response_section = "responses"
    curve_title = "Warm-up"
    curves = (
        ("Forward KL, nats a token", {"forward_kl": "KL(p‖q)"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
    )
    watched = {
        "eval_reverse_kl": "KL(q‖p) of the validation",
        "watched_reverse_kl": "KL(q‖p) on some of its own training rows",
        "loss": "its loss",
    }

    def trains_on_references(self, recipe: Recipe) -> bool:
        return recipe.warmup.targets == "references"

    def teacher_in_loss(self, recipe: Recipe) -> bool:
        return recipe.warmup.cross_entropy < 1

    def check_rows(self, run: Run) -> None:
        super().check_rows(run)
        if run.recipe.responses.file is not None and not self.trains_on_references(run.recipe):
            _ = run.answer_rows

    def run(self, run: Run) -> None:
        from minillm.run.stages import shared
        from minillm.train.supervised import SupervisedTrainer

        settings, recipe = run.recipe.warmup, run.recipe
        arguments = shared.training_arguments(run, self)
        rows = run.references if settings.targets == "references" else run.answer_rows
        trainer = SupervisedTrainer(
            **shared.student_arguments(run, run.pretrained, arguments),
            teacher=shared.supervised_teacher(run, arguments),
            args=arguments,
            shard_teacher=recipe.teacher.first.shard,
            train_dataset=rows,
            cross_entropy=settings.cross_entropy,
            divergence=settings.divergence,
            temperature=settings.temperature,
            rollout=run.rollout(),
            cross_entropy_temperature=settings.cross_entropy_temperature,
            eval_dataset=run.validation,
        )
        if settings.cross_entropy < 1:
            shared.watch_rows(self, trainer, rows)
        shared.train(run, self, trainer, run.warmed, final="minillm" not in recipe.stages)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.supervised(self.name)

    def describe(self, recipe: Recipe) -> str:
        return describe_supervised(recipe, self.name)

    def tags(self, recipe: Recipe) -> list[str]:
        fine_tuned = recipe.warmup.cross_entropy == 1 and recipe.warmup.targets == "references"
        return ["sft"] if fine_tuned else ["distillation"]
