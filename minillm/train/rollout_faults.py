"""What is wrong, or looks wrong, with a batch of rollouts before anything is trained on it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.train.finite import are_finite

logger = logging.getLogger(__name__)

ENGINE_ADVICE = "Look at the engine and its log, start it again, or sample with another one (rollout.engine)"

_ROUNDING = 1e-2  # nats: how far above 0 an engine may round a log-probability
# Nats against identical responses: an engine draws them by its own probabilities once in e⁶⁰ batches.
_IMPOSSIBLE = 60.0
_TAIL, _PERIOD = 32, 8  # a response loops if its last tokens repeat a phrase of at most so many
_FEWEST = 4  # responses, below which shares of a batch say little


def rollout_faults(rollouts: Sequence[Rollout], sampled: int, width: int) -> dict[int, str]:
    """Find rollouts that no student can be trained on.

    These have no tokens, tokens beyond the vocabulary, or numbers that are not finite: log-probabilities of the engine
    or of the teacher, the teacher's states, or KL(q‖p). Identical responses are a fault if the engine cannot have drawn
    them: its own probabilities of all of them but one multiply to less than e⁻⁶⁰, so it returns something else than
    what it samples. A student that has collapsed also repeats itself, with probabilities near 1; see `LooksWrong`.

    Args:
        rollouts: The batch of this process, scored by the teacher.
        sampled: How many of them, from the first on, were sampled for this batch.
        width: Tokens of the vocabulary.

    Returns:
        What is wrong, by the place of the rollout in the batch.
    """
    found = {i: fault for i, rollout in enumerate(rollouts) if (fault := _fault_of(rollout, width))}
    copies: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts[:sampled]):
        if i not in found:
            copies[tuple(rollout.response_ids)].append(i)
    for places in (some for some in copies.values() if len(some) > 1):
        against = sorted(-float(rollouts[i].behaviour_logprobs.sum()) for i in places)
        if sum(against[:-1]) > _IMPOSSIBLE:
            fault = f"the engine returned one response {len(places)} times, against its own probabilities"
            found |= dict.fromkeys(places, fault)
    return found


def _fault_of(rollout: Rollout, width: int) -> str | None:
    ids, logq = rollout.response_ids, rollout.student_logprobs
    if not ids:
        return "the response has no tokens"
    if not 0 <= min(ids) <= max(ids) < width:
        return f"the response has tokens beyond the vocabulary ({max(ids)}, of {width})"
    if len(logq) != len(ids) or len(rollout.behaviour_logprobs) != len(ids):
        return f"{len(ids)} tokens have {len(logq)} log-probabilities"
    if not are_finite([logq, rollout.behaviour_logprobs]):
        return "log q is not finite"
    if float(logq.max()) > _ROUNDING or float(rollout.behaviour_logprobs.max()) > _ROUNDING:
        return f"log q is above 0 ({float(logq.max()):.2f})"
    if rollout.teacher is not None and (fault := _fault_of_teacher(rollout.teacher)):
        return fault
    if rollout.reverse_kl is not None and not are_finite([rollout.reverse_kl]):
        return "KL(q‖p) is not finite"
    return None


def _fault_of_teacher(teacher: TeacherTargets) -> str | None:
    if teacher.hidden is not None and not are_finite([teacher.hidden]):
        return "the teacher's states are not finite"
    logp: list[Tensor] = [] if teacher.token_logprobs is None else [teacher.token_logprobs]
    logp += [] if teacher.rows is None else [teacher.rows.logprobs]
    return None if are_finite(logp) else "log p of the teacher is not finite"


def record(rollout: Rollout, place: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Describe a rollout for the file of a refused update.

    Args:
        rollout: The rollout.
        place: Its place in the batch of its process.
        decode: Turns tokens into text.
    """
    teacher = rollout.teacher
    return {
        "place": place,
        "row": rollout.row,
        "weights_version": rollout.weights_version,
        "finished": rollout.finished,
        "prompt": decode(rollout.prompt_ids),
        "response": _text_of(rollout.response_ids, decode),
        "prompt_ids": rollout.prompt_ids,
        "response_ids": rollout.response_ids,
        "student_logprobs": rollout.student_logprobs,
        "behaviour_logprobs": rollout.behaviour_logprobs,
        "teacher_logprobs": None if teacher is None else teacher.token_logprobs,
        "reverse_kl": rollout.reverse_kl,
    }


def _text_of(ids: list[int], decode: Callable[[list[int]], str]) -> str | None:
    try:
        return decode(ids)
    except (OverflowError, IndexError, ValueError, TypeError):  # tokens that no tokenizer has
        return None


@dataclass(frozen=True)
class Degenerate:
    """How many responses of a batch are of a kind that teaches little.

    Attributes:
        responses: All responses.
        truncated: Those that were cut at the length limit.
        ended_at_once: Those of one token, which ends them.
        repeated: Those that another response of the batch has as well, all but the first.
        looping: Those that end by repeating a phrase of at most 8 tokens for 32 tokens.
    """

    responses: int
    truncated: int
    ended_at_once: int
    repeated: int
    looping: int

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Degenerate:
        """Count the responses of each kind."""
        texts = [tuple(rollout.response_ids) for rollout in rollouts]
        return cls(
            len(rollouts),
            sum(not rollout.finished for rollout in rollouts),
            sum(rollout.finished and len(rollout.response_ids) <= 1 for rollout in rollouts),
            len(texts) - len(set(texts)),
            sum(is_looping(rollout.response_ids) for rollout in rollouts),
        )

    def means(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of the metrics of these kinds that are logged, by name."""
        kinds = {"ended_at_once": self.ended_at_once, "repeated": self.repeated, "looping": self.looping}
        return {f"responses_{name}": (count, self.responses) for name, count in kinds.items()}


def is_looping(ids: Sequence[int]) -> bool:
    """Whether a response ends by repeating a phrase of at most 8 tokens for 32 tokens or more."""
    tail = list(ids[-_TAIL:])
    return len(tail) == _TAIL and any(tail[period:] == tail[:-period] for period in range(1, _PERIOD + 1))


class LooksWrong:
    """Tells of batches whose responses teach little: once when they begin to, and again after a batch that was well.

    Args:
        alarm: Is called with each alarm, in words.
    """

    def __init__(self, alarm: Callable[[str], None]) -> None:
        self._alarm, self._standing = alarm, frozenset[str]()

    def look(self, found: Degenerate) -> None:
        """Raise an alarm for every kind that most of a batch, or all of it, is of."""
        size = found.responses
        shares = {
            "every response was cut at the length limit: raise rollout.max_new_tokens, or look at how responses end": (
                found.truncated == size
            ),
            "most responses end with their first token": 2 * found.ended_at_once > size,
            "most responses are the same as others of their batch": 2 * found.repeated > size,
            "most responses end in a loop of a few tokens": 2 * found.looping > size,
        }
        now = frozenset(text for text, holds in shares.items() if holds and size >= _FEWEST)
        for text in sorted(now - self._standing):
            self._alarm(f"{text} ({size} responses)")
        self._standing = now
