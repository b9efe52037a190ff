"""A run as one self-contained HTML page: the table, the check, curves, and answers side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.data.files import read_json, read_jsonl, write_json
from minillm.errors import MissingError
from minillm.evaluation.report.html import SHOWN_PROMPTS, curve_points, draw_curves, html_page, interval_cell
from minillm.evaluation.results import current_results
from minillm.evaluation.verdict import COLOURS, check_of

_COLUMNS = {
    "rouge_l": "Rouge-L",
    "reverse_kl": "KL(q‖p), nats a token",
    "finished": "finished, %",
    "length": "length, tokens",
}
# A panel's title, and the log entries it draws with their labels.
_PANELS: list[tuple[str, dict[str, str]]] = [
    ("Loss", {"loss": "total", "policy_loss": "long term", "single_step_loss": "single step"}),
    ("Reverse KL, nats a token", {"reverse_kl": "exact", "sampled_reverse_kl": "sampled"}),
    ("Response length, tokens", {"response_length": "mixture samples"}),
    ("Gradient norm", {"grad_norm": "before clipping"}),
    ("Importance weights", {"importance_weight": "mean weight", "clipped": "share clipped"}),
    ("Engine against trainer, nats", {"engine_mismatch": "mean |difference| of log q"}),
]
_WARMUP_PANELS: list[tuple[str, dict[str, str]]] = [
    ("Forward KL, nats a token", {"forward_kl": "KL(p‖q)"}),
    ("Gradient norm", {"grad_norm": "before clipping"}),
]


def write_report(run_dir: Path, prompts: Mapping[int, str] | None = None) -> Path:
    """Write `run_dir/report.html` from what is there; what is missing is left out, and so are results from before a stage was begun again.

    Args:
        prompts: text of each held-out row, for answers that none were kept with.

    Raises:
        FileNotFoundError: `run_dir` is not a run's directory.
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
        f"<h1>{html.escape(run_dir.name)}</h1>",
        _table(results),
        _check(results),
        _curves("On-policy training (minillm)", run_dir / "student" / "trainer_state.json", _PANELS),
        _curves("Warm-up", run_dir / "warmed" / "trainer_state.json", _WARMUP_PANELS),
        _answers(run_dir / "evaluate", results, prompts or {}),
        _times(read_json(run_dir / "state.json")["stages"]),
    ]
    out = run_dir / "report.html"
    out.write_text(html_page(run_dir.name, parts), encoding="utf-8")
    return out


def _table(results: dict[str, Any]) -> str:
    if not results:
        return "<p>Not evaluated yet.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(interval_cell(scores.get(key)) for key in _COLUMNS)}</tr>"
        for name, scores in results["models"].items()
    )
    heads = "".join(f"<th>{title}</th>" for title in _COLUMNS.values())
    return (
        f"<h2>Results</h2><table><tr><th>model</th>{heads}</tr>{rows}</table>"
        f"<p class=small>{results['prompts']} held-out prompts, seeds {', '.join(map(str, results['seeds']))}; mean and 95 % "
        "bootstrap interval over prompts. Rouge-L is against the teacher's answers of the other seeds, the teacher's own "
        "answers included. KL(q‖p) is over whole distributions, on each model's own samples. Every model samples by itself; "
        "nothing is mixed in. A model that babbles can have a low KL: read the answers.</p>"
    )


def _check(results: dict[str, Any]) -> str:
    found = check_of(results)
    if found is None:
        return ""
    return f"<h2>Verdict</h2><p class={COLOURS[found['verdict']]}>{html.escape(found['sentence'])}</p>"


def _curves(title: str, state: Path, panels: Sequence[tuple[str, dict[str, str]]]) -> str:
    if not state.is_file():
        return ""
    history = [entry for entry in read_json(state)["log_history"] if "loss" in entry]
    return draw_curves(
        title, [(name, {label: curve_points(history, key) for key, label in series.items()}) for name, series in panels]
    )


def _answers(folder: Path, results: dict[str, Any], prompts: Mapping[int, str]) -> str:
    names = [name for name in results.get("models", {}) if (folder / f"{name}.jsonl").is_file()]
    if not names:
        return ""
    seed = results["seeds"][0]
    answers = {
        name: {row["row"]: row["text"] for row in read_jsonl(folder / f"{name}.jsonl") if row["seed"] == seed}
        for name in names
    }
    rows = "".join(
        f"<tr><td class=answer>{html.escape(prompts.get(row, f'row {row}'))}</td>"
        + "".join(f"<td class=answer>{html.escape(answers[name].get(row, ''))}</td>" for name in names)
        + "</tr>"
        for row in sorted(answers[names[0]])[:SHOWN_PROMPTS]
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f"<h2>Answers, seed {seed}</h2><table><tr><th>prompt</th>{heads}</tr>{rows}</table>"


def _times(stages: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(stage)}</td><td class=n>{entry['seconds']:.0f}</td></tr>"
        for stage, entry in stages.items()
        if "seconds" in entry
    )
    return f"<h2>Time</h2><table><tr><th>stage</th><th>seconds</th></tr>{rows}</table>"
