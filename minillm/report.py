"""A run as one self-contained HTML page: the table, the check, curves, and answers side by side."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.data.examples import read_jsonl
from minillm.results import current_results, number, read_json, write_json
from minillm.verdict import COLOURS, check_of

_SHOWN = 24  # prompts in the side-by-side table
_COLUMNS = {"rouge_l": "Rouge-L", "reverse_kl": "KL(q‖p), nats a token", "finished": "finished, %", "length": "length, tokens"}
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
_SUITE_COLUMNS = {
    "rouge_l": "Rouge-L", "exact_match": "exact match, %", "distinct_4": "distinct-4, %", "finished": "finished, %",
    "length": "length, tokens", "reverse_kl": "KL(q‖p), nats a token", "forward_kl": "KL(p‖q), nats a token", "ece": "ECE, 0 to 1",
}  # fmt: skip
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2330}
table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{border:1px solid #d5dae3;padding:.4rem .6rem;vertical-align:top}
th{background:#eef1f6;text-align:left}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.small{color:#5b6577;font-size:13px}.green{color:#1a7f37}.yellow{color:#9a6700}.red{color:#c62828}svg{max-width:100%;height:auto}
td.answer{white-space:pre-wrap;font-size:13px;width:22%}
"""


def write_report(run_dir: Path, prompts: Mapping[int, str] | None = None) -> Path:
    """Write `run_dir/report.html` from what is there; what is missing is left out, and so are results from before a stage was begun again.

    Args:
        prompts: text of each held-out row, for answers that none were kept with.

    Raises:
        FileNotFoundError: `run_dir` is not a run's directory.
    """
    if not (run_dir / "state.json").is_file():
        raise FileNotFoundError(f"{run_dir}: not the directory of a run (it has no state.json)")
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
    out.write_text(_page(run_dir.name, parts), encoding="utf-8")
    return out


def write_suite_report(out: Path) -> Path:
    """Write `out/report.html` from the results and answers of a suite that lie there."""
    results = read_json(out / "results.json")
    parts = [f"<h1>{html.escape(out.name)}</h1>", *(_set_table(results, name) for name in [*results["prompts"], "average"])]
    parts += [_by_words(results), _exposure(results)]
    for name in results["prompts"]:
        answers = {model: out / model / f"{name}-{results['seeds'][0]}.jsonl" for model in results["models"]}
        parts.append(_side_by_side(f"Answers: {name}", {model: read_jsonl(file) for model, file in answers.items() if file.is_file()}))
    page = out / "report.html"
    page.write_text(_page(out.name, parts), encoding="utf-8")
    return page


def write_comparison_report(root: Path) -> Path:
    """Write `root/report.html` from a comparison's `compare.json`: curves of every method, and the tests where they were read."""
    results = read_json(root / "compare.json")
    parts = [f"<h1>{html.escape(root.name)}</h1>", *_validation_curves(results), _tuning(results["tuning"])]
    if tests := results.get("tests"):
        parts += [*(_set_table(tests, name) for name in [*tests["prompts"], "average"]), _pairs(results["differences"]), _by_words(tests)]
    page = root / "report.html"
    page.write_text(_page(root.name, parts), encoding="utf-8")
    return page


def _validation_curves(results: dict[str, Any]) -> list[str]:
    """Of the settings that each method was taken with, its first training seed; from where all start, if that was validated."""
    titles = {"eval_rouge_l": "Rouge-L", "eval_reverse_kl": "KL(q‖p), nats a token"}
    start = [{**entry, "step": 0} for entry in results.get("start", {}).get("curve", [])[-1:]]
    panels = [
        (title, {name: _points(start + found["tried"][found["chosen"]]["curve"], key) for name, found in results["tuning"].items()})
        for key, title in titles.items()
    ]
    return [_drawn("Validation while training", panels, columns=2, height=4.4)]


def _tuning(tuning: dict[str, Any]) -> str:
    rows = ""
    for name, found in tuning.items():
        for i, run in enumerate(found["tried"]):
            mark = " <b>chosen</b>" if i == found["chosen"] else ""
            settings = html.escape(json.dumps(run["settings"]))
            rows += f"<tr><td>{html.escape(name)}{mark}</td><td>{settings}</td>{_plain(run['rouge_l'])}{_plain(run['update'])}</tr>"
        for run in found.get("other_seeds", []):
            rows += (
                f"<tr><td>{html.escape(name)}</td><td>training seed {run['seed']}</td>{_plain(run['rouge_l'])}{_plain(run['update'])}</tr>"
            )
    heads = "<th>method</th><th>settings</th><th>best validation Rouge-L</th><th>at update</th>"
    return f"<h2>Tuning</h2><table><tr>{heads}</tr>{rows}</table>"


def _plain(value: float | None) -> str:
    return f"<td class=n>{number(value).removesuffix('.00')}</td>"


