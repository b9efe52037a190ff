"""The reports: every metric in every table, and the curves of every training stage."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minillm.data.files import write_json, write_jsonl
from minillm.errors import MissingError
from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.metrics import HELD_OUT, METRICS
from minillm.evaluation.report import html
from minillm.evaluation.report.curves import draw_curves
from minillm.evaluation.report.suite import write_suite_report
from minillm.evaluation.verdict import check
from minillm.run import report
from minillm.run.next_steps import next_steps
from minillm.run.report import write_run_report
from minillm.run.results import show_results
from minillm.run.stages import STAGES
from minillm.run.stages.minillm import MiniLLM
from minillm.run.stages.stage import Stage


def state(run_dir: Path) -> None:
    write_json(run_dir / "state.json", {"stages": {"evaluate": {"finished": True, "seconds": 1.0}}})


def trained(run_dir: Path, folder: str, **logged: float) -> None:
    log = [{"step": step, "loss": 2.0 / step, **logged} for step in (1, 2)] + [{"step": 2, "train_loss": 1.5}]
    write_json(run_dir / folder / "trainer_state.json", {"log_history": log})


def missing(stage: Stage) -> int:
    """Panels of a stage that show neither the loss nor the norm of the gradient, which `trained` logs."""
    return sum(not {"loss", "grad_norm"} & labels.keys() for _, labels in stage.curves)


class Page(HTMLParser):
    """Reads a page: what it loads, its text by the innermost tag, and the tags that are left open."""

    alone = frozenset({"meta", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.alone else [tag]
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "poster", "data") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() not in (tag,):
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.open and self.open[-1] in ("style", "script"):
            self.loads += re.findall(r"@import.*|url\((?!#).*|https?://\S+|\bfetch\(|XMLHttpRequest", data)


TAGS = (
    "html head body title style script h1 h2 h3 p span table tr th td b ul li details summary div figure text svg g "
    "defs label select option button clippath"
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> $x$ \"'&"


def hostile_run(run_dir: Path) -> Path:
    """A run in whose prompts, answers, names and settings there is HTML, which trained one stage and is evaluated."""
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5}
    scores = {metric.key: interval for metric in HELD_OUT}
    changes = {
        "reverse_kl_reduction": {"mean": -0.2, "low": -0.3, "high": -0.1},
        "rouge_l_change": {"mean": -5.0, "low": -6.0, "high": -4.0},
        "finished_change": {"mean": -9.0, "low": -9.5, "high": -8.0},
    }
    results = {"models": {HOSTILE: scores, "minillm": scores}, "prompts": 12, "seeds": [1, 2]}
    write_json(run_dir / "results.json", results | {"check": check(changes, EvaluateConfig())})
    settings = {"training.learning_rate": 4e-5, "rollout.max_new_tokens": 64, "data.system": HOSTILE}
    done = {"finished": True, "seconds": 3.0, "settings": settings, "versions": {"torch": HOSTILE}}
    write_json(run_dir / "state.json", {"stages": {"minillm": done, "evaluate": {"finished": True, "seconds": 1.0}}})
    log = [{"step": n, "loss": 1.0, "reverse_kl": 1 + n / 8, "clipped": 0.5, "engine_mismatch": 0.2} for n in range(8)]
    write_json(run_dir / "student" / "trainer_state.json", {"log_history": log})
    write_json(run_dir / "evaluate" / "prompts.json", {row: f"{row} {HOSTILE}" for row in range(25)})
    rows = [{"row": row, "seed": 1, "text": f"answer {row} {HOSTILE}"} for row in range(25)]
    write_jsonl(run_dir / "evaluate" / "minillm.jsonl", rows)
    sample = {"update": 3, "origin": "sampled", "length": 2, "finished": False, "prompt": HOSTILE, "teacher": HOSTILE}
    tokens = {"tokens": [HOSTILE, " b"], "kl": [1.0, None], "advantage": [0.5, -0.5], "teacher_share": [0.25, 1.0]}
    write_jsonl(run_dir / "samples.jsonl", [sample | tokens])
    return run_dir


def test_a_page_loads_nothing_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    text = write_run_report(hostile_run(tmp_path / "<b>run</b>"), training=True).read_text()
    page = Page(text)
    assert page.loads == page.handlers == []
    assert {tag for tag, data in page.texts if data.strip()} <= set(TAGS.split())
    assert page.open == []
    scripts = [data for tag, data in page.texts if tag == "script"]
    assert not any("alert" in data for data in scripts)
    seen = [data for tag, data in page.texts if tag not in ("script", "style")]
    # In a cell of the prompt, in one of the answer, in settings and versions, and in the view of the tokens.
    assert sum(HOSTILE in data for data in seen) > 50
    assert 'http-equiv="refresh" content="60"' in text
    assert "refresh" not in write_run_report(tmp_path / "<b>run</b>").read_text()


def test_a_page_begins_with_the_conclusion_and_says_what_to_try(tmp_path: Path) -> None:
    text = write_run_report(hostile_run(tmp_path)).read_text()
    sentence = text.index("minillm is worse than the warmed-up student")
    assert sentence < text.index("<h2>Results")
    steps = text[text.index("What to try next") : text.index("<h2>Results")]
    assert "rose from 1.06 to 1.81 nats a token: lower training.learning_rate (it is 4e-05; try 1e-05)" in steps
    assert "50% of the tokens were clipped" in steps
    assert "objective.old_logprobs: trainer" in steps
    assert "raise rollout.max_new_tokens (it is 64)" in steps
    assert "data.text" in steps


def test_nothing_is_advised_after_a_check_that_passed() -> None:
    changes = {"reverse_kl_reduction": {"mean": 0.2, "low": 0.1, "high": 0.3}}
    results = {"prompts": 3, "seeds": [1, 2], "check": check(changes, EvaluateConfig())}
    falling = [{"reverse_kl": value} for value in (4, 3, 2, 1)]
    assert next_steps(results, falling, {}) == []
    unclear = {"reverse_kl_reduction": {"mean": 0.0, "low": -0.1, "high": 0.1}}
    first, second = next_steps(results | {"check": check(unclear, EvaluateConfig())}, falling, {})
    assert "still falling at the end (2.00 → 1.00 nats" in first
    assert "3 prompts and 2 seeds" in second


def test_tokens_are_coloured_by_kl_and_by_who_drew_them(tmp_path: Path) -> None:
    text = write_run_report(hostile_run(tmp_path)).read_text()
    assert '<span style="--k:0.50;--t:0.25" title="KL 1.00 nats, advantage 0.50, drawn by the teacher' in text
    assert '<span style="--k:0.00;--t:1.00" title="KL – nats, advantage -0.50, drawn by' in text
    assert "update 3, sampled, 2 tokens, cut at the length limit" in text
    assert text.count("<tr data-row>") == 25  # of which the page shows ten at a time


def test_drawings_take_their_colours_from_the_page(tmp_path: Path) -> None:
    many = {name: [(step, step / 3) for step in range(5000)] for name in ("a", "$b$")}
    drawn = draw_curves("Two", [("<b>KL</b>", many), ("None", {"a": []})])
    assert drawn.count("<svg") == 1
    assert {"var(--c0)", "var(--c1)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert "#0708" not in drawn
    assert "$b$" in drawn
    assert "&lt;b&gt;KL&lt;/b&gt;" in drawn
    assert len(drawn) < 80_000
    assert drawn == draw_curves("Two", [("<b>KL</b>", many)])


def test_the_script_of_a_page_is_javascript(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, which reads the script")
    script = tmp_path / "page.js"
    script.write_text((Path(html.__file__).parent / "templates" / "page.js").read_text())
    done = subprocess.run([node, "--check", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    assert page.count("<div class=curves>") == len(stages)
    assert page.count("<svg") == sum(len(stage.curves) - missing(stage) for stage in stages)
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
