"""A training that goes on for longer than it was to: what its schedules do, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import get_scheduler

from minillm.errors import LengthError

logger = logging.getLogger(__name__)


def updates_of(trainer: Any) -> int:
    """How many updates a trainer's arguments ask for in all."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    *_, updates = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return updates


def check_lengthened(trainer: Any, stage: str, done: int, before: int) -> None:
    """Say what the learning rate does where a training goes on for longer than it was to.

    As in transformers, the schedule is that of the new length from here on. Where a schedule depends on the length, the
    updates so far were made with another one than a training of the new length would have made them with.

    Args:
        trainer: the trainer, with the new length.
        stage: the stage's name, for messages.
        done: updates that have been made.
        before: updates that it was to have in all.

    Raises:
        LengthError: the warm-up of the learning rate, a share of the length, would begin again.
    """
    after, args = updates_of(trainer), trainer.args
    if after == before or args.deepspeed:
        return
    if args.get_warmup_steps(before) <= done < args.get_warmup_steps(after):
        remedy = f"set warmup_steps to the {args.get_warmup_steps(before)} updates that it had, or "
        raise LengthError(
            f"stage {stage}: its warm-up of the learning rate (warmup_steps {args.warmup_steps:g}, a share of "
            f"{after} updates) would begin again at update {done}, after it was over: "
            f"{remedy if args.max_steps > 0 else ''}leave the length as it was, or make the stage again: "
            f"--stage {stage} --redo"
        )
    old, new = rates(args, before, done + 1), rates(args, after, done + 1)
    other = list(getattr(trainer, "follows_length", ()))
    if old is None or new is None or (old[:done] == new[:done] and not other):
        return
    names = " and ".join(
        [f"learning rate ({getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)})", *other]
    )
    logger.warning(
        "Stage %s goes on from update %d to %d. Its first %d updates followed the schedule of %d: %s. From here on it "
        "is that of %d, and the rate goes from %.2g to %.2g. A training of %d from the start would differ.",
        stage,
        done,
        after,
        done,
        before,
        names,
        after,
        old[done - 1] if done else 0.0,
        new[done],
        after,
    )


def rates(args: Any, updates: int, number: int) -> list[float] | None:
    """The learning rates of the first updates of a training.

    Args:
        args: the arguments of the training.
        updates: updates of the training.
        number: how many rates.

    Returns:
        The rates; None where they follow from what is measured while training.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    options = args.lr_scheduler_kwargs or {}
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(updates), updates, scheduler_specific_kwargs=options
    )
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return None
    return [args.learning_rate * schedule.lr_lambdas[0](update) for update in range(number)]
