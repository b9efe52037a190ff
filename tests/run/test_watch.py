"""`minillm watch`: what it shows of runs that go on, are finished, or are broken; and what a training leaves for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from minillm.data.files import write_json, write_jsonl
from minillm.errors import MissingError
from minillm.run import live
from minillm.run.live import LiveLog, LiveReport
from minillm.run.progress import read_lines
from minillm.run.watch import find_alarms, seconds_left, sparkline, view, watch


def shown(run_dir: Path, now: float = 1000.0) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view(run_dir, now))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def entries(count: int, **values: Any) -> list[dict[str, Any]]:
    return [
        {"step": n, "max_steps": 100, "time": 1000.0 - 2 * (count - n), "loss": 1.0, "reverse_kl": 2 / n, **values}
        for n in range(1, count + 1)
    ]


CHECK = {"verdict": "better", "passed": True, "sentence": "minillm is better.", "criteria": []}


def running(run_dir: Path, log: list[dict[str, Any]]) -> Path:
    stages = {"warmup": {"finished": True, "seconds": 12.0}, "minillm": {"finished": False}}
    write_json(run_dir / "state.json", {"stages": stages})
    write_jsonl(run_dir / "logs" / "minillm.jsonl", log)
    sample = {"update": 40, "prompt": "Why [bold]?", "tokens": ["So", " it"], "kl": [3.0, None]}
    sample |= {"origin": "sampled", "length": 2, "finished": True, "advantage": [None, None]}
    write_jsonl(run_dir / "samples.jsonl", [sample])
    return run_dir


def test_a_run_that_goes_on_is_shown_with_the_time_left(tmp_path: Path) -> None:
    text = shown(running(tmp_path, entries(40)))
    assert "✓ warmup 12 s" in text
    assert "▶ minillm" in text
    assert "update 40 of 100, 2 min 00 s left" in text  # 60 updates of two seconds
    assert "reverse_kl" in text
    assert "2 → 0.05" in text
    assert "Why [bold]?" in text
    assert "So it" in text
    assert "!" not in text
    assert "is the run still alive" in shown(tmp_path, now=3000.0)


def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    file = running(tmp_path, entries(3)) / "logs" / "minillm.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "los')
    assert "update 3 of 100" in shown(tmp_path)
    file.unlink()
    assert "nothing is logged yet" in shown(tmp_path)
    assert read_lines(file) == []


def test_a_finished_run_is_shown_with_its_conclusion(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"stages": {n: {"finished": True} for n in ("minillm", "evaluate", "later")}})
    write_json(tmp_path / "student" / "trainer_state.json", {"log_history": [{"step": 5, "loss": 1.0}]})
    write_json(tmp_path / "results.json", {"models": {}, "prompts": 1, "seeds": [1], "check": CHECK})
    text = shown(tmp_path)
    assert "update 5 of 5" in text
    assert "minillm is better." in text
    console = Console(file=io.StringIO())
    watch(tmp_path, console=console)  # not a terminal: it is shown once
    assert "update 5 of 5" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="not the directory of a run"):
        watch(tmp_path)


def test_alarms() -> None:
    assert find_alarms(entries(20)) == []
    assert "differ by 0.20 nats" in find_alarms(entries(20, engine_mismatch=0.2))[0]
    assert "80% of the tokens" in find_alarms(entries(20, clipped=0.8))[0]
    assert "not finite" in find_alarms(entries(20, loss=None))[0]
    rising = [{"step": n, "reverse_kl": float(n)} for n in range(1, 21)]
    (alarm,) = find_alarms(rising)
    assert alarm.startswith("reverse_kl rose from 2.50 to 18.50. Lower the learning rate to a quarter")


def test_curves_and_times() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([5.0]) == "▁"
    assert len(sparkline([float(n) for n in range(1000)])) == 40
    assert seconds_left(entries(1)) is None
    assert seconds_left(entries(100)) == 0


def test_a_training_leaves_its_log_at_once(tmp_path: Path) -> None:
    log, state = LiveLog(tmp_path, "minillm"), SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=True)
    file = tmp_path / "logs" / "minillm.jsonl"
    log.on_log(None, state, None, {"watched_reverse_kl": 1.0})  # by another callback that is told first
    log.on_train_begin(None, state, None)
    assert len(read_lines(file)) == 1
    file.unlink()
    for state.global_step in (0, 1, 2, 3):
        log.on_log(None, state, None, {"loss": float("nan")})
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(entry["step"], entry["max_steps"], entry["loss"]) for entry in found] == [(n, 4, None) for n in range(4)]
    state.global_step = 2  # continued from a checkpoint
    LiveLog(tmp_path, "minillm").on_train_begin(None, state, None)
    assert [entry["step"] for entry in read_lines(file)] == [0, 1, 2]
    state.global_step = 0
    LiveLog(tmp_path, "minillm").on_train_begin(None, state, None)
    assert read_lines(file) == []


def test_the_report_is_written_again_while_a_stage_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path, entries(40))
    sample = {"update": 1, "origin": "sampled", "length": 1, "finished": True, "prompt": "p"}
    write_jsonl(tmp_path / "samples.jsonl", [sample | {"tokens": ["t"], "kl": [1.0], "advantage": [1.0]}])
    report, state, page = LiveReport(tmp_path), SimpleNamespace(is_world_process_zero=True), tmp_path / "report.html"
    report.on_log(None, state, None)
    assert not page.exists()  # not at once
    clock = iter((100.0, 102.0, 190.0, 250.0, 250.0))
    report._last = 0.0
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    report.on_log(None, state, None)
    text = page.read_text()
    assert "Not evaluated yet; stage minillm is not finished." in text
    assert "On-policy training" in text
    assert 'http-equiv="refresh"' in text
    page.unlink()
    report.on_log(None, state, None)  # it took 2 s, so the next one waits for 100
    assert not page.exists()
    report.on_log(None, state, None)
    assert page.exists()
