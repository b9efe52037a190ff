"""Stage `pretrain`: the student is trained on text, with language modelling and the teacher's distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from minillm.config import Section
from minillm.errors import InputError
from minillm.evaluation.language_model_metrics import VALIDATION
from minillm.loss.config import DivergenceConfig
from minillm.run.stages.stage import Stage, teachers_in_words
from minillm.train.alpha import AlphaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe


def _from_number(given: Any) -> Any:
    return {"value": given} if isinstance(given, int | float) else given


class PretrainConfig(Section):
    """Pre-training against the teacher on `data.text`: L = (1−α)·L_lm + α·L_kd for each token."""

    alpha: Annotated[AlphaConfig, BeforeValidator(_from_number, AlphaConfig | float)] = AlphaConfig()
    """α and its schedule: a number, or a section. At 0 no teacher is loaded and no store is read."""
    divergence: DivergenceConfig = DivergenceConfig(name="forward_kl")
    """L_kd. With the `logits` stage it is `forward_kl`, whose gradient is that of the cross-entropy, or `mse`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher in L_kd. A store is of one temperature."""
    block: Annotated[int, Field(ge=2)] = 1024
    """Number of tokens in a block of text. Documents are packed into blocks and do not attend to each other."""
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of this stage; `lr_scheduler_type: warmup_stable_decay` is WSD.
    `per_device_train_batch_size` counts blocks."""


class Pretrain(Stage):
    name = "pretrain"
    fields = {"pretrain": (PretrainConfig, PretrainConfig(), "Training on text against the teacher.")}
    needs = ("student", "logits")
    reads = ("data.text", "pretrain", "student.lora", "student.dtype", "teacher.quantization", "seed")
    default = False
    training = "pretrain.training"
    trains = "student"
    validates_on = "data.heldout_text"
    validation_settings = ("data.heldout_text", "data.heldout_blocks")
    folder = "pretrained"
    label = "pretrained"
    curve_title = "Pre-training"
    curves = (
        ("Loss, nats a token", {"loss": "total", "cross_entropy": "language modelling"}),
        ("Forward KL, nats a token", {"forward_kl": "KL(p‖q)"}),
        ("Share of the teacher", {"alpha": "α"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
    )
    watched = {"eval_text_loss": "its loss on held-out text", "cross_entropy": "its cross-entropy"}

    def scores_with_teacher(self, recipe: Recipe) -> bool:
        return self.teacher_in_loss(recipe) and "logits" not in recipe.stages

    def teacher_in_loss(self, recipe: Recipe) -> bool:
        return recipe.pretrain.alpha.value > 0

    def measured(self) -> Mapping[str, bool | None]:
        return VALIDATION

    def validation_decides(self, recipe: Recipe) -> bool:
        return recipe.pretrain.alpha.until_passed or super().validation_decides(recipe)

    def longest_sequences(self, recipe: Recipe) -> list[tuple[str, int]]:
        block = recipe.pretrain.block
        return [(f"pretrain.block: {block} exceeds", block)]

    def refusal(self, recipe: Recipe, processes: int) -> str | None:
        from minillm.loss.config import BY_WEIGHTS, NOT_LINEAR

        settings = recipe.pretrain
        if recipe.data.text is None:
            return "stages: pretrain needs data.text, the text that the student is trained on"
        if recipe.teacher.several:
            return "stages: pretrain has a single teacher: text names none"
        validated = settings.training.get("eval_strategy", "no") != "no" and recipe.data.heldout_text is not None
        if settings.alpha.until_passed and not validated:
            return (
                "pretrain.alpha.until_passed compares the student's loss on held-out text with the teacher's: set "
                "data.heldout_text, and pretrain.training.eval_strategy: steps with eval_steps"
            )
        if "logits" in recipe.stages and settings.divergence.name not in BY_WEIGHTS:
            return (
                f"pretrain.divergence: {settings.divergence.name} with stage logits: {NOT_LINEAR} (leave the stage out)"
            )
        return None

    def check_rows(self, run: Run) -> None:
        _ = run.texts, run.heldout_texts

    def run(self, run: Run) -> None:
        from minillm.run.stages import shared
        from minillm.run.stages.logits import facts_of, store_folder
        from minillm.teacher.absent import NO_TEACHER
        from minillm.teacher.store import TargetStore
        from minillm.train.pretraining import PretrainingTrainer

        if refusal := self.refusal(run.recipe, 1):
            raise InputError(refusal)
        settings, recipe = run.recipe.pretrain, run.recipe
        arguments = shared.training_arguments(run, self)
        reads, stored = self.teacher_in_loss(recipe), "logits" in recipe.stages
        store = TargetStore(store_folder(run), facts_of(run)) if reads and stored else None
        passed = store is not None and settings.alpha.until_passed
        teacher_loss = shared.teacher_text_loss(run) if passed else None
        trainer = PretrainingTrainer(
            **shared.student_arguments(run, run.start, arguments),
            teacher=shared.supervised_teacher(run, arguments) if reads and not stored else NO_TEACHER,
            args=arguments,
            text_dataset=run.texts or [],
            block=settings.block,
            alpha=settings.alpha,
            divergence=settings.divergence,
            store=store,
            temperature=settings.temperature,
            rollout=run.rollout(),
            eval_dataset=run.heldout_texts,
            eval_blocks=recipe.data.heldout_blocks,
            teacher_loss=teacher_loss,
        )
        later = {"warmup", "sft", "minillm"} & set(recipe.stages)
        shared.train(run, self, trainer, run.pretrained, final=not later)

    def phases(self, planner: Planner) -> list[Phase]:
        from minillm.run.plan.pretraining import pretrain_phases

        return pretrain_phases(planner)

    def describe(self, recipe: Recipe) -> str:
        if not self.teacher_in_loss(recipe):
            return "trained on text"
        return f"trained on text against the distributions of {teachers_in_words(recipe)}"

    def tags(self, recipe: Recipe) -> list[str]:
        return ["distillation"] if self.teacher_in_loss(recipe) else []
