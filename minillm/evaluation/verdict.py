"""Whether the minillm stage improved the student: one sentence with units, from paired intervals.

Each measure is judged by its whole 95 % interval, so that noise does not decide. A measure is better if the interval
lies on the good side of zero; worse if it lies on the bad side by more than is tolerated (a hundredth for KL(q‖p));
otherwise there is no clear difference. A student that has not changed is called better or worse at most one time in
twenty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.metrics import METRIC

Outcome = Literal["better", "no clear difference", "worse"]
Change = Mapping[str, float | None]
"""`mean`, `low` and `high` of a change from one model to another, and perhaps its levels `before` and `after`."""

COLOURS: dict[Outcome, str] = {"better": "green", "no clear difference": "yellow", "worse": "red"}
"""In which colour each outcome is shown."""
_HEADS: dict[Outcome, str] = {
    "better": "minillm is better than the warmed-up student",
    "no clear difference": "There is no clear difference between minillm and the warmed-up student",
    "worse": "minillm is worse than the warmed-up student",
}
_TOLERATED_KL_RISE = 0.01  # relative; less than the difference between two runs with the same settings


@dataclass(frozen=True)
class _Measure:
    """A change that is good where it is positive.

    Attributes:
        key: Its name among the changes.
        criterion: Its name in the results.
        name: Its name in the sentence.
        scale: Factor from the change to `unit`; negative where the sentence speaks of a fall as the good direction.
        unit: Unit in the sentence.
        levels: Format of the levels before and after.
    """

    key: str
    criterion: str
    name: str
    scale: float
    unit: str
    levels: str


_KL = _Measure(
    key="reverse_kl_reduction",
    criterion="reverse KL falls by a share of more than",
    name=METRIC["reverse_kl"].label,
    scale=-100,
    unit="%",
    levels="{:.2f} → {:.2f} nats a token",
)
_ROUGE_L = _Measure(
    key="rouge_l_change",
    criterion="Rouge-L (points) changes by at least",
    name=METRIC["rouge_l"].label,
    scale=1,
    unit="points",
    levels="{:.1f} → {:.1f}",
)
_SHARE_FINISHED = _Measure(
    key="finished_change",
    criterion="finished (percentage points) changes by at least",
    name="the share of finished answers",
    scale=1,
    unit="percentage points",
    levels="{:.1f} → {:.1f} %",
)


def check(changes: Mapping[str, Change], config: EvaluateConfig) -> dict[str, Any]:
    """Give the verdict on the changes from the warmed-up student to minillm.

    The verdict is `worse` if any measure is worse; `better` if KL(q‖p) falls and nothing is worse; otherwise
    `no clear difference`.

    Args:
        changes: See `scores.compare`. A measure that is missing, or has no number, plays no part in the verdict.
        config: What is tolerated and what is expected.

    Returns:
        `verdict`, one of the three outcomes. `sentence`. `passed`, whether the verdict is `better`. `criteria`, a list
        with an entry for each measure: `criterion`; `needed`; the ends of the interval, `lower_end` and `upper_end`
        (for KL(q‖p) relative); `outcome`; and `passed`, which means better for KL(q‖p) and not worse for the others.
        `expected`, if `min_reverse_kl_reduction` is set: reached, not reached, not measured, or undecided.
    """
    tolerated = (
        (_KL, _TOLERATED_KL_RISE),
        (_ROUGE_L, config.max_rouge_l_loss),
        (_SHARE_FINISHED, config.max_finished_loss),
    )
    criteria, phrases = [], []
    for measure, tolerance in tolerated:
        change = _numbers(changes.get(measure.key))
        if change is None:
            phrases.append(f"{measure.name} cannot be compared")
        else:
            criteria.append(_judged(measure, change, tolerance))
            phrases.append(_phrase(measure, change, tolerance))
    outcomes = [item["outcome"] for item in criteria]
    reduction = _numbers(changes.get(_KL.key))
    verdict: Outcome = "no clear difference"
    if "worse" in outcomes:
        verdict = "worse"
    elif reduction is not None and reduction["low"] > 0:
        verdict = "better"
    found: dict[str, Any] = {"verdict": verdict, "passed": verdict == "better", "criteria": criteria}
    sentence = f"{_HEADS[verdict]}: {'; '.join(phrases)}."
    if config.min_reverse_kl_reduction is not None:
        found["expected"] = _expected(reduction, config.min_reverse_kl_reduction)
        least = f"{100 * config.min_reverse_kl_reduction:g} %"
        sentence += f" {_KL.name} was expected to fall by at least {least}: {found['expected']}."
    return found | {"sentence": sentence}


def check_of(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the verdict from a run's results.

    Args:
        results: The contents of `results.json`. Results of an older version have no sentence; for them the verdict is
            computed again, with the default tolerances.

    Returns:
        See `check`; None if nothing was compared.
    """
    found = results.get("check")
    return found if found is None or "sentence" in found else check(results["minillm_against_warmed"], EvaluateConfig())


def _numbers(change: Change | None) -> dict[str, float] | None:
    """The finite numbers of a change; None unless it has a mean and an interval."""
    values = {name: value for name, value in (change or {}).items() if value is not None and math.isfinite(value)}
    return values if {"mean", "low", "high"} <= values.keys() else None


def _judged(measure: _Measure, change: Mapping[str, float], tolerance: float) -> dict[str, Any]:
    """The entry of a measure among the criteria."""
    has_to_gain = measure is _KL
    outcome: Outcome = "no clear difference"
    if change["low"] > 0:
        outcome = "better"
    elif change["high"] < -tolerance:
        outcome = "worse"
    return {
        "criterion": measure.criterion,
        "needed": 0.0 if has_to_gain else -tolerance,
        "lower_end": change["low"],
        "upper_end": change["high"],
        "outcome": outcome,
        "passed": outcome == "better" if has_to_gain else outcome != "worse",
    }


def _phrase(measure: _Measure, change: Mapping[str, float], tolerance: float) -> str:
    """What a change is, in words."""
    low, mean, high = (change[end] for end in ("low", "mean", "high"))
    has_levels = {"before", "after"} <= change.keys()
    levels = f" ({measure.levels.format(change['before'], change['after'])})" if has_levels else ""
    if low <= 0 <= high:
        ends = sorted((measure.scale * low, measure.scale * high))
        size = f"{_signed(measure.scale * mean)} {measure.unit} [{', '.join(map(_signed, ends))}]"
        return f"{measure.name} does not clearly change, {size}{levels}"
    ends = sorted(abs(measure.scale * end) for end in (low, high))
    size = f"{abs(measure.scale * mean):.1f} {measure.unit} [{ends[0]:.1f}, {ends[1]:.1f}]"
    verb = "rises" if (low > 0) == (measure.scale > 0) else "falls"
    limit = f"{abs(measure.scale) * tolerance:g}"
    tolerated = f", which is not clearly more than the {limit} tolerated" if -tolerance <= high < 0 else ""
    return f"{measure.name} {verb} by {size}{levels}{tolerated}"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # adding 0.0 removes the sign of a negative zero


def _expected(reduction: Mapping[str, float] | None, least: float) -> str:
    if reduction is None:
        return "not measured"
    if reduction["low"] >= least:
        return "reached"
    return "not reached" if reduction["high"] < least else "undecided, because its interval contains that value"
