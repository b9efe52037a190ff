"""Did minillm help? One sentence with units, from paired intervals.

Of each measure the whole 95 % interval counts, so that noise does not decide: it is better where the interval lies on
the good side of zero, worse where it lies on the bad side by more than is tolerated (of KL(q‖p) a hundredth), and else
there is no clear difference. A student that has not changed gets one of the outer two at one time in twenty at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minillm.evaluation.config import EvaluateConfig

Outcome = Literal["better", "no clear difference", "worse"]
Change = Mapping[str, float | None]

_HEADS: dict[Outcome, str] = {
    "better": "minillm is better than the warmed-up student",
    "no clear difference": "There is no clear difference between minillm and the warmed-up student",
    "worse": "minillm is worse than the warmed-up student",
}
_KL_RISE = 0.01  # tolerated: less than two runs of one setting differ by
COLOURS: dict[Outcome, str] = {"better": "green", "no clear difference": "yellow", "worse": "red"}


@dataclass(frozen=True)
class _Measure:
    """A change that is good where it is positive; `scale` times it is said, in `unit`, the levels as `level` has them."""

    key: str
    criterion: str
    name: str
    scale: float
    unit: str
    level: str


_MEASURES = (
    _Measure(
        "reverse_kl_reduction", "reverse KL falls by a share of more than", "KL(q‖p)", -100, "%", "{:.2f} → {:.2f} nats a token"
    ),
    _Measure("rouge_l_change", "Rouge-L (points) changes by at least", "Rouge-L", 1, "points", "{:.1f} → {:.1f}"),
    _Measure(
        "finished_change", "finished (percentage points) changes by at least", "the share of finished answers", 1,
        "percentage points", "{:.1f} → {:.1f} %",
    ),
)  # fmt: skip


def check(changes: Mapping[str, Change], config: EvaluateConfig) -> dict[str, Any]:
    """The verdict on the changes from the warmed-up student to minillm.

    Worse where any measure is; better where KL(q‖p) falls and nothing is worse; else no clear difference.

    Args:
        changes: of `evaluation.compare`. A change may lack its levels, `before` and `after`; a measure that is missing,
            or has no number, has no part in the verdict.

    Returns:
        `verdict`: one of the three outcomes. `sentence`. `passed`: whether the verdict is `better`. `criteria`: of each
        measure `criterion`, `needed`, `lower_end` and `upper_end` of its interval (of KL(q‖p) shares), `outcome`, and
        `passed`: better of KL(q‖p), not worse of the others. `expected`, where `min_reverse_kl_reduction` is set:
        reached, not reached, or cannot be told.
    """
    tolerated = {
        "reverse_kl_reduction": _KL_RISE, "rouge_l_change": config.max_rouge_l_loss, "finished_change": config.max_finished_loss,
    }  # fmt: skip
    criteria, phrases = [], []
    for measure in _MEASURES:
        change = _numbers(changes.get(measure.key))
        if change is None:
            phrases.append(f"{measure.name} cannot be compared")
            continue
        tolerance, has_to_gain = tolerated[measure.key], measure.key == "reverse_kl_reduction"
        outcome: Outcome = (
            "better" if change["low"] > 0 else "worse" if change["high"] < -tolerance else "no clear difference"
        )
        passed = outcome == "better" if has_to_gain else outcome != "worse"
        criteria.append({
            "criterion": measure.criterion, "needed": 0.0 if has_to_gain else -tolerance, "lower_end": change["low"],
            "upper_end": change["high"], "outcome": outcome, "passed": passed,
        })  # fmt: skip
        phrases.append(_phrase(measure, change, tolerance))
    outcomes = [item["outcome"] for item in criteria]
    reduction = _numbers(changes.get("reverse_kl_reduction"))
    verdict: Outcome = "no clear difference"
    if "worse" in outcomes:
        verdict = "worse"
    elif reduction is not None and reduction["low"] > 0:
        verdict = "better"
    found: dict[str, Any] = {"verdict": verdict, "passed": verdict == "better", "criteria": criteria}
    sentence = f"{_HEADS[verdict]}: {'; '.join(phrases)}."
    if config.min_reverse_kl_reduction is not None:
        found["expected"] = _expected(reduction, config.min_reverse_kl_reduction)
        sentence += f" KL(q‖p) was expected to fall by at least {100 * config.min_reverse_kl_reduction:g} %: {found['expected']}."
    return found | {"sentence": sentence}


def check_of(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict that a run's results hold, made anew from those of a version that had no sentence; None where nothing was compared."""
    found = results.get("check")
    return found if found is None or "sentence" in found else check(results["minillm_against_warmed"], EvaluateConfig())


def _numbers(change: Change | None) -> dict[str, float] | None:
    """None unless it has a mean and an interval."""
    values = {name: value for name, value in (change or {}).items() if value is not None and math.isfinite(value)}
    return values if {"mean", "low", "high"} <= values.keys() else None


def _phrase(measure: _Measure, change: dict[str, float], tolerance: float) -> str:
    low, mean, high = (change[end] for end in ("low", "mean", "high"))
    levels = (
        f" ({measure.level.format(change['before'], change['after'])})" if {"before", "after"} <= change.keys() else ""
    )
    if low <= 0 <= high:
        ends = sorted((measure.scale * low, measure.scale * high))
        said = f"{_signed(measure.scale * mean)} {measure.unit} [{', '.join(map(_signed, ends))}]"
        return f"{measure.name} does not clearly change, {said}{levels}"
    ends = sorted(abs(measure.scale * end) for end in (low, high))
    said = f"{abs(measure.scale * mean):.1f} {measure.unit} [{ends[0]:.1f}, {ends[1]:.1f}]"
    verb = "rises" if (low > 0) == (measure.scale > 0) else "falls"
    within = (
        f", which is not clearly more than the {abs(measure.scale) * tolerance:g} tolerated"
        if -tolerance <= high < 0
        else ""
    )
    return f"{measure.name} {verb} by {said}{levels}{within}"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no minus before a zero


def _expected(reduction: dict[str, float] | None, least: float) -> str:
    if reduction is None:
        return "cannot be told"
    if reduction["low"] >= least:
        return "reached"
    return "not reached" if reduction["high"] < least else "cannot be told, its interval contains that"
