"""The report of a run: a self-contained HTML page with its results, the verdict, training curves and answers."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.data.files import read_json, read_jsonl, write_json
from minillm.errors import MissingError
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.html import (
    answers_table,
    curve_points,
    draw_curves,
    heading,
    interval_cell,
    note,
    number_cell,
    table,
    text_cell,
    write_page,
)
from minillm.evaluation.verdict import COLOURS, check_of
from minillm.run.results import current_results
from minillm.run.stages import STAGES
from minillm.run.stages.stage import Stage


def write_run_report(run_dir: Path, prompts: Mapping[int, str] | None = None) -> Path:
    """Write `report.html` of a run from the files that are there, with the curves of every stage that has been trained.

    What is missing is left out, and so are results that are older than the start of a stage that they depend on.

    Args:
        run_dir: the run directory.
        prompts: text of each held-out prompt by its row number. It is used, and kept, if the run has answers but no
            `evaluate/prompts.json`.

    Returns:
        The path of the report.

    Raises:
        MissingError: `run_dir` is not a run directory.
    """
    if not (run_dir / "state.json").is_file():
        raise MissingError(f"{run_dir}: not the directory of a run (it has no state.json)")
    kept = run_dir / "evaluate" / "prompts.json"
    if kept.is_file():
        prompts = {int(row): text for row, text in read_json(kept).items()}
    elif prompts is not None and kept.parent.is_dir():
        write_json(kept, prompts)
    results = current_results(run_dir)
    sections = [
        _results(results),
        _verdict(results),
        *(_curves(run_dir, stage) for stage in reversed(STAGES)),
        _answers(run_dir / "evaluate", results, prompts or {}),
        _times(read_json(run_dir / "state.json")["stages"]),
    ]
    return write_page(run_dir, sections)


def _results(results: dict[str, Any]) -> str:
    if not results:
        return "<p>Not evaluated yet.</p>"
    rows = [
        [text_cell(name), *(interval_cell(found.get(metric.key)) for metric in HELD_OUT)]
        for name, found in results["models"].items()
    ]
    explained = (
        f"{results['prompts']} held-out prompts, seeds {', '.join(map(str, results['seeds']))}; mean and 95 % "
        "bootstrap interval over prompts. Rouge-L compares with the teacher's answers of the other seeds, also for the "
        "teacher's own answers. KL(q‖p) is taken over whole distributions, on each model's own samples, without "
        "teacher mixing. A model that babbles can have a low KL(q‖p): read the answers."
    )
    return heading("Results") + table(["model", *(metric.title for metric in HELD_OUT)], rows) + note(explained)


def _verdict(results: dict[str, Any]) -> str:
    found = check_of(results)
    if found is None:
        return ""
    return heading("Verdict") + f"<p class={COLOURS[found['verdict']]}>{html.escape(found['sentence'])}</p>"


def _curves(run_dir: Path, stage: Stage) -> str:
    """The curves of a training stage, from the `trainer_state.json` that it leaves."""
    state = run_dir / str(stage.folder) / "trainer_state.json"
    if not stage.curves or not state.is_file():
        return ""
    # Of the entries of the log, those with a loss are logged updates.
    history = [entry for entry in read_json(state)["log_history"] if "loss" in entry]
    panels = [
        (title, {label: curve_points(history, key) for key, label in labels.items()}) for title, labels in stage.curves
    ]
    return draw_curves(stage.curve_title, panels)


def _answers(folder: Path, results: dict[str, Any], prompts: Mapping[int, str]) -> str:
    names = [name for name in results.get("models", {}) if (folder / f"{name}.jsonl").is_file()]
    if not names:
        return ""
    seed = results["seeds"][0]
    answers = {
        name: {row["row"]: row["text"] for row in read_jsonl(folder / f"{name}.jsonl") if row["seed"] == seed}
        for name in names
    }
    rows = {row for found in answers.values() for row in found}  # one of several teachers answers its own prompts only
    texts = {row: prompts.get(row, f"row {row}") for row in rows}
    return answers_table(f"Answers, seed {seed}", ("prompt", texts), answers, rows)


def _times(stages: dict[str, Any]) -> str:
    rows = [
        [text_cell(stage), number_cell(entry["seconds"], digits=0)]
        for stage, entry in stages.items()
        if "seconds" in entry
    ]
    return heading("Time") + table(["stage", "seconds"], rows)
