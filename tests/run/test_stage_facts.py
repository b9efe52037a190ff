"""What is asked of a stage, rather than of its name: folders, rows, defaults of its training arguments."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minillm.errors import InputError
from minillm.rollout.config import RolloutConfig
from minillm.rollout.worker import Worker
from minillm.run import checks
from minillm.run import recipe as recipe_module
from minillm.run.context import Run
from minillm.run.plan import Machine, why_refused
from minillm.run.recipe import Recipe, SharedRecipe
from minillm.run.stages import STAGES, stage_named
from minillm.run.stages.shared import training_arguments
from minillm.run.stages.stage import Stage
from minillm.run.training_arguments import STAGE_DEFAULTS, argument, training_faults
from minillm.train.schedule import BatchSchedule


class Rehearsal(Stage):
    """A stage that only its own file knows: it trains on the answers in the data."""

    name = "rehearsal"
    training = "training"
    trains = "student"
    folder = "rehearsed"
    uses_trl = True
    response_section = "responses"

    def trains_on_references(self, recipe: Recipe) -> bool:
        return True

    def run(self, run: Run) -> None:
        raise NotImplementedError


def tiny_recipe(tmp_path: Path, **settings: Any) -> Recipe:
    (tmp_path / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    file = {"file": tmp_path / "train.jsonl"}
    return Recipe.model_validate(
        {"run_dir": tmp_path / "run", "data": {"train": file, "heldout": file}, "teacher": {"source": "t"}} | settings
    )


def test_validation_scores_with_a_served_teacher_too(tmp_path: Path) -> None:
    """Servers may return states, so that a checkpoint can be chosen by KL(q‖p)."""
    served = tiny_recipe(
        tmp_path,
        teacher={"source": "t", "servers": ["http://x:1"]},
        student={"source": "s"},
        rollout={"teacher_mix": 0},
    )
    assert [s.name for s in STAGES if s.scores_with_teacher(served)] == ["pretrain", "warmup", "sft", "minillm"]
    validated = served.model_copy(update={"data": served.data.model_copy(update={"validation": served.data.train})})
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "reverse_kl",
    }  # fmt: skip
    assert list(training_faults(validated, stage_named("minillm"), best)) == []


def test_a_new_stage_is_checked_without_being_named_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "STAGES", (*STAGES, Rehearsal()))
    given = tiny_recipe(tmp_path, student={"source": "s"}).model_copy(update={"stages": ["rehearsal"]})
    read: list[str] = []

    class Rows:
        recipe = given

        def __getattr__(self, name: str) -> None:
            read.append(name)

    checks.check_rows(Rows())  # pyright: ignore[reportArgumentType]
    assert read == ["train_prompts", "references", "validation"]


def test_a_folder_is_named_once(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(dir=tmp_path)
    for stage in STAGES:
        if stage.folder is not None:
            assert Run.folder(run, stage.name) == str(tmp_path / stage.folder)


def test_the_size_of_an_update_has_one_rule_and_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    rollout = {"num_rollouts": 60, "samples_per_prompt": 4, "engine": "transformers"}
    given = tiny_recipe(tmp_path, student={"keep_layers": 2}, training=training, rollout=rollout, stages=["minillm"])
    planned = why_refused(given, Machine(5))
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(InputError) as refused:
        checks.check_sizes(given)
    with pytest.raises(InputError) as raised:
        BatchSchedule(RolloutConfig.model_validate(rollout), 4, 2, worker=Worker(processes=5))
    assert planned == str(refused.value) == str(raised.value)
    assert planned is not None
    assert "rollout.num_rollouts (60) must be a multiple of the 40 responses of an update on 5 process(es)" in planned
    assert why_refused(given.model_copy(update={"stages": ["warmup"]}), Machine(5)) is None


def test_the_plan_and_the_run_have_the_same_defaults(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(dir=tmp_path, recipe=tiny_recipe(tmp_path, student={"keep_layers": 2}))
    arguments = training_arguments(run, stage_named("minillm"))
    for name in STAGE_DEFAULTS.keys() - {"report_to"}:  # transformers makes a list of it
        assert argument({}, name) == getattr(arguments, name)


def test_type_checkers_see_the_fields_of_every_stage() -> None:
    tree = ast.parse(Path(recipe_module.__file__).read_text(encoding="utf-8"))
    [typed] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Recipe"]
    declared = {node.target.id for node in typed.body if isinstance(node, ast.AnnAssign)}  # pyright: ignore
    assert declared == {name for stage in STAGES for name in stage.fields}
    assert declared == Recipe.model_fields.keys() - SharedRecipe.model_fields.keys()
