"""JSON without NaN, and which files of a run are still valid after a stage was run again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm import cli
from minillm.data.files import finite, write_json
from minillm.evaluation.formatting import number, with_interval
from minillm.evaluation.report.comparison import write_comparison_report
from minillm.evaluation.report.console import show_suite
from minillm.evaluation.report.suite import write_suite_report
from minillm.run.directory import RunState
from minillm.run.recipe_file import load_recipe
from minillm.run.report import write_run_report
from minillm.run.results import current_files, current_results, show_results
from tests.run.tiny_recipe import run_tiny_recipe


def strictly(file: Path) -> Any:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_undefined_numbers_are_null_in_files_and_a_dash_in_tables(tmp_path: Path) -> None:
    given = {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf, "d": np.float64("nan")}, 3: [True, None, 2]}
    want = {"a": [1.5, None, [None, "NaN"]], "b": {"c": None, "d": None}, 3: [True, None, 2]}
    assert finite(given) == want
    assert write_json(tmp_path / "new" / "x.json", given) == want
    assert strictly(tmp_path / "new" / "x.json") == want | {"3": want.pop(3)}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
    assert [number(value) for value in (1.234, None, math.nan, math.inf)] == ["1.23", "–", "–", "–"]
    assert with_interval({"mean": 1, "low": None, "high": 2.005}) == "1.00 [–, 2.00]"
    assert with_interval(None) == ""


def test_reports_show_undefined_numbers(tmp_path: Path) -> None:
    score = {"mean": None, "low": None, "high": None}
    results = {"models": {"minillm": {"rouge_l": score, "reverse_kl": score}}, "prompts": 1, "seeds": [1, 2]}
    write_json(tmp_path / "results.json", results)
    write_json(tmp_path / "state.json", {"stages": {"evaluate": {"finished": True, "seconds": 1.0}}})
    assert "– <span class=small>[–, –]</span>" in write_run_report(tmp_path).read_text()
    models = {
        "one": {"some": {"distinct_4": {"mean": None, "spread": None}, "excess_error": {"by_position": [None, 3.0]}}},
        "two": {
            "some": {"distinct_4": {"mean": 3.0, "spread": 1.0}},
            "average": {"rouge_l": {"mean": 2.0, "spread": None}},
        },
    }
    found = {"models": models, "prompts": {"some": 2}, "seeds": [1], "compared_with": "one", "differences": {"two": {}}}
    write_json(tmp_path / "results.json", found)
    page = write_suite_report(tmp_path).read_text()
    assert "<td class=n>–</td>" in page
    assert "<td class=n>3.00 <span class=small>± 1.00</span></td>" in page
    show_suite(found)
    tried = [
        {
            "settings": {},
            "rouge_l": None,
            "update": None,
            "curve": [{"step": 1, "eval_rouge_l": None}],
            "while_training": {},
        }
    ]
    write_json(tmp_path / "compare.json", {"tuning": {"sft": {"tried": tried, "chosen": 0}}})
    assert "<td class=n>–</td>" in write_comparison_report(tmp_path).read_text()


def test_answers_in_a_row_are_to_the_same_prompt(tmp_path: Path) -> None:
    """The second model has no answer to row 0, which its tokenizer makes too long."""
    models = {name: {"some": {"finished": {"mean": 1.0, "spread": None}}} for name in ("one", "two")}
    found = {"models": models, "prompts": {"some": 2}, "seeds": [1], "compared_with": "one", "differences": {}}
    write_json(tmp_path / "results.json", found)
    for name, rows in (("one", (0, 1)), ("two", (1,))):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"row": row, "text": f"{name} says {row}", "references": [f"reference {row}"]}) for row in rows
        ]
        (tmp_path / name / "some-1.jsonl").write_text("\n".join(lines))
    page = write_suite_report(tmp_path).read_text().replace(" class=answer", "")
    assert "<td>reference 0</td><td>one says 0</td><td></td></tr>" in page
    assert "<td>reference 1</td><td>one says 1</td><td>two says 1</td></tr>" in page


@pytest.fixture(scope="module")
def recipe(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny_recipe(tmp_path_factory.mktemp("results"), pair[1])


def test_an_evaluation_writes_the_report_and_the_model_cards_again(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    report, card = run / "report.html", run / "student" / "README.md"
    for file in (report, card):
        file.write_text("old")
    (run / "evaluate" / "prompts.json").unlink()
    RunState(load_recipe(recipe)).forget("evaluate")
    assert current_results(run) == {}
    cli.evaluate(recipe)
    assert "w0 w3" in report.read_text()
    assert "Verdict" in report.read_text()
    assert "| minillm | " in card.read_text()
    shown = capsys.readouterr().out
    results = strictly(run / "results.json")
    assert results["check"]["sentence"] in " ".join(shown.split())
    assert shown.endswith(f"Results: {run} (report.html, results.json, student)\n")
    cli.report(run)  # the evaluation has kept the prompts
    assert "row 0" not in report.read_text()
    assert "w0 w3" in report.read_text()


def test_the_notes_of_a_run_hold_no_settings_of_training(recipe: Path) -> None:
    """They decide the weights of the models, which are noted too."""
    settings = json.loads((recipe.parent / "run" / "evaluate" / "minillm.json").read_text())["settings"]
    assert settings["evaluate.max_new_tokens"] == 8
    assert {key.split(".")[0] for key in settings} == {"data", "evaluate", "rollout", "teacher"}
    assert {key for key in settings if key.startswith("rollout")} == {"rollout.stop"}


def test_only_valid_results_are_shown(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    report, results, student = (run / name for name in ("report.html", "results.json", "student"))
    write_run_report(run)
    assert current_files(run) == [report, results, student]
    later = report.stat().st_mtime_ns + 10**9
    os.utime(results, ns=(later, later))
    assert current_files(run) == [results, student]  # the report is older than the results
    RunState(load_recipe(recipe)).forget("minillm")
    assert current_files(run) == []
    capsys.readouterr()
    show_results(run)
    shown = capsys.readouterr().out
    assert shown.strip() == f"Results: {run}"
    assert "Not evaluated yet" in write_run_report(run).read_text()
