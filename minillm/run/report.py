"""The report of a run: a self-contained HTML page that begins with the conclusion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.data.files import write_json
from minillm.evaluation.language_model_metrics import TEXT_METRICS
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.curves import curve_points, draw_curves
from minillm.evaluation.report.html import (
    answers_table,
    block,
    bullets,
    conclusion,
    heading,
    interval_cell,
    note,
    number_cell,
    table,
    text_cell,
    write_page,
)
from minillm.evaluation.report.samples import draw_samples
from minillm.evaluation.verdict import COLOURS, check_of
from minillm.run.certificate import certificate_section
from minillm.run.next_steps import next_steps
from minillm.run.progress import SAMPLES, read_log, read_stages
from minillm.run.results import current_results
from minillm.run.stages import STAGES, stage_named
from minillm.run.stages.stage import Stage
from minillm.run.written import Answer, Sample, read_lines, read_prompts, those_that_are

_REFRESH = 60  # seconds


def write_run_report(run_dir: Path, prompts: Mapping[int, str] | None = None, *, training: bool = False) -> Path:
    """Write `report.html` of a run from the files that are there, with the curves of every stage that has been trained.

    What is missing is left out, and so are results that are older than the start of a stage that they depend on.

    Args:
        run_dir: the run directory.
        prompts: text of each held-out prompt by its row number. It is used, and kept, if the run has answers but no
            `evaluate/prompts.json`.
        training: whether the run goes on, so that a browser should load the page again now and then.

    Returns:
        The path of the report.

    Raises:
        MissingError: `run_dir` is not a run directory.
    """
    stages = read_stages(run_dir)
    kept = run_dir / "evaluate" / "prompts.json"
    if kept.is_file():
        prompts = read_prompts(kept)
    elif prompts is not None and kept.parent.is_dir():
        write_json(kept, prompts)
    results = current_results(run_dir)
    sections = [
        _verdict(results, stages, run_dir),
        _results(results),
        _text_results(results),
        *(_curves(run_dir, stage, stages) for stage in reversed(STAGES)),
        draw_samples("Responses while training, token by token", those_that_are(Sample, read_lines(run_dir / SAMPLES))),
        _answers(run_dir / "evaluate", results, prompts or {}),
        certificate_section(run_dir),
        _times(stages),
        _settings(stages),
    ]
    return write_page(run_dir, sections, refresh=_REFRESH if training else 0)


def _verdict(results: dict[str, Any], stages: dict[str, Any], run_dir: Path) -> str:
    """The conclusion in a sentence, and what to try next if the check did not pass."""
    found = check_of(results) if results else None
    if found is None:
        running = [name for name, entry in stages.items() if not entry["finished"]]
        where = f"; stage {running[-1]} is not finished" if running else ""
        return conclusion(
            ("Evaluated; nothing is compared" if results else f"Not evaluated yet{where}") + ".", "yellow"
        )
    log = read_log(run_dir, stage_named("minillm"), stages)
    steps = next_steps(results, log, stages.get("minillm", {}).get("settings", {}))
    advice = heading("What to try next", level=3) + bullets(steps) if steps else ""
    return heading("Verdict") + conclusion(found["sentence"], COLOURS[found["verdict"]]) + advice


def _results(results: dict[str, Any]) -> str:
    if not results:
        return ""
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


def _text_results(results: dict[str, Any]) -> str:
    found = results.get("text")
    if not found:
        return ""
    rows = [
        [text_cell(name), *(interval_cell(scores.get(metric.key), digits=4) for metric in TEXT_METRICS)]
        for name, scores in found["models"].items()
    ]
    explained = (
        f"{found['blocks']} blocks of held-out text, {found['tokens']} predicted tokens; mean and 95 % bootstrap "
        "interval over blocks, at temperature 1. ECE is the expected calibration error: how far the probability of the "
        "most likely token is from how often it is the next one."
    )
    table_of = table(["model", *(metric.title for metric in TEXT_METRICS)], rows)
    return heading("Held-out text") + table_of + note(explained)


def _curves(run_dir: Path, stage: Stage, stages: dict[str, Any]) -> str:
    """The curves of a training stage: those that it names, and its validation."""
    if not stage.curves:
        return ""
    # Of the entries of the log, those with a loss are logged updates; the last one sums up and has no loss.
    log = read_log(run_dir, stage, stages)
    updates = [entry for entry in log if "loss" in entry]
    panels = [
        (title, {label: curve_points(updates, key) for key, label in labels.items()}) for title, labels in stage.curves
    ]
    validated = [(metric.title, curve_points(log, f"eval_{metric.key}")) for metric in (*HELD_OUT, *TEXT_METRICS)]
    panels += [(f"Validation: {title}", {"validation": points}) for title, points in validated if points]
    return draw_curves(stage.curve_title, panels)


def _answers(folder: Path, results: dict[str, Any], prompts: Mapping[int, str]) -> str:
    names = [name for name in results.get("models", {}) if os.path.isfile(folder / f"{name}.jsonl")]
    if not names:
        return ""
    seed = results["seeds"][0]
    answers = {
        name: {row["row"]: row["text"] for row in _read_answers(folder / f"{name}.jsonl") if row["seed"] == seed}
        for name in names
    }
    rows = {row for found in answers.values() for row in found}  # one of several teachers answers its own prompts only
    texts = {row: prompts.get(row, f"row {row}") for row in rows}
    return answers_table(f"Answers, seed {seed}", ("prompt", texts), answers, rows)


def _read_answers(file: Path) -> list[dict[str, Any]]:
    return those_that_are(Answer, read_lines(file))


def _times(stages: dict[str, Any]) -> str:
    rows = [
        [text_cell(stage), number_cell(entry["seconds"], digits=0)]
        for stage, entry in stages.items()
        if "seconds" in entry
    ]
    return heading("Time") + table(["stage", "seconds"], rows)


def _settings(stages: dict[str, Any]) -> str:
    """Settings that the stages were made with (`state.json` hides secrets), and the versions of the libraries."""
    settings = {key: value for entry in stages.values() for key, value in entry.get("settings", {}).items()}
    versions = {
        f"{name}, stage {stage}": value
        for stage, entry in stages.items()
        for name, value in entry.get("versions", {}).items()
    }
    if not settings and not versions:
        return ""
    explained = "A data file stands by the digest of its content."
    out = heading("Settings and versions")
    out += block("settings", title=f"{len(settings)} settings", explained=explained, rows=sorted(settings.items()))
    return out + block("settings", title="Versions", explained="", rows=list(versions.items())) if versions else out
