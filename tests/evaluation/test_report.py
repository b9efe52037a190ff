"""The reports: every metric in every table, and the curves of every training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.data.files import write_json
from minillm.errors import MissingError
from minillm.evaluation.metrics import HELD_OUT, METRICS
from minillm.evaluation.report.suite import write_suite_report
from minillm.run import report
from minillm.run.report import write_run_report
from minillm.run.results import show_results
from minillm.run.stages import STAGES
from minillm.run.stages.minillm import MiniLLM


def state(run_dir: Path) -> None:
    write_json(run_dir / "state.json", {"stages": {"evaluate": {"finished": True, "seconds": 1.0}}})


def trained(run_dir: Path, folder: str, **logged: float) -> None:
    log = [{"step": step, "loss": 2.0 / step, **logged} for step in (1, 2)] + [{"step": 2, "train_loss": 1.5}]
    write_json(run_dir / folder / "trainer_state.json", {"log_history": log})


def test_every_metric_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = {"mean": 1.0, "spread": None}
    models = {"one": {"some": {metric.key: score for metric in METRICS}}}
    found = {"models": models, "prompts": {"some": 2}, "seeds": [1], "compared_with": "one", "differences": {}}
    write_json(tmp_path / "suite" / "results.json", found)
    page = write_suite_report(tmp_path / "suite").read_text()
    assert all(f"<th>{metric.title}</th>" in page for metric in METRICS)
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5}
    results: dict[str, Any] = {"models": {"one": {metric.key: interval for metric in HELD_OUT}}}
    write_json(tmp_path / "run" / "results.json", results | {"prompts": 1, "seeds": [1, 2]})
    state(tmp_path / "run")
    page = write_run_report(tmp_path / "run").read_text()
    assert all(f"<th>{metric.title}</th>" in page for metric in HELD_OUT)
    assert page.count("[0.50, 1.50]") == len(HELD_OUT)
    show_results(tmp_path / "run")
    shown = capsys.readouterr().out
    assert all(metric.label.split()[0] in shown for metric in HELD_OUT)


def test_every_training_stage_has_curves(tmp_path: Path) -> None:
    state(tmp_path)
    assert "<svg" not in write_run_report(tmp_path).read_text()
    stages = [stage for stage in STAGES if stage.training]
    for stage in stages:
        trained(tmp_path, str(stage.folder), grad_norm=1.0)
    page = write_run_report(tmp_path).read_text()
    assert page.count("<svg") == len(stages)
    assert all(f"<h2>{stage.curve_title}</h2>" in page for stage in stages)


def test_a_panel_that_nothing_was_logged_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Align(MiniLLM):
        folder, curve_title = "aligned", "Alignment"
        curves = (("Reward", {"reward": "mean"}), ("Nothing", {"absent": "none"}))

    monkeypatch.setattr(report, "STAGES", (Align(),))
    state(tmp_path)
    trained(tmp_path, "student", grad_norm=1.0)
    trained(tmp_path, "aligned", reward=0.5)
    page = write_run_report(tmp_path).read_text()
    assert page.count("<svg") == 1
    assert "<h2>Alignment</h2>" in page
    assert ">Reward<" in page
    assert ">Nothing<" not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"not the directory of a run \(it has no state.json\)"):
        write_run_report(tmp_path)
