"""Recipes for tiny models, which the tests of the plan share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.run.plan.phases import Phase, Plan
from minillm.run.recipe import Recipe
from tests.conftest import save, tiny_llama

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    """A recipe of the minillm stage for tiny models."""
    student = save(tiny_llama(1, width=256, vocab=32), tmp_path / "s")
    teacher = save(tiny_llama(2, width=512, layers=3), tmp_path / "t")
    training = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True}
    tree: dict[str, Any] = {
        "run_dir": "x",
        "stages": ["minillm"],
        "data": {"train": "a", "heldout": "b"},
        "teacher": {"source": teacher},
        "student": {"source": student},
        "rollout": {"num_rollouts": 64},
        "training": training,
    }
    return Recipe.model_validate({**tree, **changes})


def phase(found: Plan, name: str) -> Phase:
    """The phase of a plan whose name ends with `name`."""
    return next(phase for phase in found.phases if phase.name.endswith(name))


def rows_file(file: Path, rows: list[dict[str, Any]]) -> str:
    """Write a data file; returns its name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def on_disk(tmp_path: Path, **changes: Any) -> Path:
    """The recipe of `recipe` as a file, which can be loaded with overrides."""
    data = {
        "train": rows_file(tmp_path / "a.jsonl", [{"instruction": "x" * 40, "output": "y" * 40}] * 40),
        "heldout": None,
    }
    tree = json.loads(recipe(tmp_path, data={"train": "a", "heldout": "b"}).model_dump_json(exclude_unset=True))
    tree |= {"data": {**data, "heldout": data["train"]}, **changes}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file
