"""Two models on the prompts of one file: their answers, and the paired difference of every metric of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillm.data.files import write_json
from minillm.errors import InputError
from minillm.evaluation import scores, statistics
from minillm.evaluation.config import Suite
from minillm.evaluation.metrics import METRICS, Metric
from minillm.evaluation.store import AnswerStore, Row, part
from minillm.evaluation.suite import run_suite

SET = "prompts"
"""The name of the set that the prompts are answered as."""


def compare_models(models: dict[str, str], suite: Suite) -> dict[str, Any]:
    """Have two models answer the same prompts, and compare them.

    Args:
        models: Folders or hub ids by name; the second is compared with the first.
        suite: A suite of the one set `SET`. Answers that are in its folder are not sampled again.

    Returns:
        `models`, the two names; `prompts`, the number that both answered; `seeds`; `differences`: by the key of a
        metric the mean of each model (`first`, `second`), and `mean`, `low`, `high` of second − first with its 95 %
        paired bootstrap interval over prompts; `answers`: of the first seed, `row` and one text by model. It is also
        written to `compared.json` of the suite's folder.

    Raises:
        InputError: there are not two models, or no prompt is short enough for both.
        DataError: the file cannot be read; raised before any model is loaded.
    """
    if len(models) != 2:
        raise InputError(f"two models are compared, not {len(models)}: for several, minillm evaluate SUITE model=…")
    run_suite(suite, models)
    one, other = ([AnswerStore(suite.out / name).read(part(SET, seed)) for seed in suite.seeds] for name in models)
    common = {row["row"] for row in one[0]} & {row["row"] for row in other[0]}
    if not common:
        raise InputError("no prompt is short enough for both models; raise --max-prompt-tokens")
    one, other = ([[row for row in rows if row["row"] in common] for rows in groups] for groups in (one, other))
    texts = zip(one[0], other[0], strict=True)
    found: dict[str, Any] = {
        "models": list(models),
        "prompts": len(common),
        "seeds": suite.seeds,
        "differences": {
            metric.key: change
            for metric in METRICS
            if metric.per == "answer" and (change := _difference(one, other, metric, suite.bootstrap)) is not None
        },
        "answers": [
            {"row": a["row"], **{name: row["text"] for name, row in zip(models, (a, b), strict=True)}} for a, b in texts
        ],
    }
    return write_json(suite.out / "compared.json", found)


def _difference(one: list[list[Row]], other: list[list[Row]], metric: Metric, times: int) -> dict[str, float] | None:
    """The change of a metric from one model to the other; None if the answers do not have it."""
    first, second = scores.per_prompt(one, metric), scores.per_prompt(other, metric)
    if not (len(first) and len(second)):
        return None
    change = statistics.paired_bootstrap(first, second, times)
    return {"first": float(first.mean()), "second": float(second.mean()), **change}


def suite_of(prompts: Path, out: Path, limit: int | None = None, **settings: Any) -> Suite:
    """The suite that answers the prompts of one file.

    Args:
        prompts: JSON lines, with the rows that recipes read.
        out: Where answers and results are kept.
        limit: Use only the first prompts.
        **settings: Further settings of the suite.
    """
    return Suite.model_validate(
        {"out": out, "sets": {SET: {"file": str(prompts.absolute()), "limit": limit}}, **settings}
    )
