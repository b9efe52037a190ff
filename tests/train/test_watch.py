"""A student that gets worse is told of, by what was measured, how much, and which setting to try."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from minillm.evaluation.answers import token_divergences
from minillm.loss.in_forward import bind_scoring
from minillm.models.load import load_model
from minillm.run import runner
from minillm.run.recipe_file import load_recipe
from minillm.teacher.local import LocalTeacher
from minillm.train.watch import decline
from tests.run.tiny_recipe import RECIPE

WARM = ["stages=[teacher, student, responses, warmup]", "warmup.training.max_steps=5", "warmup.training.report_to=none"]


@pytest.fixture
def recipe(tmp_path: Path, pair: tuple[str, str]) -> Path:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=pair[1]))
    return file


def watched(folder: Path) -> dict[int, dict[str, Any]]:
    log = json.loads((folder / "run" / "warmed" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in log if "watched_reverse_kl" in entry}


def test_a_warm_up_that_breaks_the_student_is_told_of(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner.run_recipe(load_recipe(recipe, [*WARM, "warmup.training.learning_rate=0.5"]))
    found = watched(recipe.parent)
    assert list(found) == [0, 1, 4, 5]
    before, after = found[0]["watched_reverse_kl"], found[5]["watched_reverse_kl"]
    assert after > before
    [early, late] = [record.getMessage() for record in caplog.records if "nats a token" in record.getMessage()]
    assert early.startswith("After update 1 KL(q‖p) is ")
    assert late == (
        f"Stage warmup ended worse than it began: KL(q‖p) on some of its own training rows rose from {before:.2f} to "
        f"{after:.2f} nats a token; try warmup.training.learning_rate=0.125 (it is 0.5), and make it again (--stage "
        "warmup --redo)"
    )


def test_a_warm_up_that_helps_is_silent_and_its_rows_are_scored_as_they_are(
    recipe: Path, pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    runner.run_recipe(load_recipe(recipe, [*WARM, "warmup.training.learning_rate=1e-3"]))
    assert "nats a token" not in caplog.text
    folder = recipe.parent / "run"
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    chosen = [rows[i * len(rows) // 8] for i in range(8)]
    teacher = LocalTeacher(load_model(pair[1], load_model(folder / "warmed").dtype).float())
    for step, name in ((0, "pruned"), (5, "warmed")):
        student = load_model(folder / name).float()
        bind_scoring(student)
        prompts, answers = ([row[f"{part}_ids"] for row in chosen] for part in ("prompt", "response"))
        scores = token_divergences(student, teacher, prompts, answers, 32, 1.0)
        mean = sum(float(reverse.sum()) for reverse, _ in scores) / sum(map(len, answers))
        assert watched(recipe.parent)[step]["watched_reverse_kl"] == pytest.approx(mean, rel=1e-2), step


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ([1.0, 9.0, 1.05], "watched_reverse_kl", None),  # within a tenth
        ([1.0, 0.1, 1.5], "watched_reverse_kl", (1.0, 1.5)),
        ([0.01, 0.025], "watched_reverse_kl", None),  # a rise that nobody needs to know of
        ([1.0, 2.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.2], "reverse_kl", None),  # means of quarters
        ([1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 2.0, 2.0], "reverse_kl", (1.0, 2.0)),
        ([1.0], "reverse_kl", None),
    ],
)
def test_what_counts_as_worse(values: list[float], key: str, expected: tuple[float, float] | None) -> None:
    measures = {"eval_reverse_kl": "validation", key: "rows"}
    found = decline([{key: value} for value in values], measures)
    assert (None if found is None else (found.before, found.after)) == expected
    better = [{"eval_reverse_kl": 2.0}, {"eval_reverse_kl": 1.0}]
    assert decline([*better, *({key: value} for value in values)], measures) is None
