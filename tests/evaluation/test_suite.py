"""Suites on tiny models: which answers are sampled, kept and reused, and what their results are."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from minillm import cli
from minillm.data.files import read_jsonl
from minillm.errors import DataError, RecipeError, VocabularyError
from minillm.evaluation import evaluator, suite
from minillm.evaluation.config import Suite, TestSet, named_models
from minillm.evaluation.metrics import calibration_error, excess_error, rouge_l
from minillm.evaluation.report.console import show_suite
from minillm.evaluation.report.suite import write_suite_report
from minillm.evaluation.sets import check_suite, read_set
from minillm.models.load import load_model
from minillm.rollout.engines.choose import ENGINES
from minillm.run.recipe_file import load_recipe, load_suite
from tests.conftest import save, tiny_llama

ROWS = [
    {
        "instruction": f"w{i} w{i + 1}",
        "output": [" ".join(f"w{(i * k) % 28}" for k in range(i + 1)), "w5 w6"] if i % 2 else "w3",
    }
    for i in range(8)
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "some.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (folder / "bare.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i}"}) for i in range(3)))
    return str(folder)


def make(data: str, out: Path, **changes: Any) -> Suite:
    sets = {
        "some": {"file": "some.jsonl"},
        "long": {"file": "some.jsonl", "min_reference_words": 4},
        "bare": {"file": "bare.jsonl"},
    }
    settings = {
        "out": out,
        "data_dir": data,
        "sets": sets,
        "template": "plain",
        "max_new_tokens": 6,
        "max_prompt_tokens": 8,
    }
    return Suite.model_validate({**settings, "engine": "transformers", "seeds": [1, 2], "bootstrap": 200, **changes})


@pytest.fixture
def models(pair: tuple[str, str]) -> dict[str, str]:
    return {"student": pair[0], "teacher": pair[1]}


def test_results_follow_from_the_kept_answers(data: str, models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = suite.run_suite(make(data, out, teacher=models["teacher"]), models)
    assert results == json.loads((out / "results.json").read_text())
    for name in models:
        kept = [read_jsonl(out / name / f"some-{seed}.jsonl") for seed in (1, 2)]
        for rows in kept:
            assert [row["row"] for row in rows] == list(range(8))
            for row, given in zip(rows, ROWS, strict=True):
                references = given["output"] if isinstance(given["output"], list) else [given["output"]]
                assert row["rouge_l"] == pytest.approx(rouge_l(row["text"], references))
        by_seed = [np.mean([row["rouge_l"] for row in rows]) for rows in kept]
        found = results["models"][name]["some"]["rouge_l"]
        assert found["by_seed"] == pytest.approx(by_seed)
        assert found["mean"] == pytest.approx(np.mean(by_seed))
        assert found["spread"] == pytest.approx(np.std(by_seed, ddof=1))
        assert "rouge_l" not in results["models"][name]["bare"]  # without references
        averages = [results["models"][name][key]["rouge_l"]["mean"] for key in ("some", "long")]
        assert results["models"][name]["average"]["rouge_l"]["mean"] == pytest.approx(np.mean(averages))
    assert results["prompts"] == {"some": 8, "long": 3, "bare": 3}
    assert results["models"]["teacher"]["some"]["reverse_kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert results["models"]["student"]["some"]["reverse_kl"]["mean"] > 0.01
    change = results["differences"]["teacher"]
    means = [results["models"][name]["average"]["rouge_l"]["mean"] for name in ("student", "teacher")]
    assert change["average"]["mean"] == pytest.approx(means[1] - means[0])
    assert change["some"]["low"] <= change["some"]["mean"] <= change["some"]["high"]
    page = write_suite_report(out).read_text()
    assert "<h2>some, 8 prompts</h2>" in page
    assert "difference to student" in page
    assert "Rouge-L by the length of the reference" in page


def test_a_part_is_made_again_only_if_something_changed(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    made: list[tuple[int, list[int]]] = []
    original = evaluator.answer
    monkeypatch.setattr(
        evaluator,
        "answer",
        lambda engine, prompts, *rest: made.append((len(prompts), rest[1])) or original(engine, prompts, *rest),
    )
    first = suite.run_suite(make(data, out), models)
    assert made == [(8, [1, 2]), (3, [1, 2])] * 2  # all seeds of a set at once; `long` is a part of `some`
    for name in models:
        some, long = (read_jsonl(out / name / f"{key}-2.jsonl") for key in ("some", "long"))
        assert long == [row for row in some if max(len(text.split()) for text in row["references"]) >= 4]
    assert suite.run_suite(make(data, out), models) == first
    assert len(made) == 4
    suite.run_suite(make(data, out, seeds=[1, 2, 3]), models)
    assert made[4:] == [(8, [3]), (3, [3])] * 2
    suite.run_suite(make(data, tmp_path / "together", seeds=[2, 3]), {"student": models["student"]})
    kept = {seed: [row["ids"] for row in read_jsonl(out / "student" / f"some-{seed}.jsonl")] for seed in (1, 2, 3)}
    for seed in (2, 3):  # sampled together with another seed, and alone
        assert [row["ids"] for row in read_jsonl(tmp_path / "together" / "student" / f"some-{seed}.jsonl")] == kept[
            seed
        ]
    assert kept[1] != kept[2] != kept[3]
    del made[8:]
    suite.run_suite(make(data, out, temperature=0.5), {"student": models["student"]})
    assert len(made) == 8 + 2
    with (Path(data) / "some.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"instruction": "w9", "output": "w1"}))
    suite.run_suite(make(data, out, temperature=0.5), {"student": models["student"]})
    assert made[10:] == [(9, [1, 2])]


def test_an_interruption_loses_one_set_of_one_model_at_most(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = evaluator.answer

    def fail_at_the_third(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(evaluator, "answer", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(make(data, tmp_path / "out"), models)
    suite.run_suite(make(data, tmp_path / "out"), models)
    assert calls == 3 + 4 - 2


def test_a_sample_covers_the_file_and_is_always_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "output": " ".join(["w1"] * (1 + i % 4))} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    some = read_set("x", TestSet(file=Path("rows.jsonl"), sample=10), str(tmp_path))
    assert [e.row for e in some] == sorted({e.row for e in some})
    assert len(some) == 10
    assert some[-1].row >= 20
    assert some == read_set("x", TestSet(file=Path("rows.jsonl"), sample=10), str(tmp_path))
    long = read_set("x", TestSet(file=Path("rows.jsonl"), sample=10, min_reference_words=3), str(tmp_path))
    assert long == [e for e in some if len(e.references[0].split()) >= 3]
    assert len(read_set("x", TestSet(file=Path("rows.jsonl"), sample=100), str(tmp_path))) == 40


def test_calibration_and_exposure_bias_follow_from_the_models(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "working_dtype", lambda: torch.float32)  # on every machine
    sets = {"classes": {"file": "some.jsonl", "choices": ["w3", "w5 w6"]}}
    config = make(data, tmp_path / "out", sets=sets, teacher=models["teacher"], exposure_bias=True, seeds=[1])
    results = suite.run_suite(config, {"student": models["student"]})
    found = results["models"]["student"]["classes"]
    model: Any = load_model(models["student"], torch.float32)
    confidences, correct = [], []
    for i, row in enumerate(ROWS):
        logs = []
        for ids in ([3 + 4], [5 + 4, 6 + 4]):  # the first word has id 4
            prompt = [i + 4, i + 5]
            with torch.no_grad():
                logq = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, 1:], -1)
            logs.append(logq.gather(1, torch.tensor([*ids, 1])[:, None]).sum())  # and the answer ends there
        best = int(torch.stack(logs).argmax())
        confidences.append(float(torch.softmax(torch.stack(logs), 0)[best]))
        correct.append((["w3", "w5 w6"][best]) in row["output"] if isinstance(row["output"], list) else best == 0)
    assert found["ece"]["mean"] == pytest.approx(calibration_error(confidences, correct), abs=1e-4)
    rows = read_jsonl(tmp_path / "out" / "student" / "classes-exposure.jsonl")
    assert len(found["excess_error"]["by_position"]) == 6
    assert found["excess_error"]["by_position"] == pytest.approx(
        excess_error([r["own"] for r in rows], [r["oracle"] for r in rows], 6).tolist()
    )
    lengths = [(len(r["own"]), len(r["oracle"])) for r in rows]
    assert found["length_ratio"]["mean"] == pytest.approx(sum(n for n, _ in lengths) / sum(n for _, n in lengths))
    total = sum(sum(r["oracle"]) for r in rows)
    assert found["teacher_forward_kl"]["mean"] == pytest.approx(total / sum(n for _, n in lengths))
    answers = read_jsonl(tmp_path / "out" / "student" / "classes-1.jsonl")
    kl = [r["reverse_kl"] for r in answers]
    assert found["reverse_kl_answer"]["mean"] == pytest.approx(sum(kl) / len(kl))
    each = [value / len(r["ids"]) for value, r in zip(kl, answers, strict=True)]
    assert found["reverse_kl_mean"]["mean"] == pytest.approx(sum(each) / len(each))
    assert "Exposure bias" in write_suite_report(tmp_path / "out").read_text()


def with_other_words(folder: Path, *pair: str) -> str:
    """Exchange two words of a saved tokenizer, or replace the first if the second is not in its vocabulary."""
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    other = {pair[0]: pair[1], pair[1]: pair[0]}
    raw["model"]["vocab"] = {other.get(word, word): number for word, number in raw["model"]["vocab"].items()}
    file.write_text(json.dumps(raw))
    return str(folder)


def test_a_model_with_another_vocabulary_than_the_teacher_is_refused_before_sampling(
    data: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_other_words(Path(save(tiny_llama(3), tmp_path / "other")), "w8", "w9")
    for name in ("load_model", "answer"):
        monkeypatch.setattr(evaluator, name, lambda *_, **__: pytest.fail("something was loaded or sampled"))
    for given in ({**models, "third": other}, {"third": other, **models}):
        with pytest.raises(VocabularyError) as caught:
            suite.run_suite(make(data, tmp_path / "out", teacher=models["teacher"]), given)
        assert str(caught.value) == (
            f"model third ({other}) and teacher {models['teacher']} have different tokenizers: id 12 is 'w9' for the "
            "model and 'w8' for the teacher. KL needs one vocabulary: leave out the teacher, or this model"
        )
    assert not (tmp_path / "out").exists()
    check_suite(make(data, tmp_path / "out"), {**models, "third": other})  # without a teacher, vocabularies may differ


def test_answers_are_made_again_with_another_tokenizer(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new tokenizer encodes these prompts as before, and decodes answers differently."""
    folder = Path(save(tiny_llama(1), tmp_path / "model"))
    config = make(data, tmp_path / "out", sets={"some": {"file": "some.jsonl"}}, seeds=[1])
    suite.run_suite(config, {"one": str(folder)})
    with_other_words(folder, "w20", "w99")
    calls: list[Any] = []
    original = evaluator.answer
    monkeypatch.setattr(evaluator, "answer", lambda *given: calls.append(given) or original(*given))
    for _ in range(2):
        suite.run_suite(config, {"one": str(folder)})
        assert len(calls) == 1


