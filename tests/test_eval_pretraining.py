"""The study of pre-training runs whole on tiny models, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.pretraining import INHERITANCE_ARMS, SIZES, design_arms, table
from minillm.run.recipe import Recipe
from minillm.run.tree import merge

ROOT = Path(__file__).parents[1]


def study(*words: Any) -> str:
    command = [sys.executable, "-m", "eval.pretraining", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_arm_is_a_recipe_that_can_run(tmp_path: Path) -> None:
    shared = {"run_dir": str(tmp_path), "data": {"train": "a.jsonl", "heldout": "a.jsonl", "text": "a.jsonl"}}
    shared |= {"teacher": {"source": "t"}, "student": {"source": "s"}, "stages": ["logits", "pretrain"]}
    size = SIZES["design"]["full"]
    for arm in (*design_arms(size).values(), *INHERITANCE_ARMS.values()):
        Recipe.model_validate(merge(shared, arm))
    assert size.updates * size.blocks * size.block > 150_000


def test_the_table_has_means_and_what_an_arm_lacks_is_left_empty() -> None:
    def run(loss: float, **more: float) -> dict[str, Any]:
        return {"text_loss": loss, "curve": [[5, loss + 1], [10, loss]], **more}

    arms = {"plain": [run(3.0), run(3.2)], "linear to 0": [run(2.5, bytes_per_token=40.0)]}
    results = {"size": vars(SIZES["inheritance"]["tiny"]), "arms": arms, "teacher": {"text_loss": 3.0}, "machine": "m"}
    lines = table(results, True).splitlines()
    row = next(line for line in lines if line.startswith("| plain"))
    assert "| 2 | 3.1000 ± 0.1414 |" in row
    assert next(line for line in lines if line.startswith("| linear")).endswith("| 40.0 | 10 |")


@pytest.mark.full
def test_the_design_space_runs_and_is_continued(pair: tuple[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i % 28} w{i % 7} w3 w4 w{i % 5} w6"}) + "\n" for i in range(90)))
    words = ["--text", text, "--out", tmp_path, "--teacher", pair[1], "--keep-layers", 2, "--size", "tiny"]
    words += ["--float32", "--seeds", 0, 1]
    out = study(*words, "--arms", "language modelling", "threshold 12, MSE")
    assert "| threshold 12, MSE | 2 |" in out
    states = sorted(tmp_path.glob("design/tiny/arms/*/*/state.json"))
    before = [file.stat().st_mtime_ns for file in states]
    assert len(states) == 4
    out = study(*words, "--arms", "language modelling", "threshold 12, MSE", "live KL")
    assert "| live KL | 2 |" in out
    assert [file.stat().st_mtime_ns for file in states] == before
    assert study(*words, "--show", "--arms", "live KL").count("\n| ") == 3


@pytest.mark.full
def test_knowledge_inheritance_runs_from_scratch(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"The {i} quick brown foxes jump over {i % 7} lazy dogs. " * 6}) + "\n"
            for i in range(90)
        )
    )
    words = ["--text", text, "--out", tmp_path, "--world", "inheritance", "--size", "tiny", "--float32", "--seeds", 0]
    out = study(*words)
    for name in INHERITANCE_ARMS:
        assert f"| {name} | 1 |" in out
