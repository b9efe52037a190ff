"""The held-out prompts of a run: what is kept, what is loaded, and what is not done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.examples import Example, Prompt
from minillm.data.files import read_jsonl
from minillm.evaluation import evaluator
from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.heldout import evaluate_heldout
from minillm.evaluation.metrics import METRIC
from minillm.models.conventions import settle_run
from minillm.rollout.config import RolloutConfig

PROMPTS = [Prompt(Example(row, f"w{row}"), [row + 4, row + 5]) for row in (0, 2, 3, 7)]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the models that are loaded, in this order."""
    folders: list[str] = []
    original = evaluator.load_model
    monkeypatch.setattr(evaluator, "load_model", lambda *given: folders.append(given[0]) or original(*given))
    monkeypatch.setattr(evaluator, "working_dtype", lambda: torch.float32)
    return folders


def evaluated(run_dir: Path, models: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    return evaluate_heldout(
        run_dir / "evaluate",
        models,
        PROMPTS,
        settle_run(models["teacher"], template=False),
        RolloutConfig(engine="transformers", max_prompt_tokens=4),
        EvaluateConfig(seeds=[1, 2], max_new_tokens=5, bootstrap=100),
        settings=settings,
    )


def test_every_model_is_loaded_once_and_answered_once(pair: tuple[str, str], tmp_path: Path, loaded: list[str]) -> None:
    student, teacher = pair
    models = {"teacher": teacher, "warmed": student, "minillm": teacher}
    settings = {"evaluate.max_new_tokens": 5, "teacher.source": teacher}
    results = evaluated(tmp_path, models, settings)
    assert loaded == [teacher, student, teacher]  # the teacher that was sampled scores the others
    folder = tmp_path / "evaluate"
    assert {file.name for file in folder.glob("*.json")} == {"prompts.json", *(f"{name}.json" for name in models)}
    assert json.loads((folder / "prompts.json").read_text()) == {"0": "w0", "2": "w2", "3": "w3", "7": "w7"}
    for name in models:
        rows = read_jsonl(folder / f"{name}.jsonl")
        assert [(row["row"], row["seed"]) for row in rows] == [(row, seed) for seed in (1, 2) for row in (0, 2, 3, 7)]
        assert all(set(row) == {"row", "seed", "ids", "finished", "text", "reverse_kl"} for row in rows)
        note = json.loads((folder / f"{name}.json").read_text())
        assert note["settings"] == settings
        assert list(note["weights"]) == list(note["teacher"]) == ["generation_config.json", "model.safetensors"]
    assert results["prompts"] == 4
    assert results["models"]["teacher"]["reverse_kl"]["mean"] == 0
    assert results["models"]["warmed"]["reverse_kl"]["mean"] > 0.01
    assert results["models"]["minillm"]["rouge_l"] == results["models"]["teacher"]["rouge_l"]
    assert set(results["minillm_against_warmed"]) == {"rouge_l_change", "finished_change", "reverse_kl_reduction"}
    assert results["check"]["verdict"] in ("better", "no clear difference", "worse")
    del loaded[:]
    assert evaluated(tmp_path, models, settings) == results
    assert loaded == []
    (folder / "warmed.json").unlink()
    assert evaluated(tmp_path, models, settings) == results
    assert loaded == [student, teacher]
    del loaded[:]
    evaluated(tmp_path, models, {**settings, "evaluate.max_new_tokens": 4})
    assert loaded == [teacher, student, teacher]


def test_results_have_exactly_the_metrics_of_held_out_prompts(
    pair: tuple[str, str], tmp_path: Path, loaded: list[str]
) -> None:
    results = evaluated(tmp_path, {"teacher": pair[1], "student": pair[0]}, {})
    assert "check" not in results  # there is no minillm stage to judge
    for scores in results["models"].values():
        assert set(scores) == {key for key, metric in METRIC.items() if metric.held_out}