def test_a_set_without_a_short_enough_prompt_is_refused(data: str, models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sets.some: no prompt is within max_prompt_tokens \(1\) for model student"):
        suite.run_suite(make(data, tmp_path / "out", max_prompt_tokens=1), models)


def test_models_that_share_no_prompt_are_not_compared(data: str, tmp_path: Path) -> None:
    def rows(*numbers: int) -> list[list[dict[str, Any]]]:
        return [[{"row": number, "rouge_l": 1.0} for number in numbers]]

    given = make(data, tmp_path / "out", seeds=[1])
    assert suite.differences(given, {"some": rows(0, 1)}, {"some": rows(2)}) == {}
    assert list(suite.differences(given, {"some": rows(0, 1)}, {"some": rows(1, 2)})) == ["some", "average"]


def test_results_are_valid_json(data: str, models: dict[str, str], tmp_path: Path) -> None:
    """Here the 4-grams, the standard deviation and the excess error are undefined."""
    sets = {"some": {"file": "some.jsonl"}}
    config = make(
        data, tmp_path / "out", sets=sets, max_new_tokens=1, teacher=models["student"], exposure_bias=True, seeds=[1]
    )
    results = suite.run_suite(config, {"student": models["student"]})
    found = results["models"]["student"]["some"]
    assert found["distinct_4"] == {"mean": None, "spread": None, "by_seed": [None]}
    assert found["rouge_l"]["spread"] is None
    text = (tmp_path / "out" / "results.json").read_text()
    assert results == json.loads(text, parse_constant=lambda word: pytest.fail(word))
    show_suite(results)
    write_suite_report(tmp_path / "out")


def test_blocked_ngrams_do_not_repeat(data: str, models: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "seeds": [1], "sets": {"some": {"file": "some.jsonl"}}}
    repeats = {}
    for n in (0, 2):
        suite.run_suite(make(data, tmp_path / f"{n}", no_repeat_ngram=n, **settings), {"student": models["student"]})
        repeats[n] = 0
        for row, given in zip(read_jsonl(tmp_path / f"{n}" / "student" / "some-1.jsonl"), ROWS, strict=True):
            ids = [*(int(word[1:]) + 4 for word in given["instruction"].split()), *row["ids"]]
            grams = list(pairwise(ids))
            repeats[n] += len(grams) - len(set(grams))
    assert repeats[2] == 0 < repeats[0]


def test_a_part_of_a_set_is_resampled_together_with_it(data: str, tmp_path: Path) -> None:
    given = make(data, tmp_path / "out", bootstrap=2000)
    values = {i: float(x) for i, x in enumerate(np.random.default_rng(0).normal(size=40))}
    alone = suite.average_difference(given, {"some": values})
    both = suite.average_difference(
        given, {"some": values, "long": values}
    )  # `long` has the same prompts: no new information
    assert both == pytest.approx(alone)
    apart = suite.average_difference(given, {"some": values, "bare": values})
    assert apart["high"] - apart["low"] < 0.85 * (alone["high"] - alone["low"])  # two independent sets of prompts: 1/√2
    part = suite.average_difference(given, {"some": values, "long": {i: values[i] for i in range(0, 40, 3)}})
    draws = []
    for rows in np.random.default_rng(1).integers(0, 40, size=(2000, 40)):
        some = [values[int(i)] for i in rows if i % 3 == 0]
        draws.append((np.mean([values[int(i)] for i in rows]) + np.mean(some)) / 2)
    assert part["low"] == pytest.approx(np.percentile(draws, 2.5), abs=0.05)
    assert part["high"] == pytest.approx(np.percentile(draws, 97.5), abs=0.05)


def test_errors_name_the_setting_or_the_set(data: str, tmp_path: Path, models: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"sets.some: some.jsonl is looked for below data_dir, which is not given"):
        suite.run_suite(make(data, tmp_path, data_dir=None), models)
    with pytest.raises(DataError, match=r"sets.x: no row's longest reference has 99 to 1000000000 words"):
        suite.run_suite(make(data, tmp_path, sets={"x": {"file": "some.jsonl", "min_reference_words": 99}}), models)
    file = tmp_path / "suite.yaml"
    file.write_text("sets:\n  one: {file: a.jsonl, limt: 3}\n")
    with pytest.raises(RecipeError, match=r"suite.yaml:2: sets.one.limt: unknown key; did you mean limit\?"):
        load_suite(file)
    file.write_text("sets:\n  one: {file: a.jsonl, dataset: b}\n")
    with pytest.raises(RecipeError, match=r"sets\.one: exactly one of file and dataset is needed"):
        load_suite(file)
    with pytest.raises(RecipeError, match="data: needed, and not given"):
        load_recipe(file)
    for key, given, message in (
        ("seeds", "[1, 2, 1]", r"seeds: every value must be given once only; remove the repeated 1"),
        ("sets.average", "{file: a.jsonl}", r"sets.average: results have the mean over the sets under that name"),
        ("sets.two", "{file: a.jsonl, choices: [x]}", r"sets.two.choices: at least two choices must be given"),
        ("sets.two", "{file: a.jsonl, choices: [x, ' ']}", r"sets.two.choices: a choice must not be blank"),
        (
            "sets.two",
            "{file: a.jsonl, choices: [x, y, ' x']}",
            r"sets.two.choices: every value must be given once only; remove the repeated x",
        ),
    ):
        file.write_text("sets: {one: {file: a.jsonl}}\n")
        with pytest.raises(RecipeError, match=f"command line: {message}"):
            load_suite(file, [f"{key}={given}"])
    for given, message in (
        (["a/b", "c/b"], "b is the name of two models"),
        ([], "no model to evaluate"),
        (["x:"], "model=NAME:FOLDER"),
    ):
        with pytest.raises(ValueError, match=message):
            named_models(given)
    assert named_models(["runs/a", "mine:runs/b"]) == {"a": "runs/a", "mine": "runs/b"}


def test_a_suite_offers_the_engines_that_sample_any_model() -> None:
    offered = get_args(Suite.model_fields["engine"].annotation)
    assert set(offered) == {"auto", *(name for name, engine in ENGINES.items() if not engine.only_in_training)}


@pytest.mark.parametrize("name", ["local", "paper"])
def test_the_shipped_suites_are_valid(name: str) -> None:
    assert len(load_suite(Path(__file__).parents[2] / "eval" / f"{name}.yaml").seeds) == 5


def test_models_of_different_shapes_can_be_mixed(data: str, models: dict[str, str], tmp_path: Path) -> None:
    third = save(tiny_llama(9), tmp_path / "third")  # the student's shape
    results = suite.run_suite(make(data, tmp_path / "out"), {**models, "third": third})
    lengths = {name: sets["some"]["length"]["mean"] for name, sets in results["models"].items()}
    assert len(set(lengths.values())) == 3


def test_the_command_line_evaluates_a_suite(
    data: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "sets: {some: {file: some.jsonl}}\ntemplate: plain\nmax_new_tokens: 4\nseeds: [1, 2]\nengine: transformers\n"
    )
    out = tmp_path / "out"
    words = [
        f"model=small:{models['student']}",
        f"data_dir={data}",
        f"model={models['teacher']}",
        f"out={out}",
        "bootstrap=100",
    ]
    cli.evaluate(file, words)
    shown = capsys.readouterr().out
    assert "small" in shown
    assert "teacher" in shown
    assert "±" in shown
    assert (out / "report.html").is_file()
    assert list(json.loads((out / "results.json").read_text())["models"]) == ["small", "teacher"]
