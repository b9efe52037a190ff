"""Stage `minillm`: the student is trained on its own samples by minimising the reverse KL to the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from minillm.run.stages.stage import PROMPT_SETTINGS, Stage

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe


class MiniLLM(Stage):
    name = "minillm"
    fields = {"training": (dict[str, Any], {}, "`transformers.TrainingArguments` of the minillm stage.")}
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
    curve_title = "On-policy training (minillm)"
    curves = (
        ("Loss", {"loss": "total", "policy_loss": "long term", "single_step_loss": "single step"}),
        ("Reverse KL, nats a token", {"reverse_kl": "exact", "sampled_reverse_kl": "sampled"}),
        ("Response length, tokens", {"response_length": "mixture samples"}),
        ("Gradient norm", {"grad_norm": "before clipping"}),
        ("Importance weights", {"importance_weight": "mean weight", "clipped": "share clipped"}),
        ("Engine against trainer, nats", {"engine_mismatch": "mean |difference| of log q"}),
    )

    def run(self, run: Run) -> None:
        from minillm.run.stages import shared
        from minillm.train.on_policy import MiniLLMTrainer

        recipe, rollout = run.recipe, run.rollout()
        arguments = shared.training_arguments(run, self)
        trainer = MiniLLMTrainer(
            **shared.student_arguments(run, run.warmed, arguments),
            teacher=shared.served_teacher(run) or shared.load_scoring_teacher(run, arguments),
            args=arguments,
            objective=recipe.objective,
            shard_teacher=recipe.teacher.shard,
            rollout=rollout,
            train_dataset=[{"prompt_ids": prompt.ids} for prompt in run.train_prompts],
            eval_dataset=run.validation,
            text_dataset=_texts(recipe),
            responses=run.references if rollout.on_policy < 1 else None,
        )
        shared.train(run, self, trainer, run.student, final=True)

    def phases(self, planner: Planner) -> list[Phase]:
        return planner.on_policy()

    def describe(self, recipe: Recipe) -> str:
        teacher, name = f"`{recipe.teacher.source}`", recipe.objective.divergence.name
        source = " (MiniLLM, [arXiv 2306.08543](https://arxiv.org/abs/2306.08543))" if name == "reverse_kl" else ""
        what = "the reverse KL divergence" if name == "reverse_kl" else name.replace("_", " ")
        return f"distilled from {teacher} by minimising {what} on its own samples{source}"

    def tags(self, recipe: Recipe) -> list[str]:
        return ["distillation", recipe.objective.divergence.name.replace("_", "-")]


def _texts(recipe: Recipe) -> Iterable[dict[str, Any]] | None:
    """Rows for the language-model term: a file is read whole, a data set is streamed."""
    from minillm.data.examples import read_texts

    if recipe.data.text is None:
        return None
    rows = read_texts(recipe.data.text, recipe.seed)
    return rows if recipe.data.text.file is None else list(rows)
