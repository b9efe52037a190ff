"""The base class of stages: the facts that other modules need about a stage, and the methods that do its work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe

PROMPT_SETTINGS = ("data.train", "data.template", "data.system", "data.max_prompt_tokens", "data.limit")
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
            nothing. A stage that trains runs in every process of a launch; other stages run in one process.
        trains: which model it trains.
        folder: the folder in the run directory where it saves a model.
        label: the name of its student in results.
        engine: whether it samples responses.
        references: whether it trains on references of the data, or on responses cut to the same length.
        curve_title, curves: the plots that the report draws of its log.
    """

    name: ClassVar[str]
    fields: ClassVar[dict[str, tuple[Any, Any, str]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    default: ClassVar[bool] = True
    training: ClassVar[str | None] = None
    trains: ClassVar[Literal["student", "teacher"] | None] = None
    folder: ClassVar[str | None] = None
    label: ClassVar[str | None] = None
    engine: ClassVar[bool] = False
    references: ClassVar[bool] = False
    curve_title: ClassVar[str] = ""
    curves: ClassVar[Sequence[Panel]] = ()

    def arguments(self, recipe: Recipe) -> dict[str, Any]:
        """The stage's `TrainingArguments` as the recipe gives them; empty for a stage that trains nothing."""
        value: Any = recipe
        for part in self.training.split(".") if self.training else ():
            value = getattr(value, part)
        return value if self.training else {}

    @abstractmethod
    def run(self, run: Run) -> None:
        """Run the stage, or continue it where it was interrupted."""

    def discard(self, run: Run, requested: bool) -> None:  # noqa: B027 (most stages leave nothing to delete)
        """Delete earlier results that the stage must not find when it runs again.

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


def describe_supervised(recipe: Recipe, stage: str) -> str:
    """How a stage trained on given answers, for `Stage.describe`."""
    teacher, warmup = f"`{recipe.teacher.source}`", recipe.warmup
    from_teacher = stage == "warmup" and warmup.targets == "teacher"
    answers = f"answers of {teacher}" if from_teacher else "the answers in its training data"
    if stage == "sft" or warmup.cross_entropy == 1:
        return f"fine-tuned on {answers}"
    share = "" if warmup.cross_entropy == 0 else f" and {warmup.cross_entropy:g} of cross-entropy"
    return f"distilled from {teacher} by minimising {warmup.divergence.name.replace('_', ' ')}{share} on {answers}"
