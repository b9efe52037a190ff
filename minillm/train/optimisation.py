"""Checks that the optimiser, the learning-rate scheduler and the trackers can be built, and read all their options."""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.optimization import get_scheduler

Fault = tuple[str, str]
"""An argument, and its fault."""

_OWN_GROUPS = "it makes parameter groups of its own, without weight_decay and the adam_ settings"
_IN_BACKWARD = "it steps inside the backward pass, before gradients are accumulated and clipped"
_OPTIMISERS = {
    "lomo": _IN_BACKWARD,
    "layerwise": _IN_BACKWARD,
    "galore": _OWN_GROUPS,
    "apollo": _OWN_GROUPS,
    "schedule_free": "the weights that it is meant to leave are an average, and the student would be sampled and saved "
    "without it",
}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that depend on what validation measures."""


def one_of(name: str, names: Iterable[str]) -> str:
    """The allowed names in words, with the one most similar to `name` first, if there is one."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]}? " if close else "") + "allowed: " + ", ".join(names)


def optimiser_faults(args: Any) -> Iterator[Fault]:
    """Faults of the optimiser and its options, found by building it for a small layer."""
    for part, reason in _OPTIMISERS.items():
        if part in args.optim:
            yield "optim", f"not honoured here: {reason} (given: {str(args.optim.value)!r})"
            return
    options: dict[str, str] = {}
    for part in (args.optim_args or "").replace(" ", "").split(",") if args.optim_args else ():
        key, _, options[key] = part.partition("=")
        if not key or not options[key] or "=" in options[key]:
            yield "optim_args", f"key=value,key=value is needed (given: {args.optim_args!r})"
            return
    try:
        chosen, settings = _optimiser(args, options)
        chosen(torch.nn.Linear(1, 1).parameters(), **settings)
    except Exception as error:  # a missing package, one that cannot be imported, or an unknown argument
        given = args.optim_args if options else args.optim.value
        yield "optim_args" if options else "optim", f"{' '.join(str(error).split())} (given: {given!r})"
        return
    for name, key in (("adam_beta1", "betas"), ("adam_beta2", "betas"), ("adam_epsilon", "eps")):
        default = type(args).__dataclass_fields__[name].default
        if key not in settings and getattr(args, name) != default:
            yield (
                name,
                f"optim: {args.optim.value} does not read it: leave it at {default} (given: {getattr(args, name)!r})",
            )
    for key in options:
        if key in ("lr", "weight_decay"):
            yield (
                "optim_args",
                f"{key}: set {'learning_rate' if key == 'lr' else key} itself (given: {args.optim_args!r})",
            )
        elif not _is_read(args, options, key):
            yield "optim_args", f"{key}: optim: {args.optim.value} does not read it (given: {args.optim_args!r})"


def _optimiser(args: Any, options: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The optimiser's class and its arguments, given these options."""
    changed = copy.copy(args)
    changed.optim_args = ",".join(f"{key}={value}" for key, value in options.items())
    return Trainer.get_optimizer_cls_and_kwargs(changed, torch.nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


def _is_read(args: Any, options: dict[str, str], key: str) -> bool:
    """Whether another value of an option gives another optimiser, or an error."""
    without = {name: value for name, value in options.items() if name != key}
    try:
        return _optimiser(args, {**without, key: "0.123"})[1] != _optimiser(args, without)[1]
    except Exception:  # the value has the wrong type, so the option was read
        return True


def scheduler_faults(args: Any) -> Iterator[Fault]:
    """Faults of the learning-rate scheduler, found by building it and computing a few rates."""
    kind, options = str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs or {}
    if args.warmup_steps and kind in ("constant", *BY_METRIC):
        instead = "constant_with_warmup" if kind == "constant" else "another scheduler"
        yield (
            "warmup_steps",
            f"lr_scheduler_type: {kind} has no warm-up: set {instead}, or 0 (given: {args.warmup_steps:g})",
        )
    if not isinstance(options, dict):
        yield "lr_scheduler_kwargs", f"a mapping is needed (given: {options!r})"
        return
    if options and kind in ("constant", "constant_with_warmup"):
        yield "lr_scheduler_kwargs", f"lr_scheduler_type: {kind} takes none (given: {options!r})"
    for key, value in options.items():
        if isinstance(value, str) and _is_number(value):
            yield (
                "lr_scheduler_kwargs",
                f"{key}: a number is needed; YAML 1.1 reads 1e-6 as text: write 1.0e-6 (given: {value!r})",
            )
            return
    total = args.max_steps if args.max_steps > 0 else 10**6
    warmup = args.get_warmup_steps(total)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=args.learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler: Any = get_scheduler(kind, optimizer, warmup, total, options)
            if kind in BY_METRIC:
                scheduler.step(1.0)
            rates = (
                [scheduler.lr_lambdas[0](step) for step in (0, warmup, (warmup + total) // 2, total)]
                if kind not in BY_METRIC
                else []
            )
    except Exception as error:
        text = " ".join(str(error).split())
        if options:
            yield "lr_scheduler_kwargs", f"{text} (given: {options!r})"
        else:
            yield "lr_scheduler_type", f"{text}: set lr_scheduler_kwargs (given: {kind!r})"
        return
    if not all(isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0 for rate in rates):
        yield (
            "lr_scheduler_kwargs",
            f"they give learning rates that are negative or not finite: {rates} (given: {options!r})",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def tracker_faults(args: Any) -> Iterator[Fault]:
    """Faults of trackers, found by creating their callbacks, which import them."""
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            yield (
                "report_to",
                f"no such tracker; {one_of(str(name), ['none', 'all', *INTEGRATION_TO_CALLBACK])} (given: {name!r})",
            )
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # not installed, or it cannot start here
            text, installed = " ".join(str(error).split()), ", ".join(get_available_reporting_integrations()) or "none"
            how = "" if "pip install" in text else f" pip install {name.replace('_', '-')}."
            yield "report_to", f"{text}{how} Trackers installed: {installed} (given: {name!r})"
