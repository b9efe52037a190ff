"""Which checkpoint is the best: the metric, its direction, and whether validation measures it at all."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import TrainingArguments

from minillm.evaluation.metrics import HELD_OUT, METRIC
from minillm.train.optimisation import BY_METRIC, Fault, one_of

logger = logging.getLogger(__name__)

METRICS = {metric.key: metric.greater_is_better for metric in HELD_OUT}
"""What validation measures, and whether more of it is better; None if that depends on the purpose."""


def with_given(args: TrainingArguments, given: Collection[str]) -> TrainingArguments:
    """Note in the arguments which fields the user set.

    Without this, `greater_is_better=True` may be transformers' own guess.

    Args:
        args: the arguments, which are changed in place.
        given: the fields that the user set.

    Returns:
        The same arguments.
    """
    vars(args)["given"] = frozenset(given)
    return args


def best_faults(
    args: Any, missing: str | None, reads_teacher: bool, metrics: Mapping[str, bool | None]
) -> Iterator[Fault]:
    """Faults of the settings that depend on validation.

    `metric_for_best_model` and `greater_is_better` are settled in place, because transformers may have guessed them.

    Args:
        args: the arguments.
        missing: the setting that would name the rows to validate on; None if there are such rows.
        reads_teacher: whether validation can take divergences from the teacher.
        metrics: what validation measures, and whether more of it is better.
    """
    evaluates = args.eval_strategy != "no"
    for key, wanted in (("eval_strategy", evaluates), ("eval_on_start", args.eval_on_start)):
        if wanted and missing:
            yield key, f"there are no rows to validate on: set {missing}, or leave it out"
    needs = [
        name
        for name, does in (
            ("load_best_model_at_end", args.load_best_model_at_end),
            ("save_strategy", args.save_strategy == "best"),
            ("lr_scheduler_type", args.lr_scheduler_type in BY_METRIC),
        )
        if does
    ]
    if needs and not evaluates:
        yield needs[0], "must be used with validation: set eval_strategy to steps or epoch"
    elif args.load_best_model_at_end and args.save_strategy != "best":
        if args.save_strategy != args.eval_strategy:
            fault = f"with load_best_model_at_end it has to be eval_strategy ({args.eval_strategy.value}), or best"
            yield "save_strategy", f"{fault} (given: {args.save_strategy.value})"
        elif args.save_strategy == "steps" and args.save_steps != args.eval_steps:
            fault = f"with load_best_model_at_end it has to be eval_steps ({args.eval_steps:g})"
            yield "save_steps", f"{fault}: a best score without a checkpoint is lost (given: {args.save_steps:g})"
    if not needs and args.metric_for_best_model is None:
        return
    direction_given = _settle(args, metrics)
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in metrics:
        yield (
            "metric_for_best_model",
            f"validation does not measure it: {one_of(name, metrics)} (given: {args.metric_for_best_model!r})",
        )
        return
    if name in METRIC and METRIC[name].per == "token" and not reads_teacher:
        yield (
            "metric_for_best_model",
            f"{name} needs the teacher's model in this process, and there is none: set rouge_l",
        )
    if metrics[name] is None and not direction_given:
        yield (
            "greater_is_better",
            f"whether more of {name} is better is not known: set it, or metric_for_best_model: rouge_l",
        )
    direction = "max" if args.greater_is_better else "min"
    mode = args.lr_scheduler_kwargs.get("mode", "min") if isinstance(args.lr_scheduler_kwargs, dict) else "min"
    if "lr_scheduler_type" in needs and mode != direction:
        fault = f"lr_scheduler_type: {args.lr_scheduler_type.value} would take a better {name} for a worse one"
        yield "lr_scheduler_kwargs", f"{fault}: set mode to {direction} (it is {mode})"


def _settle(args: Any, metrics: Mapping[str, bool | None]) -> bool:
    """Replace transformers' guesses of the metric and its direction, and return whether the user set the direction.

    Without `with_given`, a guess and a choice look alike: `loss` and `greater_is_better=True` count as guesses.
    """
    given: frozenset[str] | None = vars(args).get("given")
    name, level = args.metric_for_best_model, logging.WARNING if given is None else logging.INFO
    if name in (None, "loss") if given is None else "metric_for_best_model" not in given:
        args.metric_for_best_model = default = next(iter(metrics))
        if name != default:
            logger.log(level, "metric_for_best_model: %s, because no metric was set that validation measures.", default)
    if given is not None:
        direction_given = "greater_is_better" in given and args.greater_is_better is not None
    else:
        direction_given = args.greater_is_better is False and name not in (None, "loss")
    known = metrics.get(args.metric_for_best_model.removeprefix("eval_"))
    if known is not None and known != args.greater_is_better:
        if direction_given:
            logger.warning(
                "greater_is_better=%s keeps the worst %s.", args.greater_is_better, args.metric_for_best_model
            )
        else:
            logger.log(level, "greater_is_better=%s, as %s requires.", known, args.metric_for_best_model)
            args.greater_is_better = known
    return direction_given
