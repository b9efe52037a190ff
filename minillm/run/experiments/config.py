"""Every setting of a comparison of methods; see `minillm.run.recipe` for those of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from minillm.config import FolderName, Section, expand_home, unique
from minillm.errors import InputError
from minillm.evaluation.config import Suite
from minillm.run.recipe import StageName
from minillm.run.stages import STAGES


def _check_trains_the_student(name: str) -> str:
    """The name of a stage, unchanged; an InputError where it does not train the student."""
    allowed = [stage.name for stage in STAGES if stage.trains == "student"]
    if name not in allowed:
        raise InputError(f"a stage that trains the student is needed: {', '.join(allowed)}")
    return name


class Method(Section):
    """One way to train the student: a recipe that differs from the shared one."""

    stage: Annotated[str, AfterValidator(_check_trains_the_student)]
    """The stage that trains the method's student, such as `warmup`, `sft` or `minillm`."""
    recipe: dict[str, Any] = {}
    """The settings that differ from the shared recipe."""
    tuning: list[dict[str, Any]] = [{}]
    """One entry for each tuning run, with the settings that differ from the method's recipe. The run with the best
    Rouge-L on validation is chosen."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(unique)] = [0]
    """Training seeds. The tuning runs use the first."""
    tested: bool = True
    """Whether the method is evaluated on the test sets, or only on validation."""


class Comparison(Section):
    """Several methods that start from one student and have one budget, are chosen on validation and are tested once."""

    data_dir: Path | None = None
    """The folder of the files that `recipe.data` and the suite's sets name without a path."""
    recipe: dict[str, Any]
    """The shared recipe: run_dir, data (with validation), teacher, student, and what all methods are trained with."""
    start: list[StageName] = ["teacher", "finetune", "student", "responses", "warmup"]
    """The stages whose results all methods share. `warmup` trains the student that they start from."""
    methods: Annotated[dict[FolderName, Method], Field(min_length=1)]
    """The methods by name."""
    baseline: str
    """The method that the others are compared with."""
    suite: Suite
    """The test sets. Its `out` is `tests` in the run directory."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """How many runs are done at once. With more than one, each run is a process with its log in the method's folder; of
    several GPUs each process gets one, in turns."""

    @model_validator(mode="before")
    @classmethod
    def _set_test_folder(cls, given: Any) -> Any:
        """Keep the tests in the run directory, whose path is expanded here once for everything that uses it."""
        suite, recipe = (given.get(key) for key in ("suite", "recipe")) if isinstance(given, dict) else (None, None)
        if isinstance(suite, dict) and isinstance(recipe, dict) and "run_dir" in recipe:
            root = expand_home(recipe["run_dir"])
            out = {"out": Path(str(root)) / "tests"}
            return {**given, "recipe": {**recipe, "run_dir": root}, "suite": {**suite, **out}}
        return given

    @model_validator(mode="before")
    @classmethod
    def _find_data_files(cls, given: Any) -> Any:
        """Give the files that are named without a path the path of `data_dir`."""
        if not isinstance(given, dict) or not given.get("data_dir"):
            return given
        folder = Path(given["data_dir"])
        methods = {
            name: {**method, "recipe": _with_data_dir(method["recipe"], folder)}
            if isinstance(method, dict) and "recipe" in method
            else method
            for name, method in given.get("methods", {}).items()
        }
        suite = {"data_dir": str(folder), **(given.get("suite") or {})}
        recipe = _with_data_dir(given.get("recipe", {}), folder)
        return {**given, "recipe": recipe, "methods": methods, "suite": suite}

    @model_validator(mode="after")
    def _check_methods(self) -> Comparison:
        if "run_dir" not in self.recipe:
            raise InputError(
                "recipe.run_dir: needed, and not given: everything that the comparison makes is kept there"
            )
        if self.baseline not in self.methods:
            raise InputError(f"baseline: {self.baseline} is none of the methods ({', '.join(self.methods)})")
        if not self.methods[self.baseline].tested:
            raise InputError(f"baseline: {self.baseline} is not tested; the others are compared with it on the tests")
        if len({len(method.tuning) for method in self.methods.values() if method.tested}) > 1:
            raise InputError("tuning: every tested method gets as many tuning runs as the others")
        return self


def _with_data_dir(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe in which data files that were named without a path are files of the folder."""
    data = recipe.get("data", {})
    files = {key: data.get(key) for key in ("train", "heldout", "validation", "text", "heldout_text")}
    found = {
        key: str(folder / name) for key, name in files.items() if isinstance(name, str) and Path(name).name == name
    }
    return {**recipe, "data": {**data, **found}} if found else recipe
