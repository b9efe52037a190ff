"""Scores of held-out answers against the rouge-score package and examples worked out by hand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from minillm.data.examples import Example, Prompt
from minillm.errors import RecipeError
from minillm.evaluation import answers as evaluation
from minillm.evaluation import metrics, scores, statistics, verdict
from minillm.evaluation.config import EvaluateConfig
from minillm.loss import divergences
from minillm.run.recipe_file import load_recipe
from minillm.teacher.local import LocalTeacher
from tests.conftest import tiny_llama


def test_rouge_l_is_that_of_the_package_for_the_best_reference() -> None:
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "cats",
        "dog",
        "running",
        "runs",
        "ran",
        "on",
        "in",
        "house",
        "houses",
        "tree",
        "it",
        "is",
        "was",
    ]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(200):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(3)]
        want = max(scorer.score(reference, texts[0])["rougeL"].fmeasure for reference in texts[1:])
        assert metrics.rouge_l(texts[0], texts[1:]) == pytest.approx(100 * want)


def test_an_interval_has_its_nominal_coverage() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        found = statistics.interval(statistics.mean_of(rng.normal(3.0, 2.0, 60)), 60, 400)
        hits += found["low"] <= 3.0 <= found["high"]
    assert 180 <= hits <= 198


def row(prompt: int, seed: int, text: str, tokens: int, kl: float, finished: bool = True) -> evaluation.Row:
    return {"row": prompt, "seed": seed, "text": text, "ids": [0] * tokens, "finished": finished, "reverse_kl": kl}


def test_scores_of_a_small_example() -> None:
    references = [
        row(0, 1, "red cat", 2, 0),
        row(0, 2, "blue dog", 2, 0),
        row(1, 1, "one", 1, 0),
        row(1, 2, "two", 1, 0),
    ]
    answers = [
        row(0, 1, "blue dog", 4, 2.0),
        row(0, 2, "blue dog", 2, 4.0, False),
        row(1, 1, "two", 1, 1.0),
        row(1, 2, "two", 1, 1.0),
    ]
    found = scores.collect(answers, references)
    # An answer of seed 1 is compared with the reference of seed 2, and the other way round.
    assert found.means["rouge_l"].tolist() == [50.0, 50.0]
    assert found.means["finished"].tolist() == [50.0, 100.0]
    summary = scores.summarise(found, 200)
    assert summary["reverse_kl"]["mean"] == pytest.approx(8 / 8)
    assert summary["length"]["mean"] == pytest.approx(2.0)
    assert scores.summarise(scores.collect(references, references), 200)["rouge_l"]["mean"] == 0.0


def test_an_unchanged_student_is_not_better() -> None:
    rng = np.random.default_rng(0)
    means = {"rouge_l": rng.random(80) * 50, "finished": np.full(80, 90.0)}
    still = scores.Scores(means, {"reverse_kl": rng.random(80) * 70}, np.full(80, 100.0))
    found = verdict.check(scores.compare(still, still, 200), EvaluateConfig())
    assert (found["verdict"], found["passed"]) == ("no clear difference", False)


def test_a_divergence_that_is_not_finite_is_left_out_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluation, "token_divergences", lambda *_, **__: [(torch.tensor([1.0, torch.inf]), torch.zeros(2))]
    )
    rows = [row(0, 1, "one", 2, 0.0)]
    evaluation.add_divergences(
        rows, [Prompt(Example(0, "x"), [2])], tiny_llama(1), LocalTeacher(tiny_llama(2)), 32, 1.0
    )
    assert rows[0]["reverse_kl"] is None
    found = scores.collect(rows, [row(0, 2, "one", 1, 0.0)])
    assert found.totals == {}
    assert "reverse_kl" not in scores.summarise(found, 100)
    assert "reverse_kl_reduction" not in scores.compare(found, found, 100)


def test_a_repeated_seed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    text = "run_dir: r\ndata: {train: ./rows.jsonl, heldout: ./rows.jsonl}\nteacher: {source: t}\n"
    text += "student: {source: s}\nevaluate:\n  seeds: "
    file.write_text(f"{text}[10, 20, 10]\n")
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:6: evaluate.seeds: every value must be given once only; remove the repeated 10"
    ):
        load_recipe(file)
    file.write_text(f"{text}[10, 20]\n")
    assert load_recipe(file).evaluate.seeds == [10, 20]


def test_reverse_kl_is_taken_over_full_distributions() -> None:
    student, teacher = tiny_llama(1), tiny_llama(2, layers=3)
    prompts = [Prompt(Example(0, "x"), [2, 5, 3]), Prompt(Example(1, "y"), [2, 3])]
    rows = [row(0, 1, "", 0, 0), row(1, 1, "", 0, 0)]
    rows[0]["ids"], rows[1]["ids"] = [7, 8, 1], [9]
    want = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, rows, strict=True):
            ids, start = torch.tensor([prompt.ids + answer["ids"]]), len(prompt.ids) - 1
            logits = [model(ids).logits[0, start:-1] for model in (student, teacher)]
            want.append(float(divergences.reverse_kl(logits[0], logits[1], 0.7).sum()))
    evaluation.add_divergences(rows, prompts, student, LocalTeacher(teacher), 32, 0.7)
    assert [r["reverse_kl"] for r in rows] == pytest.approx(want, rel=1e-4)
