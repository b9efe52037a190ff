"""Every setting of a suite of test sets and of a comparison of methods; see `minillm.recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from minillm.recipe import Positive, Section, Source, Stage, Template, different


def _answers(choices: list[str]) -> list[str]:
    texts = different([choice.strip() for choice in choices])
    if "" in texts:
        raise ValueError("a blank choice is no answer")
    if len(texts) == 1:
        raise ValueError("one answer is no choice: at least two are needed")
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
            raise ValueError("exposure_bias compares with a teacher's samples: name the teacher")
        if "average" in self.sets:
            raise ValueError("sets.average: results have the mean over the sets under that name; give the set another one")
        return self


class Method(Section):
    """One way to train the student: a recipe that differs from the shared one."""

    stage: Literal["warmup", "sft", "minillm"]
    """The stage that trains; its student is the method's."""
    recipe: dict[str, Any] = {}
    """What differs from the shared recipe."""
    tuning: list[dict[str, Any]] = [{}]
    """What differs besides, once for each tuning run; the best on validation is taken."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(different)] = [0]
    """Training seeds; tuning uses the first."""
    tested: bool = True
    """Whether it is read on the test sets, or only on validation."""


class Comparison(Section):
    """Several methods from one start, with one budget, chosen on validation and tested once."""

    data_dir: Path | None = None
    """The folder of the files that `recipe.data` and the suite's sets name without a path."""
    recipe: dict[str, Any]
    """The shared recipe: run_dir, data (with validation), teacher, student, and what every method trains with."""
    start: list[Stage] = ["teacher", "finetune", "student", "responses", "warmup"]
    """Stages that make what all methods share; `warmup` heals the student."""
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    baseline: str
    """The method that others are compared with."""
    suite: Suite
    """The test sets; its `out` is `tests` in the run directory."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Runs at once, each in a process of its own with its log in its directory; of several GPUs each gets one, in turns."""

    @model_validator(mode="before")
    @classmethod
    def _tests_below_run_dir(cls, given: Any) -> Any:
        suite, recipe = (given.get(key) for key in ("suite", "recipe")) if isinstance(given, dict) else (None, None)
        if isinstance(suite, dict) and isinstance(recipe, dict) and "run_dir" in recipe:
            return {**given, "suite": {**suite, "out": Path(str(recipe["run_dir"])) / "tests"}}
        return given

    @model_validator(mode="before")
    @classmethod
    def _below_data_dir(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("data_dir"):
            return given
        folder = Path(given["data_dir"])

        def placed(recipe: dict[str, Any]) -> dict[str, Any]:
            data = recipe.get("data", {})
            files = {key: name for key in ("train", "heldout", "validation", "text") if isinstance(name := data.get(key), str)}
            below = {key: str(folder / name) for key, name in files.items() if Path(name).name == name}
            return {**recipe, "data": {**data, **below}} if below else recipe

        methods = {
            name: {**method, "recipe": placed(method["recipe"])} if isinstance(method, dict) and "recipe" in method else method
            for name, method in given.get("methods", {}).items()
        }
        suite = {"data_dir": str(folder), **(given.get("suite") or {})}
        return {**given, "recipe": placed(given.get("recipe", {})), "methods": methods, "suite": suite}

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if "run_dir" not in self.recipe:
            raise ValueError("recipe.run_dir: needed, and not given: everything the comparison makes is kept there")
        if self.baseline not in self.methods:
            raise ValueError(f"baseline: {self.baseline} is none of the methods ({', '.join(self.methods)})")
        if not self.methods[self.baseline].tested:
            raise ValueError(f"baseline: {self.baseline} is not tested; the others are compared with it on the tests")
        if len({len(method.tuning) for method in self.methods.values() if method.tested}) > 1:
            raise ValueError("tuning: every tested method gets as many tuning runs as the others")
        return self
