"""Notices a student that gets worse: during a stage on a few fixed rows, and at its end by what was logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from minillm.teacher.routed import ExactTeacher
from minillm.train.validation import ValidationMixin

logger = logging.getLogger(__name__)

_ROWS = 8
_LESS = 4  # what the learning rate is divided by in the advice
_NOISE, _LEAST = 0.1, 0.02  # a rise of less than a tenth, or than 0.02 nats a token, is none
_BROKEN = 0.5  # nats a token: a rise by this, to more than twice the start, is told at once
_PREFIX = "watched_"


@dataclass(frozen=True)
class Decline:
    """How a stage ended worse than it began.

    Attributes:
        what: What was measured, in words.
        before: Its value when the stage began, in nats per token.
        after: Its value when the stage ended.
    """

    what: str
    before: float
    after: float


class FixedRows(TrainerCallback):
    """Scores the same few training rows before the first update, after updates 1, 4, 16, 64, …, and after the last.

    It logs `watched_reverse_kl` and `watched_forward_kl`, in nats per token. This costs a few forward passes, and no
    sampling. A student that the first update broke is told of after the first update.

    Args:
        trainer: The trainer, which must have a teacher that returns exact distributions (see `can_watch`).
        rows: Rows with `prompt_ids` and `response_ids`, of which some are chosen, spread evenly.
        advice: What to change if the student gets worse.
    """

    def __init__(self, trainer: ValidationMixin, rows: Sequence[Mapping[str, Any]], advice: str) -> None:
        self._trainer, self._advice, self._told = trainer, advice, False
        count = min(_ROWS, len(rows))
        self.rows = [rows[i * len(rows) // count] for i in range(count)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the rows before the first update; a training that is resumed has done it."""
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the rows after some updates."""
        step = state.global_step
        if step >= state.max_steps or (step & (step - 1) == 0 and step.bit_length() % 2):
            self._measure(state)

    def _measure(self, state: Any) -> None:
        found = self._trainer.divergences_on(self.rows)
        self._trainer.log({f"{_PREFIX}{name}": value for name, value in found.items()})
        began = _values(state.log_history, f"{_PREFIX}reverse_kl")
        if not began or self._told or not state.is_world_process_zero:
            return
        if began[-1] > max(2 * began[0], began[0] + _BROKEN):
            self._told = True
            logger.warning(
                "After update %d KL(q‖p) is %.2f nats a token on %d of the training rows, and was %.2f before the "
                "first: %s",
                state.global_step,
                began[-1],
                len(self.rows),
                began[0],
                self._advice,
            )


def can_watch(trainer: Any) -> bool:
    """Whether a trainer's teacher gives the distributions that `FixedRows` compares with."""
    return isinstance(trainer.teacher, ExactTeacher)


def advice(setting: str, learning_rate: float) -> str:
    """Say which setting to try where a student got worse.

    Args:
        setting: Dotted name of the section that holds the `TrainingArguments`.
        learning_rate: The learning rate that it has.
    """
    return f"try {setting}.learning_rate={learning_rate / _LESS:g} (it is {learning_rate:g})"


def decline(history: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> Decline | None:
    """Compare the end of a stage with its beginning.

    Args:
        history: The log of the trainer.
        measures: What to look for in it, the most telling first, each with what it is in words; less of it is better.
            The first that the log has at least twice decides. What is measured on the same rows (`eval_…`,
            `watched_…`) is compared by its first and last value, and what every update measures on rows of its own by
            the means of the first and the last quarter of the log.

    Returns:
        None if the stage did not end worse, beyond noise.
    """
    for key, what in measures.items():
        values = _values(history, key)
        if len(values) < 2:
            continue
        some = 1 if key.startswith((_PREFIX, "eval_")) else max(len(values) // 4, 1)
        before, after = (sum(part) / some for part in (values[:some], values[-some:]))
        return Decline(what, before, after) if after > before + max(_NOISE * abs(before), _LEAST) else None
    return None


def _values(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(entry[key]) for entry in history if key in entry]
