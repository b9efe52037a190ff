"""How many responses an update trains on, and what follows from it: micro-batches and their accumulation.

A light module: recipes are checked with it before torch is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minillm.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

RESPONSES = "responses_per_update"
"""The setting that says how many responses an update trains on, over all processes."""
MICRO_BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
_LARGEST = 8  # responses of a micro-batch where nothing says another number, as in transformers


def sizes_of_update(responses: int, processes: int, micro_batch: int | None = None) -> tuple[int, int]:
    """Divide the responses of an update among processes and micro-batches.

    Args:
        responses: responses of an update, over all processes.
        processes: how many processes train.
        micro_batch: responses of the largest micro-batch, if that is given.

    Returns:
        Responses of a micro-batch, and micro-batches of one process in an update.

    Raises:
        InputError: one does not divide; the message begins with the setting to change, and lists what is allowed.
    """
    share, rest = divmod(responses, processes)
    if rest or not share:
        near = [size for size in (responses - rest, responses - rest + processes) if size]
        raise InputError(
            f"{RESPONSES}: {responses} responses cannot be shared by {processes} processes alike: set "
            f"{_one_of(near)}, or launch {_one_of(_divisors(responses))} processes"
        )
    if micro_batch is None:
        micro_batch = max(size for size in _divisors(share) if size <= _LARGEST)
    micro_batch = min(micro_batch, share)
    if share % micro_batch:
        whose = "an update" if processes == 1 else f"a process in an update ({responses} over {processes} processes)"
        raise InputError(
            f"{MICRO_BATCH}: {micro_batch} does not divide the {share} responses of {whose}: set "
            f"{_one_of(_divisors(share))}, or leave it out"
        )
    return micro_batch, share // micro_batch


def update_size_faults(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with `responses_per_update` among training arguments, whatever the number of processes.

    Args:
        given: training arguments of a recipe's section, with it.

    Returns:
        The argument and its fault, of each.
    """
    responses = given.get(RESPONSES)
    if responses is None:
        return []
    if not isinstance(responses, int) or isinstance(responses, bool) or responses < 1:
        return [(RESPONSES, f"a whole number of responses above 0 is needed (given: {responses!r})")]
    if ACCUMULATION in given:
        return [
            (
                ACCUMULATION,
                f"it follows from {RESPONSES} ({responses}) and the number of processes: leave it out, or set "
                f"{RESPONSES}: null",
            )
        ]
    return []


def with_responses(args: TrainingArguments, responses: int | None) -> TrainingArguments:
    """A copy of a trainer's arguments whose updates train on so many responses, over all processes.

    Args:
        args: the arguments. Their `per_device_train_batch_size` is the largest micro-batch, if it is not the default.
        responses: responses of an update; None leaves the arguments as they are.

    Raises:
        InputError: the number cannot be divided, or the arguments say another one.
    """
    if responses is None:
        return args
    if args.gradient_accumulation_steps != 1:
        [(name, fault)] = update_size_faults({RESPONSES: responses, ACCUMULATION: args.gradient_accumulation_steps})
        raise InputError(f"args.{name}: {fault}")
    if args.deepspeed:
        raise InputError(
            f"{RESPONSES} with DeepSpeed, whose sizes were settled when args were made: set args.{MICRO_BATCH} and "
            f"args.{ACCUMULATION} instead"
        )
    if faults := update_size_faults({RESPONSES: responses}):
        raise InputError(": ".join(faults[0]))
    given = args.per_device_train_batch_size
    micro_batch, accumulation = sizes_of_update(responses, args.world_size, None if given == _LARGEST else given)
    args = copy.copy(args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro_batch, accumulation
    return args


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _one_of(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