def _set_table(results: dict[str, Any], name: str) -> str:
    columns = {key: title for key, title in _SUITE_COLUMNS.items() if any(key in sets.get(name, {}) for sets in results["models"].values())}
    if not columns:
        return ""
    rows = ""
    for model, sets in results["models"].items():
        change = results["differences"].get(model, {}).get(name)
        rows += f"<tr><td>{html.escape(model)}</td>"
        for key in columns:
            score = sets.get(name, {}).get(key)
            spread = f" <span class=small>± {number(score['spread'])}</span>" if score and score.get("spread") is not None else ""
            rows += "<td class=n></td>" if score is None else f"<td class=n>{number(score['mean'])}{spread}</td>"
        rows += f"{_cell(change)}</tr>"
    heads = "".join(f"<th>{title}</th>" for title in columns.values())
    count = f", {results['prompts'][name]} prompts" if name in results["prompts"] else " of the sets"
    return (
        f"<h2>{html.escape(name)}{count}</h2><table><tr><th>model</th>{heads}"
        f"<th>Rouge-L, difference to {html.escape(results['compared_with'])}</th></tr>{rows}</table>"
        f"<p class=small>Mean ± standard deviation over seeds {', '.join(map(str, results['seeds']))}; differences are paired over "
        "prompts, with a 95 % bootstrap interval.</p>"
    )


def _pairs(differences: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(one)}</td>{''.join(_cell(found.get(other)) for other in differences)}</tr>"
        for one, found in differences.items()
    )
    heads = "".join(f"<th>− {html.escape(other)}</th>" for other in differences)
    return (
        f"<h2>Differences on the average of the sets</h2><table><tr><th>method</th>{heads}</tr>{rows}</table>"
        "<p class=small>Rouge-L, all training seeds of a method together; paired over prompts, with a 95 % bootstrap interval. Prompts are "
        "resampled, training seeds are not.</p>"
    )


def _by_words(results: dict[str, Any]) -> str:
    """Rouge-L by the length of the reference."""
    out = ""
    for name in results["prompts"]:
        found = {model: sets.get(name, {}).get("rouge_l_by_reference_words", {}) for model, sets in results["models"].items()}
        bins = list(dict.fromkeys(key for values in found.values() for key in values))
        if bins:
            heads = "".join(f"<th>{key} words</th>" for key in bins)
            rows = ""
            for model, values in found.items():
                cells = "".join(f"<td class=n>{number(values.get(key))}</td>" for key in bins)
                rows += f"<tr><td>{html.escape(model)}</td>{cells}</tr>"
            title = f"{html.escape(name)}: Rouge-L by the length of the reference"
            out += f"<h3>{title}</h3><table><tr><th>model</th>{heads}</tr>{rows}</table>"
    return out


def _exposure(results: dict[str, Any]) -> str:
    """Excess accumulated error by position, where it was asked for."""
    panels = [
        (f"{name}: excess error, %", {
            model: [(at, value) for at, value in enumerate(sets[name]["excess_error"]["by_position"], 1) if value is not None]
            for model, sets in results["models"].items() if "excess_error" in sets.get(name, {})
        })
        for name in results["prompts"]
    ]  # fmt: skip
    return _drawn("Exposure bias", panels, columns=2, height=4.0, along="token of the answer")


def _side_by_side(title: str, answers: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """By row: a model whose tokenizer makes a prompt too long has no answer to it."""
    by_row = {model: {row["row"]: row for row in rows} for model, rows in answers.items()}
    rows = sorted(set().union(*by_row.values()))[:_SHOWN]
    if not rows:
        return ""
    heads = "".join(f"<th>{html.escape(model)}</th>" for model in answers)
    body = ""
    for row in rows:
        references = next(found[row] for found in by_row.values() if row in found).get("references", [])
        texts = [" / ".join(references), *(found[row]["text"] if row in found else "" for found in by_row.values())]
        body += f"<tr>{''.join(f'<td class=answer>{html.escape(text)}</td>' for text in texts)}</tr>"
    return f"<h2>{html.escape(title)}</h2><table><tr><th>reference</th>{heads}</tr>{body}</table>"


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)} · minillm</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _cell(interval: dict[str, float | None] | None) -> str:
    if interval is None:
        return "<td class=n></td>"
    ends = f"[{number(interval['low'])}, {number(interval['high'])}]"
    return f"<td class=n>{number(interval['mean'])} <span class=small>{ends}</span></td>"


def _table(results: dict[str, Any]) -> str:
    if not results:
        return "<p>Not evaluated yet.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(_cell(scores.get(key)) for key in _COLUMNS)}</tr>"
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
    return _drawn(title, [(name, {label: _points(history, key) for key, label in series.items()}) for name, series in panels])


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def _drawn(
    title: str,
    panels: Sequence[tuple[str, dict[str, list[tuple[int, float]]]]],
    columns: int = 3,
    height: float = 3.1,
    along: str = "update",
) -> str:
    """Panels of curves, those without a point left out."""
    present = [panel for panel in panels if any(panel[1].values())]
    if not present:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(present) // columns)
    figure = Figure(figsize=(12, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(present) :]:
        axis.set_visible(False)
    for axis, (name, series) in zip(axes, present, strict=False):
        for label, points in series.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", linewidth=1.4, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(along, fontsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=8)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    return f"<h2>{title}</h2>{svg[svg.index('<svg') :]}"


def _answers(folder: Path, results: dict[str, Any], prompts: Mapping[int, str]) -> str:
    names = [name for name in results.get("models", {}) if (folder / f"{name}.jsonl").is_file()]
    if not names:
        return ""
    seed = results["seeds"][0]
    answers = {name: {row["row"]: row["text"] for row in read_jsonl(folder / f"{name}.jsonl") if row["seed"] == seed} for name in names}
    rows = "".join(
        f"<tr><td class=answer>{html.escape(prompts.get(row, f'row {row}'))}</td>"
        + "".join(f"<td class=answer>{html.escape(answers[name].get(row, ''))}</td>" for name in names)
        + "</tr>"
        for row in sorted(answers[names[0]])[:_SHOWN]
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
