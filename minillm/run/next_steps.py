"""What to try next when a run's check did not pass, from its results and its logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.evaluation.verdict import check_of

_FALLING = 0.95  # the last quarter against the one before it: below this share, training had not levelled out
_RISEN = 1.1
_CLIPPED = 0.3  # share of tokens
_MISMATCH = 0.05  # nats a token

Log = Sequence[Mapping[str, Any]]


def next_steps(results: Mapping[str, Any], log: Log, settings: Mapping[str, Any]) -> list[str]:
    """Say what to try, each with what was seen and the setting to change; the most telling first.

    Args:
        results: The contents of `results.json`.
        log: The log of the minillm stage.
        settings: Its settings by dotted name.

    Returns:
        Sentences; none if the check passed, or if nothing was compared.
    """
    found = check_of(results)
    if found is None or found["passed"]:
        return []
    outcomes = {item["criterion"].split()[0]: item["outcome"] for item in found["criteria"]}
    steps = [*_of_training(log, settings), *_of_scores(outcomes, settings)]
    if found["verdict"] == "no clear difference":
        steps.append(
            f"Intervals come from {results['prompts']} prompts and {len(results['seeds'])} seeds: more of either "
            "(data.heldout, evaluate.seeds) makes them narrower, and costs no training."
        )
    return steps


def _of_training(log: Log, settings: Mapping[str, Any]) -> list[str]:
    steps = []
    first, before, last = _quarters(log, "reverse_kl")
    rate = settings.get("training.learning_rate")
    if first and last > _RISEN * first:
        now = f" (it is {rate:g}; try {rate / 4:g})" if isinstance(rate, int | float) else ""
        steps.append(
            f"KL(q‖p) of the sampled responses rose from {first:.2f} to {last:.2f} nats a token: lower "
            f"training.learning_rate{now}."
        )
    elif before and last < _FALLING * before:
        steps.append(
            f"KL(q‖p) of the sampled responses was still falling at the end ({before:.2f} → {last:.2f} nats a token "
            "over the last half of the log): raise training.max_steps or training.num_train_epochs."
        )
    clipped = _mean(log, "clipped")
    if clipped > _CLIPPED:
        steps.append(
            f"{clipped:.0%} of the tokens were clipped, so they taught nothing: train fewer updates on each batch "
            "(rollout.inner_epochs, rollout.num_rollouts), or lower training.learning_rate."
        )
    mismatch = _mean(log, "engine_mismatch")
    if mismatch > _MISMATCH:
        steps.append(
            f"Engine and trainer differ by {mismatch:.2f} nats a token in log q: set objective.old_logprobs: trainer."
        )
    return steps


def _of_scores(outcomes: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    steps = []
    if outcomes.get("finished") == "worse":
        limit = settings.get("rollout.max_new_tokens")
        now = f" (it is {limit})" if limit else ""
        steps.append(
            f"Fewer answers end by themselves: raise rollout.max_new_tokens{now} if responses reach it while training, "
            "and warm up for longer (warmup.training)."
        )
    if outcomes.get("Rouge-L") == "worse":
        steps.append(
            "The answers agree less with the teacher's: warm up for longer (warmup.training), and give text for the "
            "language-model term (data.text)."
        )
    return steps


def _quarters(log: Log, key: str) -> tuple[float, float, float]:
    """Means of the first, the third and the last quarter of a curve; zeros if it is too short to say."""
    values = [float(entry[key]) for entry in log if entry.get(key) is not None]
    size = len(values) // 4
    if not size:
        return 0.0, 0.0, 0.0
    first, third, last = values[:size], values[-2 * size : -size], values[-size:]
    return sum(first) / size, sum(third) / size, sum(last) / size


def _mean(log: Log, key: str) -> float:
    values = [float(entry[key]) for entry in log if entry.get(key) is not None]
    return sum(values) / len(values) if values else 0.0
