"""Every setting a recipe can hold, typed; imports nothing else of this package.

A section is a pydantic model that refuses unknown keys. The string under a field is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minillm.config import LocalPath, Positive, Section, Share
from minillm.data.config import DataConfig
from minillm.errors import InputError
from minillm.evaluation.config import EvaluateConfig
from minillm.loss.config import DivergenceConfig, Objective
from minillm.models.config import StudentConfig
from minillm.rollout.config import RolloutConfig
from minillm.teacher.config import TeacherConfig
from minillm.train.checks import check_off_policy, check_served_teacher, check_sharded_teacher

STAGES = ("teacher", "student", "responses", "warmup", "minillm", "evaluate", "report")
Stage = Literal["teacher", "finetune", "student", "responses", "warmup", "sft", "minillm", "evaluate", "report"]


class ResponsesConfig(Section):
    file: LocalPath | None = None
    """The `responses.jsonl` of another run with the same teacher and prompts, instead of answers of this run's own."""
    max_new_tokens: Positive = 128
    samples_per_prompt: Positive = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0


class WarmupConfig(Section):
    cross_entropy: Share = 0.5
    """λ in λ·CE + (1−λ)·D on given answers (the paper's word-level KD uses 0.5; 1 is fine-tuning)."""
    divergence: DivergenceConfig = DivergenceConfig(name="forward_kl")
    """D; its name alone, or with its parameters."""
    targets: Literal["teacher", "references"] = "teacher"
    """Answers of the teacher (SeqKD), or those in the data (SFT, word-level KD)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of student and teacher in D."""
    cross_entropy_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the student's logits in the cross-entropy: at 1 it is the student as it samples that is fitted to the answers."""
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of this stage."""


class Recipe(Section):
    run_dir: LocalPath
    """Where everything the run makes is kept."""
    seed: int = 0
    stages: list[Stage] = list(STAGES)
    """What `minillm run` does, in this order. Besides those of the default: `finetune`, the teacher on the data's references;
    `sft`, the student on them."""
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig = StudentConfig()
    responses: ResponsesConfig = ResponsesConfig()
    warmup: WarmupConfig = WarmupConfig()
    objective: Objective = Objective()
    rollout: RolloutConfig = RolloutConfig()
    training: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the minillm stage."""
    finetune: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the finetune stage."""
    sft: dict[str, Any] = {}
    """`transformers.TrainingArguments` of the sft stage."""
    evaluate: EvaluateConfig = EvaluateConfig()
    push_to_hub: str | None = None
    """A hub id to which the report stage uploads the student."""

    def trainings(self, *, idle: bool = False) -> list[tuple[Stage, str, dict[str, Any]]]:
        """(stage, section, training arguments) of every stage that trains; `idle`: of those too that are none of the recipe's."""
        known: list[tuple[Stage, str, dict[str, Any]]] = [
            ("finetune", "finetune", self.finetune), ("warmup", "warmup.training", self.warmup.training), ("sft", "sft", self.sft),
            ("minillm", "training", self.training),
        ]  # fmt: skip
        return [each for each in known if idle or each[0] in self.stages]

    @model_validator(mode="after")
    def _pruning(self) -> Recipe:
        if self.data.system is not None and self.data.template in ("alpaca", "plain"):
            raise InputError(
                f"data.system: template {self.data.template} has no system message; use chat or a Jinja text, or leave it out"
            )
        if (
            "max_prompt_tokens" in self.rollout.model_fields_set
            and self.rollout.max_prompt_tokens != self.data.max_prompt_tokens
        ):
            raise InputError("rollout.max_prompt_tokens: in a recipe data.max_prompt_tokens says it for every stage")
        check_off_policy(self.rollout, self.objective)
        if self.teacher.shard:
            check_sharded_teacher(self.rollout, self.objective, self.data.text is not None)
        if self.teacher.servers:
            check_served_teacher(self.rollout, self.objective)
        if "student" in self.stages and self.student.source == "prune" and self.student.keep_layers is None:
            raise InputError("student.keep_layers is needed when student.source is prune")
        return self
