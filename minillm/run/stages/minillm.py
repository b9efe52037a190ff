"""Stage `minillm`: the student is trained on its own samples by minimising the reverse KL to the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from minillm.run.stages.stage import PROMPT_SETTINGS, Stage, teachers_in_words
from minillm.train.checks import update_size_fault

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe
    from minillm.train.on_policy import MiniLLMTrainer


class MiniLLM(Stage):
    name = "minillm"
    fields = {
        "training": (dict[str, Any], {}, "`transformers.TrainingArguments` of the minillm stage."),
        "log_samples": (
            Annotated[int, Field(ge=0)],
            10,
            "Every how many updates a few of the sampled responses are written, token by token, to `samples.jsonl` of "
            "the run directory and to the trackers of `training.report_to`; 0 for never.",
        ),
    }
    needs = ("warmup",)
    reads = (
        *PROMPT_SETTINGS,
        "data.text",
        "objective",
        "rollout",
        "training",
        "student.lora",
        "student.dtype",
        "teacher.quantization",
        "teacher.top_k",
        "seed",
    )
    training = "training"
    trains = "student"
    folder = "student"
    label = "minillm"
    engine = True
    response_section = "rollout"
    curve_title = "On-policy training (minillm)"
    curves = (
        ("Loss", {"loss": "total", "policy_loss": "long term", "single_step_loss": "single step"}),
        ("Reverse KL, nats a token", {"reverse_kl": "exact", "sampled_reverse_kl": "sampled"}),
        ("Response length, tokens", {"response_length": "mixture samples"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
        ("Importance weights", {"importance_weight": "mean weight", "clipped": "share clipped"}),
        ("Engine against trainer, nats", {"engine_mismatch": "mean |difference| of log q"}),
    )
    watched = {
        "eval_reverse_kl": "KL(q‖p) of the validation",
        "reverse_kl": "KL(q‖p) of its responses",
    }

    def trains_on_references(self, recipe: Recipe) -> bool:
        return recipe.rollout.on_policy < 1

    def longest_sequences(self, recipe: Recipe) -> list[tuple[str, int]]:
        found, block = super().longest_sequences(recipe), recipe.objective.language_model_block
        if recipe.data.text is not None:
            found.append((f"objective.language_model_block: {block} exceeds", block))
        return found

    def refusal(self, recipe: Recipe, processes: int) -> str | None:
        from minillm.run.training_arguments import update_sizes

        micro_batch, accumulation = update_sizes(recipe.training, processes)
        return update_size_fault(recipe.rollout, micro_batch * accumulation * processes, processes)

    def check_rows(self, run: Run) -> None:
        super().check_rows(run)
        _ = run.texts

    def run(self, run: Run) -> None:
        from minillm.run.progress import SAMPLES
        from minillm.run.stages import shared
        from minillm.train.samples import SampleLog

        trainer = self.trainer(run, shared.training_arguments(run, self))
        if run.recipe.log_samples:
            trainer.add_callback(SampleLog(trainer, run.dir / SAMPLES, run.recipe.log_samples))
        shared.train(run, self, trainer, run.student, final=True)

    def trainer(self, run: Run, arguments: TrainingArguments) -> MiniLLMTrainer:
        """The trainer of the stage; `minillm verify` makes one too."""
        from minillm.data.lazy import mapped
        from minillm.run.stages import shared
        from minillm.train.on_policy import MiniLLMTrainer

        recipe, rollout = run.recipe, run.rollout()
        return MiniLLMTrainer(
            **shared.student_arguments(run, run.warmed, arguments),
            teacher=shared.on_policy_teacher(run, arguments),
            args=arguments,
            objective=recipe.objective,
            shard_teacher=recipe.teacher.first.shard,
            rollout=rollout,
            train_dataset=mapped(run.train_prompts, run.prompt_row),
            eval_dataset=run.validation,
            text_dataset=run.texts,
            responses=run.references if rollout.on_policy < 1 else None,
        )

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.on_policy()

    def describe(self, recipe: Recipe) -> str:
        teacher, name = teachers_in_words(recipe), recipe.objective.divergence.name
        source = " (MiniLLM, [arXiv 2306.08543](https://arxiv.org/abs/2306.08543))" if name == "reverse_kl" else ""
        what = "the reverse KL divergence" if name == "reverse_kl" else name.replace("_", " ")
        return f"distilled from {teacher} by minimising {what} on its own samples{source}"

    def tags(self, recipe: Recipe) -> list[str]:
        return ["distillation", recipe.objective.divergence.name.replace("_", "-")]
