"""Runs on data sets that are not kept in memory: they train as on small ones, and cost no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.speed.measure import resident
from minillm.data import examples, prompts, text
from minillm.data.examples import ExampleFile
from minillm.data.files import read_jsonl
from minillm.models.load import load_model
from minillm.run import responses_file, runner
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named
from minillm.train import datasets
from tests.run.tiny_recipe import RECIPE

STAGES = "stages=[teacher, student, responses, warmup, sft, minillm]"
SFT = "sft={max_steps: 3, per_device_train_batch_size: 4, use_cpu: true, learning_rate: 1e-2}"
FOLDERS = ("warmed", "sft", "student")


def recipe(root: Path, teacher: str, rows: int) -> Path:
    """Write a recipe with its data; returns its file."""
    with (root / "rows.jsonl").open("w") as lines:
        for i in range(rows):
            answer = {"output": f"w{i % 23}"} if i % 3 else {}
            lines.write(json.dumps({"instruction": f"w{i % 28} w{i % 25}", "text": f"w{i % 28} " * 9, **answer}) + "\n")
    (root / "heldout.jsonl").write_text('{"instruction": "w1", "output": "w2"}\n' * 4)
    file = root / "recipe.yaml"
    file.write_text(
        RECIPE.format(run=root / "run", data=root / "rows.jsonl", teacher=teacher).replace(
            f"heldout: {root / 'rows.jsonl'}", f"heldout: {root / 'heldout.jsonl'}"
        )
    )
    return file


def none_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (examples, text, datasets, responses_file):
        monkeypatch.setattr(module, "IN_MEMORY", 3)


OFF_POLICY = ["rollout.on_policy=0.5", "rollout.teacher_mix=0", "objective.long_term=0"]


@pytest.mark.parametrize("given", [[], pytest.param(OFF_POLICY, marks=pytest.mark.full)], ids=["", "off-policy"])
def test_a_large_data_set_is_trained_on_as_a_small_one(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    """Every stage has the same rows in the same order, so the weights are the same to the last bit."""
    file = recipe(tmp_path, pair[1], 30)
    words = [STAGES, SFT, "objective.single_step_weight=none", *given]
    runner.run_recipe(load_recipe(file, words))
    none_in_memory(monkeypatch)
    large = load_recipe(file, [*words, f"run_dir={tmp_path / 'large'}"])
    assert isinstance(Run(large).train_examples, ExampleFile)
    runner.run_recipe(large)
    assert read_jsonl(tmp_path / "run" / "responses.jsonl") == read_jsonl(tmp_path / "large" / "responses.jsonl")
    for folder in FOLDERS:
        one, other = (load_model(tmp_path / name / folder).state_dict() for name in ("run", "large"))
        assert all(torch.equal(value, other[name]) for name, value in one.items()), folder


def test_text_of_a_large_file_is_trained_on(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none_in_memory(monkeypatch)
    file = recipe(tmp_path, pair[1], 30)
    words = [f"data.text={tmp_path / 'rows.jsonl'}", "objective.language_model_block=16", "stages=[student, minillm]"]
    runner.run_recipe(load_recipe(file, words))
    log = json.loads((tmp_path / "run" / "student" / "trainer_state.json").read_text())["log_history"]
    assert any(entry.get("text_nll", 0) > 0 for entry in log)


def cost(folder: Path, teacher: str, stage: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of memory that a stage of a few updates needs, and the prompts that it renders."""
    folder.mkdir()
    rendered: list[str] = []
    original = prompts.render
    monkeypatch.setattr(prompts, "render", lambda *given: rendered.append("") or original(*given))
    training = "{max_steps: 3, per_device_train_batch_size: 4, use_cpu: true}"
    text_of = folder / "rows.jsonl"
    given = {
        "text": ["stages=[minillm]", f"data.text={text_of}", "objective.language_model_block=16"],
        "warmup": ["stages=[warmup]", "warmup.targets=references"],
        "sft": ["stages=[sft]", f"sft={training}"],
        "minillm": ["stages=[minillm]"],
    }[stage]
    file = load_recipe(recipe(folder, teacher, rows), ["student={source: " + teacher + ", keep_layers: null}", *given])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident("VmRSS")
    run = Run(file)
    stage_named(file.stages[0]).run(run)
    return resident("VmHWM") - before, len(rendered)


@pytest.mark.parametrize(
    ("rows", "stage"),
    [
        (10**5, "minillm"),
        *(
            pytest.param(10**6, stage, marks=pytest.mark.full, id=f"million-{stage}")
            for stage in ("minillm", "sft", "warmup", "text")
        ),
    ],
)
def test_many_rows_cost_no_memory_and_are_not_rendered_before_the_first_batch(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, stage: str
) -> None:
    """Kept in memory, an example with its prompt takes about 2 KB; its place in the file takes 32 bytes."""
    cost(tmp_path / "first", pair[1], stage, 30, monkeypatch)  # imports, and the memory of any training
    monkeypatch.undo()
    memory, rendered = cost(tmp_path / "many", pair[1], stage, rows, monkeypatch)
    assert memory < 40e6 + 100 * rows
    assert 0 < rendered < 1200
