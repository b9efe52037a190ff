"""What a recipe's trackers keep of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.data.files import read_json
from minillm.run import runner
from minillm.run.progress import SAMPLES, read_lines
from minillm.run.recipe_file import load_recipe
from tests.run.tensorboard_events import read_events
from tests.run.tiny_recipe import RECIPE


def test_tensorboard_keeps_the_metrics_and_samples_of_a_finished_stage(pair: tuple[str, str], tmp_path: Path) -> None:
    """They were deleted with the stage's working folder."""
    pytest.importorskip("tensorboard")
    data, file, run = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml", tmp_path / "run"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file.write_text(RECIPE.format(run=run, data=data, teacher=pair[1]))
    given = ["training.report_to=tensorboard", "training.logging_steps=1", "stages=[student, minillm]"]
    runner.run_recipe(load_recipe(file, given))
    scalars, texts = read_events(run / "tensorboard" / "minillm")
    history = read_json(run / "student" / "trainer_state.json")["log_history"]
    wanted = [(entry["step"], pytest.approx(entry["reverse_kl"], rel=1e-5)) for entry in history if "loss" in entry]
    assert scalars["train/reverse_kl"] == wanted
    assert len(wanted) == 3
    [(step, table), *_] = texts["samples/text_summary"]
    assert step == 1
    assert all("".join(line["tokens"]) in table for line in read_lines(run / SAMPLES) if line["update"] == 1)
