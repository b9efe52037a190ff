"""The base class of stages: the facts that other modules need about a stage, and the methods that do its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe

RENDERING_SETTINGS = ("data.template", "data.system", "data.max_prompt_tokens", "data.limit")
"""Settings that decide which rows of a data source become prompts, and how, for `Stage.reads`."""
PROMPT_SETTINGS = ("data.train", *RENDERING_SETTINGS)
"""Settings that decide the training prompts, for `Stage.reads`."""

Panel = tuple[str, dict[str, str]]
"""Title of a plot in the report, and the label of each logged metric that it shows."""


class Stage(ABC):
    """One step of a recipe. A stage is a subclass in a file of its own and an entry of `minillm.run.stages.STAGES`.

    The module of a stage is imported whenever a recipe is read, so slow imports belong into `run`.

    Attributes:
        name: its name in the recipe's `stages` and in `--stage`.
        fields: the fields that it adds to the recipe. Each name has a type, a default and a documentation.
        needs: stages that it builds on.
        reads: settings that decide its result, by the beginning of their dotted names. A finished stage is stale when
            one of them changes.
        default: whether it is part of a recipe that does not list its stages.
        training: dotted name of the setting that holds its `transformers.TrainingArguments`; None if it trains
            nothing. A stage that trains runs in every process of a launch; most others run in one process.
        trains: which model it trains.
        validates_on: the setting that names the rows that it is validated on.
        validation_settings: settings that decide what a validation measures, where validation decides the result.
        folder: the folder of the run directory that it leaves a model in.
        label: what results call the student that it leaves.
        engine: whether it samples.
        response_section: the section of the recipe whose `max_new_tokens` limits the responses that it samples or
            trains on.
        uses_trl: whether it trains with `minillm.train.finetune.FineTuner`, whose loss and data loader are TRL's.
        always_runs: whether it runs again although it is finished.
        in_every_process: whether it runs in every process of a launch although it trains nothing; each does a part.
        keeps_work: whether a stage that is made again because another was takes from before what still holds, so that
            nothing is lost. What other stages have made is thrown away.
        curve_title, curves: the plots that the report draws of its log.
        watched: what its log is asked for at the end, to tell whether it ended worse than it began; see
            `minillm.train.watch.decline`.
    """

    name: ClassVar[str]
    fields: ClassVar[dict[str, tuple[Any, Any, str]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    default: ClassVar[bool] = True
    training: ClassVar[str | None] = None
    trains: ClassVar[Literal["student", "teacher"] | None] = None
    validates_on: ClassVar[str] = "data.validation"
    validation_settings: ClassVar[tuple[str, ...]] = (
        "data.validation",
        "data.validation_limit",
        "rollout.engine",
        "rollout.max_new_tokens",
        "rollout.temperature",
        "rollout.stop",
    )
    folder: ClassVar[str | None] = None
    label: ClassVar[str | None] = None
    engine: ClassVar[bool] = False
    response_section: ClassVar[str | None] = None
    uses_trl: ClassVar[bool] = False
    always_runs: ClassVar[bool] = False
    in_every_process: ClassVar[bool] = False
    keeps_work: ClassVar[bool] = False
    curve_title: ClassVar[str] = ""
    curves: ClassVar[Sequence[Panel]] = ()
    watched: ClassVar[Mapping[str, str]] = {}

    def arguments(self, recipe: Recipe) -> dict[str, Any]:
        """The stage's `TrainingArguments` as the recipe gives them; empty for a stage that trains nothing."""
        value: Any = recipe
        for part in self.training.split(".") if self.training else ():
            value = getattr(value, part)
        return value if self.training else {}

    def settings_read(self, recipe: Recipe) -> set[str]:
        """The settings that decide the stage's result with this recipe, by the beginning of their names."""
        return set(self.reads)

    def trains_on_references(self, recipe: Recipe) -> bool:
        """Whether the stage trains on the answers in the data."""
        return False

    def scores_with_teacher(self, recipe: Recipe) -> bool:
        """Whether a validation can score the student's samples with the teacher, in this process or behind servers.

        Servers that return log-probabilities only are found when the stage begins, and refuse what needs more.
        """
        return self.trains == "student"

    def measured(self) -> Mapping[str, bool | None] | None:
        """What a validation of the stage measures, and whether more is better; None for the metrics of answers."""
        return None

    def validation_decides(self, recipe: Recipe) -> bool:
        """Whether validation decides which model the stage leaves."""
        return bool(self.arguments(recipe).get("load_best_model_at_end"))

    def teacher_in_loss(self, recipe: Recipe) -> bool:
        """Whether a supervised loss compares the student with the teacher's distributions."""
        return False

    def longest_sequences(self, recipe: Recipe) -> list[tuple[str, int]]:
        """Tokens of the longest sequences that a model reads in this stage.

        Returns:
            The settings that a length comes from, as the beginning of an error message, and the length of each.
        """
        if self.response_section is None:
            return []
        prompt, response = recipe.data.max_prompt_tokens, getattr(recipe, self.response_section).max_new_tokens
        settings = f"data.max_prompt_tokens + {self.response_section}.max_new_tokens ({prompt} + {response}) exceed"
        return [(settings, prompt + response)]

    def refusal(self, recipe: Recipe, processes: int) -> str | None:
        """Why the stage cannot run in so many processes with the recipe's settings, and what to change; None if it can.

        It is asked before anything loads, by `minillm plan` as well.
        """
        return None

    def check_models(self, recipe: Recipe) -> None:  # noqa: B027 (most stages ask nothing of their own)
        """Refuse models that the stage cannot work with, by their configs.

        Raises:
            MinillmError: naming the model, and the setting to change.
        """

    def check_rows(self, run: Run) -> None:
        """Read and render the rows that the stage will read, so that none fails after the hours of earlier stages.

        Raises:
            DataError, InputError: naming the file and the row.
        """
        _ = run.train_prompts
        if self.trains_on_references(run.recipe):
            _ = run.references
        if self.training:
            _ = run.validation

    @abstractmethod
    def run(self, run: Run) -> None:
        """Run the stage, or continue it where it was interrupted."""

    def has_made_something(self, run_dir: Path) -> bool:
        """Whether the stage has left anything that it would continue from, if it is not finished.

        Until then it may be given other settings.
        """
        return any((run_dir / "work" / self.name).glob("checkpoint-*"))

    def discard(self, run: Run, requested: bool) -> None:  # noqa: B027 (most stages leave nothing to delete)
        """Delete files from which a stage that is run again would otherwise continue.

        Args:
            run: the run.
            requested: whether `--redo` named this stage, and not one that it builds on.
        """

    def phases(self, planner: Planner) -> list[Phase]:
        """Estimate the memory and the time of the stage, for `minillm plan`."""
        return []

    def describe(self, recipe: Recipe) -> str:
        """How the stage trained the student: a part of the model card's first sentence.

        Every stage that trains the student overrides it.
        """
        raise NotImplementedError(f"stage {self.name} trains no student to describe")

    def tags(self, recipe: Recipe) -> list[str]:
        """Tags of the model card."""
        return ["distillation"]


def teachers_in_words(recipe: Recipe) -> str:
    """The sources of the teachers, for a sentence of the model card."""
    *others, last = [f"`{teacher.source}`" for teacher in recipe.teacher.by_name.values()]
    return f"{', '.join(others)} and {last}" if others else last


def describe_supervised(recipe: Recipe, stage: str) -> str:
    """How a stage trained on given answers, for `Stage.describe`."""
    teacher, warmup = teachers_in_words(recipe), recipe.warmup
    from_teacher = stage == "warmup" and warmup.targets == "teacher"
    answers = f"answers of {teacher}" if from_teacher else "the answers in its training data"
    if stage == "sft" or warmup.cross_entropy == 1:
        return f"fine-tuned on {answers}"
    share = "" if warmup.cross_entropy == 0 else f" and {warmup.cross_entropy:g} of cross-entropy"
    return f"distilled from {teacher} by minimising {warmup.divergence.name.replace('_', ' ')}{share} on {answers}"
