"""Settings of the evaluation: the `evaluate` section of a recipe, and suites of test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from minillm.config import FolderName, Positive, Section, folder_name, unique
from minillm.data.config import Source, Template
from minillm.errors import InputError
from minillm.evaluation.formatting import AVERAGE


class EvaluateConfig(Section):
    """How the models of a run answer the held-out prompts, and when its last stage counts as an improvement."""

    seeds: Annotated[list[int], Field(min_length=2), AfterValidator(unique)] = [10, 20, 30]
    """Sampling seeds; every model gives one answer to each prompt with each seed. At least two are needed, because an
    answer is compared with the teacher's answers of the other seeds."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of the answers; KL(q‖p) is taken at the same temperature."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Number of bootstrap samples of the prompts behind each 95 % interval."""
    min_reverse_kl_reduction: Annotated[float, Field(le=1)] | None = None
    """The relative reduction of KL(q‖p) from the warm-up to the minillm stage that is expected of this recipe (0.15
    means 15 %). If it is set, the sentence of the verdict says whether it was reached, judged by the whole paired 95 %
    interval. The verdict itself does not depend on it."""
    max_rouge_l_loss: Annotated[float, Field(ge=0)] = 1.0
    """Rouge-L points that minillm may lose against the warmed-up student. The verdict is `worse` if the whole paired
    95 % interval of the change lies below minus this value."""
    max_finished_loss: Annotated[float, Field(ge=0)] = 2.0
    """Percentage points by which the share of finished answers may fall, judged in the same way."""


def _check_choices(choices: list[str]) -> list[str]:
    texts = unique([choice.strip() for choice in choices])
    if "" in texts:
        raise InputError("a choice must not be blank; remove it")
    if len(texts) == 1:
        raise InputError("at least two choices must be given; add one")
    return choices


class TestSet(Source):
    """A set of prompts, with or without references.

    A relative `file` is looked up in the suite's `data_dir`.
    """

    __test__ = False  # keeps pytest from collecting this class

    split: str = "test"
    """Split of `dataset`."""
    min_reference_words: Positive | None = None
    """Use only rows whose longest reference has at least this many words, as the paper splits S-NI and UnNI."""
    max_reference_words: Positive | None = None
    """Use only rows whose longest reference has at most this many words."""
    sample: Positive | None = None
    """Use this many rows, chosen at random but always the same ones, because files are often sorted by task. They are
    chosen before the lengths of references are looked at."""
    choices: Annotated[list[str], AfterValidator(_check_choices)] = []
    """The possible answers of a classification task; every row's reference must be one of them. If they are given, the
    expected calibration error (ECE) is reported: how far the model's confidence in its most probable choice is from how
    often that choice is right. The confidence is the probability of answering with exactly this choice, divided by the
    sum over all choices."""
    limit: Positive | None = None
    """Use only the first rows that are left."""


class Suite(Section):
    """Test sets, and how every model answers them."""

    out: Path = Path("runs/evaluate")
    """Folder of the answers, the scores and the report. Answers that are already there are not sampled again."""
    data_dir: str | None = None
    """Folder of the sets' files."""
    sets: Annotated[dict[FolderName, TestSet], Field(min_length=1)]
    """The test sets by name."""
    template: Template = "chat"
    """How prompts are rendered; see `data.template` of a recipe."""
    system: str | None = None
    """System message; see `data.system` of a recipe."""
    max_prompt_tokens: Positive = 256
    """Longer prompts are left out, counted and reported; they are never cut."""
    max_new_tokens: Positive = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of the answers; divergences are taken at the same temperature."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """Tokens that would repeat an n-gram of this length are not sampled; 0 blocks none. LMOps uses 6 in its final
    evaluation, where it is worth more than a point of Rouge-L. It needs the transformers engine."""
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(unique)] = [10, 20, 30, 40, 50]
    """Sampling seeds; every model gives one answer to each prompt with each seed."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What samples the answers: `auto` is vLLM where it is installed, else transformers."""
    teacher: str | None = None
    """Folder or hub id of a model for which KL(q‖p) and KL(p‖q) are computed, on every model's own answers of the first
    seed. All models must then share its vocabulary."""
    exposure_bias: bool = False
    """Report the excess accumulated error by position (ExAccErr), which needs a teacher."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Number of bootstrap samples of the prompts behind each 95 % interval."""

    @model_validator(mode="after")
    def _check_settings_together(self) -> Suite:
        if self.exposure_bias and self.teacher is None:
            raise InputError("exposure_bias compares with a teacher's samples: name the teacher")
        if AVERAGE in self.sets:
            raise InputError(
                f"sets.{AVERAGE}: results have the mean over the sets under that name; give the set another one"
            )
        return self


def named_models(texts: Sequence[str]) -> dict[str, str]:
    """Read the models of a suite, as the command line gives them.

    Args:
        texts: NAME:FOLDER of each model, or FOLDER alone. The name is then the last part of the folder.

    Returns:
        The folders by name.

    Raises:
        InputError: there is no model, a text cannot be read, or two models have the same name.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, colon, folder = text.partition(":")
        if not colon:
            name, folder = Path(text).name, text
        if not name or not folder:
            raise InputError(f"model={text}: model=FOLDER or model=NAME:FOLDER is needed")
        try:
            folder_name(name)
        except InputError as error:
            raise InputError(f"model={text}: {error} (model=NAME:FOLDER)") from None
        if name in models:
            raise InputError(f"model={text}: {name} is the name of two models; say model=NAME:FOLDER")
        models[name] = folder
    if not models:
        raise InputError("no model to evaluate: add model=FOLDER, several times if you like")
    return models
