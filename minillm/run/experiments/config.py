"""Every setting of a suite of test sets and of a comparison of methods; see `minillm.run.recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from minillm.config import Section, different
from minillm.errors import InputError
from minillm.evaluation.config import Suite
from minillm.run.recipe import StageName
from minillm.run.stages import STAGES


def _trains_the_student(name: str) -> str:
    allowed = [stage.name for stage in STAGES if stage.trains == "student"]
    if name not in allowed:
        raise InputError(f"a stage that trains the student is needed: {', '.join(allowed)}")
    return name


class Method(Section):
    """One way to train the student: a recipe that differs from the shared one."""

    stage: Annotated[str, AfterValidator(_trains_the_student)]
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
    start: list[StageName] = ["teacher", "finetune", "student", "responses", "warmup"]
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
            files = {
                key: name
                for key in ("train", "heldout", "validation", "text")
                if isinstance(name := data.get(key), str)
            }
            below = {key: str(folder / name) for key, name in files.items() if Path(name).name == name}
            return {**recipe, "data": {**data, **below}} if below else recipe

        methods = {
            name: {**method, "recipe": placed(method["recipe"])}
            if isinstance(method, dict) and "recipe" in method
            else method
            for name, method in given.get("methods", {}).items()
        }
        suite = {"data_dir": str(folder), **(given.get("suite") or {})}
        return {**given, "recipe": placed(given.get("recipe", {})), "methods": methods, "suite": suite}

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if "run_dir" not in self.recipe:
            raise InputError("recipe.run_dir: needed, and not given: everything the comparison makes is kept there")
        if self.baseline not in self.methods:
            raise InputError(f"baseline: {self.baseline} is none of the methods ({', '.join(self.methods)})")
        if not self.methods[self.baseline].tested:
            raise InputError(f"baseline: {self.baseline} is not tested; the others are compared with it on the tests")
        if len({len(method.tuning) for method in self.methods.values() if method.tested}) > 1:
            raise InputError("tuning: every tested method gets as many tuning runs as the others")
        return self
