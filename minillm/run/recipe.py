"""A whole recipe: the sections that several stages share, and the fields of the stages.

Each section is a pydantic model in the `config.py` of the room that reads it, or in the file of its stage. It refuses
unknown keys, and the string below a field is the field's documentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, model_validator

from minillm.config import LocalPath, Section
from minillm.data.config import DataConfig
from minillm.errors import InputError
from minillm.evaluation.config import EvaluateConfig
from minillm.loss.config import Objective
from minillm.models.config import StudentConfig
from minillm.rollout.config import RolloutConfig
from minillm.run.stages import STAGES, stage_named
from minillm.run.stages.logits import LogitsConfig
from minillm.run.stages.pretrain import PretrainConfig
from minillm.run.stages.responses import ResponsesConfig
from minillm.run.stages.stage import Stage
from minillm.run.stages.warmup import WarmupConfig
from minillm.teacher.config import TeacherSection
from minillm.train.checks import (
    check_off_policy,
    check_samples,
    check_served_teacher,
    check_several_teachers,
    check_sharded_teacher,
)

StageName = Annotated[str, AfterValidator(lambda name: stage_named(name).name)]


class SharedRecipe(Section):
    """The fields of a recipe that belong to no single stage."""

    run_dir: LocalPath
    """The folder that keeps everything the run makes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: data order, sampling, adapters."""
    stages: list[StageName] = [stage.name for stage in STAGES if stage.default]
    """What `minillm run` does, in this order. Besides the defaults there are `finetune`, which trains the teacher on
    the references of the data, `logits` and `pretrain`, which train the student against the teacher on text, and
    `sft`, which trains the student on the references."""
    on_fault: Literal["stop", "skip"] = "stop"
    """What happens to an update that cannot be trusted: its loss, its gradient, a log-probability, an importance weight
    or the teacher's states are not finite, or the engine returns empty or impossible text, or samples from another
    model (`rollout.mismatch_limit`). `stop` ends the run before the update changes anything. `skip` leaves the update
    out, or all updates on a batch of rollouts with a fault, and goes on; the log and the report count them. Either way
    the batch is kept in `faults` of the run directory. What is found only after the optimiser's step ends the run."""
    data: DataConfig
    """Prompts, references and text."""
    teacher: TeacherSection
    """The large model. Several, `{NAME: {source: …}}`, each score the rows whose column `teacher` has their name."""
    student: StudentConfig = StudentConfig()
    """The small model."""
    objective: Objective = Objective()
    """What the minillm stage minimises."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student's responses are sampled."""
    keep_checkpoint: bool = True
    """Keep the last checkpoint of a training stage, so that it can go on with a longer `max_steps` or
    `num_train_epochs`, until a training stage that builds on it is finished. It takes the size of the weights and of
    the optimiser's state, 12 bytes for each trained weight with Adam in float32."""

    def trainings(self, *, idle: bool = False) -> list[tuple[Stage, dict[str, Any]]]:
        """Each stage that trains, with its `TrainingArguments` as given.

        Args:
            idle: also the stages that this recipe does not run.
        """
        recipe: Any = self
        chosen = (stage for stage in STAGES if stage.training and (idle or stage.name in self.stages))
        return [(stage, stage.arguments(recipe)) for stage in chosen]

    @model_validator(mode="after")
    def _check_template(self) -> SharedRecipe:
        if self.data.system is not None and self.data.template in ("alpaca", "plain"):
            raise InputError(
                f"data.system: template {self.data.template} has no system message; use chat or a Jinja text, or leave "
                "it out"
            )
        if (
            "max_prompt_tokens" in self.rollout.model_fields_set
            and self.rollout.max_prompt_tokens != self.data.max_prompt_tokens
        ):
            raise InputError(
                "rollout.max_prompt_tokens: in a recipe data.max_prompt_tokens is the limit of every stage"
            )
        return self

    @model_validator(mode="after")
    def _check_rollouts(self) -> SharedRecipe:
        check_off_policy(self.rollout, self.objective)
        check_samples(self.rollout, self.objective)
        if self.teacher.several:
            check_several_teachers(self.rollout, self.objective, self.data.text is not None)
        if self.teacher.first.shard:
            check_sharded_teacher(self.rollout, self.objective, self.data.text is not None)
        if self.teacher.first.servers:
            check_served_teacher(self.rollout)
        return self

    @model_validator(mode="after")
    def _check_pruning(self) -> SharedRecipe:
        if "student" in self.stages and self.student.source == "prune" and self.student.keep_layers is None:
            raise InputError("student.keep_layers is needed when student.source is prune")
        return self


if TYPE_CHECKING:

    class Recipe(SharedRecipe):
        """For type checkers: the fields that the shipped stages add."""

        logits: LogitsConfig = LogitsConfig()
        pretrain: PretrainConfig = PretrainConfig()
        responses: ResponsesConfig = ResponsesConfig()
        warmup: WarmupConfig = WarmupConfig()
        training: dict[str, Any] = {}
        log_samples: int = 10
        finetune: dict[str, Any] = {}
        sft: dict[str, Any] = {}
        evaluate: EvaluateConfig = EvaluateConfig()
        push_to_hub: str | None = None
else:
    Recipe = create_model(
        "Recipe",
        __base__=SharedRecipe,
        __module__=__name__,
        __doc__="A recipe: the shared sections and the fields of every stage.",
        **{
            name: (kind, Field(default=default, description=description))
            for stage in STAGES
            for name, (kind, default, description) in stage.fields.items()
        },
    )
