"""Settings of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from minillm.config import Positive, Section, different
from minillm.data.config import Source, Template
from minillm.errors import InputError


class EvaluateConfig(Section):
    seeds: Annotated[list[int], Field(min_length=2), AfterValidator(different)] = [10, 20, 30]
    """Sampling seeds; at least two, because the teacher is scored on another seed's answers."""
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the prompts behind each 95 % interval."""
    min_reverse_kl_reduction: Annotated[float, Field(le=1)] | None = None
    """The fall of KL(q‖p) from warm-up to minillm that is expected of this recipe, as a share (0.15 is 15 %). Where it is given, the
    verdict at the end says whether it was reached, by the whole of the paired interval; the verdict itself does not depend on it."""
    max_rouge_l_loss: Annotated[float, Field(ge=0)] = 1.0
    """The verdict: Rouge-L points that may be lost. minillm is worse where the whole paired interval lies beyond them."""
    max_finished_loss: Annotated[float, Field(ge=0)] = 2.0
    """The verdict: percentage points of finished responses that may be lost, as for Rouge-L."""


def _answers(choices: list[str]) -> list[str]:
    texts = different([choice.strip() for choice in choices])
    if "" in texts:
        raise InputError("a blank choice is no answer")
    if len(texts) == 1:
        raise InputError("one answer is no choice: at least two are needed")
    return choices


class TestSet(Source):
    """Prompts to answer, with references or without. Files are below the suite's `data_dir`, unless their paths are absolute."""

    __test__ = False  # not one of pytest's

    split: str = "test"
    min_reference_words: Positive | None = None
    """Only rows of which a reference has at least so many words (the paper's bins of S-NI and UnNI)."""
    max_reference_words: Positive | None = None
    sample: Positive | None = None
    """So many rows at random, always the same ones (files are often sorted by task), before reference lengths are looked at."""
    choices: Annotated[list[str], AfterValidator(_answers)] = []
    """Answers of a classification task, one of which is every row's reference: how well the model's probabilities of answering with one
    and ending there, shared out over all of them, tell how often it is right (ECE)."""
    limit: Positive | None = None


class Suite(Section):
    """Test sets, and how every model answers them."""

    out: Path = Path("runs/evaluate")
    """Where answers, scores and the report are kept; what is there already is not made again."""
    data_dir: str | None = None
    """The folder of the sets' files."""
    sets: Annotated[dict[str, TestSet], Field(min_length=1)]
    template: Template = "chat"
    system: str | None = None
    max_prompt_tokens: Positive = 256
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """Tokens that would repeat an n-gram of this length are not drawn (6 in the authors' final evaluation, and worth more
    than a point of Rouge-L there); 0: all are. It takes the transformers engine."""
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(different)] = [10, 20, 30, 40, 50]
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    teacher: str | None = None
    """A model to take KL(q‖p) and KL(p‖q) to, on every model's own answers of the first seed; all share its vocabulary then."""
    exposure_bias: bool = False
    """Excess error by position (ExAccErr), which needs the teacher."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000

    @model_validator(mode="after")
    def _needs(self) -> Suite:
        if self.exposure_bias and self.teacher is None:
            raise InputError("exposure_bias compares with a teacher's samples: name the teacher")
        if "average" in self.sets:
            raise InputError(
                "sets.average: results have the mean over the sets under that name; give the set another one"
            )
        return self
