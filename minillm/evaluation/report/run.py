"""The report of a run: a self-contained HTML page with its results, the verdict, training curves and answers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.data.files import read_json, read_jsonl, write_json
from minillm.errors import MissingError
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.html import (
    answers_table,
    curve_points,
    draw_curves,
    heading,
    html_page,
    interval_cell,
    note,
    number_cell,
    table,
    text_cell,
)
from minillm.evaluation.results import current_results
from minillm.evaluation.verdict import COLOURS, check_of

LogPanel = tuple[str, Mapping[str, str]]
"""A panel's title, and the label of each curve by the name of its entry in the training log."""


class TrainingCurves(NamedTuple):
    """The curves of a training stage, read from the `trainer_state.json` that it leaves.

    Attributes:
        title: Heading of the figure.
        folder: The stage's folder in the run directory.
        panels: The panels; those without an entry in the log are left out.
    """

    title: str
    folder: str
    panels: Sequence[LogPanel]


def write_report(
    run_dir: Path, prompts: Mapping[int, str] | None = None, curves: Sequence[TrainingCurves] = ()
) -> Path:
    """Write `report.html` of a run from the files that are there.

    What is missing is left out, and so are results that are older than the start of a stage that they depend on.

    Args:
        run_dir: The run's directory.
        prompts: Text of each held-out prompt by its row number. It is used, and kept, if the run has answers but no
            `evaluate/prompts.json`.
        curves: The training stages whose curves are drawn.

    Returns:
        The report's path.

    Raises:
        MissingError: `run_dir` is not the directory of a run.
    """
    if not (run_dir / "state.json").is_file():
        raise MissingError(f"{run_dir}: not the directory of a run (it has no state.json)")
    kept = run_dir / "evaluate" / "prompts.json"
    if kept.is_file():
        prompts = {int(row): text for row, text in read_json(kept).items()}
    elif prompts is not None and kept.parent.is_dir():
        write_json(kept, prompts)
    results = current_results(run_dir)
    parts = [
        heading(run_dir.name, level=1),
        _results(results),
        _verdict(results),
        *(_curves(run_dir, stage) for stage in curves),
        _answers(run_dir / "evaluate", results, prompts or {}),
        _times(read_json(run_dir / "state.json")["stages"]),
    ]
    out = run_dir / "report.html"
    out.write_text(html_page(run_dir.name, parts), encoding="utf-8")
    return out


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


def _curves(run_dir: Path, stage: TrainingCurves) -> str:
    state = run_dir / stage.folder / "trainer_state.json"
    if not state.is_file():
        return ""
    history = [
        entry for entry in read_json(state)["log_history"] if "loss" in entry
    ]  # one entry for each logged update
    panels = [
        (title, {label: curve_points(history, key) for key, label in labels.items()}) for title, labels in stage.panels
    ]
    return draw_curves(stage.title, panels)


def _answers(folder: Path, results: dict[str, Any], prompts: Mapping[int, str]) -> str:
    names = [name for name in results.get("models", {}) if (folder / f"{name}.jsonl").is_file()]
    if not names:
        return ""
    seed = results["seeds"][0]
    answers = {
        name: {row["row"]: row["text"] for row in read_jsonl(folder / f"{name}.jsonl") if row["seed"] == seed}
        for name in names
    }
    rows = answers[names[0]]
    texts = {row: prompts.get(row, f"row {row}") for row in rows}
    return answers_table(f"Answers, seed {seed}", ("prompt", texts), answers, rows)


def _times(stages: dict[str, Any]) -> str:
    rows = [
        [text_cell(stage), number_cell(entry["seconds"], digits=0)]
        for stage, entry in stages.items()
        if "seconds" in entry
    ]
    return heading("Time") + table(["stage", "seconds"], rows)
