"""The three outcomes of the verdict, its sentence, and how often noise changes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.scores import Scores, compare
from minillm.evaluation.verdict import check, check_of


def interval(mean: float, low: float, high: float, **levels: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, **levels}


QUICKSTART = {
    "reverse_kl_reduction": interval(0.191, 0.147, 0.235, before=0.83, after=0.67),
    "rouge_l_change": interval(2.3, 1.2, 3.4, before=21.4, after=23.7),
    "finished_change": interval(23.1, 16.4, 29.2, before=65.3, after=88.3),
}


def changed(**changes: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in {**QUICKSTART, **changes}.items() if value is not None}


def outcomes(found: dict[str, Any]) -> list[str]:
    return [item["outcome"] for item in found["criteria"]]


def test_the_sentence_has_units_and_levels() -> None:
    found = check(QUICKSTART, EvaluateConfig())
    assert (found["verdict"], found["passed"], outcomes(found)) == ("better", True, ["better"] * 3)
    assert found["sentence"] == (
        "minillm is better than the warmed-up student: KL(q‖p) falls by 19.1 % [14.7, 23.5] (0.83 → 0.67 nats a "
        "token); Rouge-L rises by 2.3 points [1.2, 3.4] (21.4 → 23.7); the share of finished answers rises by 23.1 "
        "percentage points [16.4, 29.2] (65.3 → 88.3 %)."
    )
    bare = {key: {end: change[end] for end in ("mean", "low", "high")} for key, change in QUICKSTART.items()}
    without_levels = check(bare, EvaluateConfig())["sentence"]
    assert "falls by 19.1 % [14.7, 23.5]; Rouge-L rises" in without_levels


def test_no_clear_difference_and_worse() -> None:
    level = check(changed(reverse_kl_reduction=interval(0.012, -0.031, 0.055)), EvaluateConfig())
    assert (level["verdict"], level["passed"]) == ("no clear difference", False)
    assert level["sentence"].startswith(
        "There is no clear difference between minillm and the warmed-up student: KL(q‖p) does not clearly "
    )
    assert "change, −1.2 % [−5.5, +3.1]" in level["sentence"]
    hardly = check(changed(reverse_kl_reduction=interval(-0.012, -0.018, -0.006)), EvaluateConfig())
    assert hardly["verdict"] == "no clear difference"
    assert "KL(q‖p) rises by 1.2 % [0.6, 1.8], which is not clearly more than the 1 tolerated" in hardly["sentence"]
    rises = check(changed(reverse_kl_reduction=interval(-0.05, -0.08, -0.02)), EvaluateConfig())
    assert rises["verdict"] == "worse"
    assert rises["sentence"].startswith(
        "minillm is worse than the warmed-up student: KL(q‖p) rises by 5.0 % [2.0, 8.0]"
    )
    for key, change, said in (
        ("rouge_l_change", interval(-2.0, -2.9, -1.1), "Rouge-L falls by 2.0 points [1.1, 2.9]"),
        ("finished_change", interval(-7.0, -9.0, -2.1), "finished answers falls by 7.0 percentage points [2.1, 9.0]"),
    ):
        found = check(changed(**{key: change}), EvaluateConfig())
        assert (found["verdict"], found["passed"]) == ("worse", False)
        assert said in found["sentence"]


def test_a_tolerated_loss_is_not_worse() -> None:
    loss = changed(rouge_l_change=interval(-1.5, -2.2, -0.8))
    found = check(loss, EvaluateConfig())
    assert (found["verdict"], outcomes(found)) == ("better", ["better", "no clear difference", "better"])
    assert "Rouge-L falls by 1.5 points [0.8, 2.2], which is not clearly more than the 1 tolerated" in found["sentence"]
    assert check(loss, EvaluateConfig(max_rouge_l_loss=0.7))["verdict"] == "worse"
    assert (
        check(changed(finished_change=interval(-7.0, -9.0, -2.1)), EvaluateConfig(max_finished_loss=3.0))["verdict"]
        == "better"
    )


def test_the_expected_reduction_is_judged_by_the_whole_interval() -> None:
    assert "expected" not in check(QUICKSTART, EvaluateConfig())
    for least, expected in (
        (0.14, "reached"),
        (0.15, "undecided, because its interval contains that value"),
        (0.25, "not reached"),
    ):
        found = check(QUICKSTART, EvaluateConfig(min_reverse_kl_reduction=least))
        assert (found["verdict"], found["expected"]) == ("better", expected)
        assert found["sentence"].endswith(f" KL(q‖p) was expected to fall by at least {100 * least:g} %: {expected}.")


@pytest.mark.parametrize(
    "missing", [None, interval(math.nan, math.nan, math.nan), {"mean": None, "low": None, "high": None}]
)
def test_an_undefined_measure_is_ignored(missing: dict[str, Any] | None) -> None:
    found = check(changed(reverse_kl_reduction=missing), EvaluateConfig(min_reverse_kl_reduction=0.15))
    assert (found["verdict"], len(found["criteria"]), found["expected"]) == ("no clear difference", 2, "not measured")
    assert "KL(q‖p) cannot be compared" in found["sentence"]


def test_results_of_an_older_version_are_judged_again() -> None:
    assert check_of({"models": {}}) is None
    old = {"check": {"passed": False, "criteria": []}, "minillm_against_warmed": QUICKSTART}
    assert check_of(old) == check(QUICKSTART, EvaluateConfig())


def test_noise_rarely_changes_the_verdict() -> None:
    """The quickstart's reduction, drawn again with its standard error, and no effect at all."""
    rng, times = np.random.default_rng(0), 4000

    def drawn(reduction: float, rouge: float, finished: float) -> dict[str, Any]:
        means = {
            "reverse_kl_reduction": (reduction, 0.022),
            "rouge_l_change": (rouge, 0.56),
            "finished_change": (finished, 3.3),
        }
        found = {key: (rng.normal(mean, error), 1.96 * error) for key, (mean, error) in means.items()}
        return {key: interval(mean, mean - half, mean + half) for key, (mean, half) in found.items()}

    real = [check(drawn(0.191, 2.3, 23.0), EvaluateConfig())["verdict"] for _ in range(times)]
    assert real.count("better") >= 0.99 * times
    null = [check(drawn(0, 0, 0), EvaluateConfig())["verdict"] for _ in range(times)]
    assert null.count("better") + null.count("worse") <= 0.05 * times


def test_compare_gives_levels_and_allows_a_divergence_of_zero() -> None:
    rng = np.random.default_rng(1)
    rouge_l, finished, tokens = rng.random(80) * 50, np.full(80, 90.0), np.full(80, 100.0)
    reverse_kl = rng.random(80) * 70
    before = Scores({"rouge_l": rouge_l, "finished": finished}, {"reverse_kl": reverse_kl}, tokens)
    after = Scores({"rouge_l": rouge_l + 1, "finished": finished}, {"reverse_kl": reverse_kl * 0.8}, tokens)
    found = compare(before, after, 200)
    kl = found["reverse_kl_reduction"]
    assert (kl["mean"], kl["after"]) == (pytest.approx(0.2), pytest.approx(0.8 * kl["before"]))
    assert found["rouge_l_change"]["after"] - found["rouge_l_change"]["before"] == pytest.approx(1)
    assert check(found, EvaluateConfig())["verdict"] == "better"
    nothing = Scores(before.means, {"reverse_kl": np.zeros(80)}, tokens)
    with np.errstate(all="raise"):
        still = compare(nothing, nothing, 200)
    assert check(still, EvaluateConfig())["verdict"] == "no clear difference"
