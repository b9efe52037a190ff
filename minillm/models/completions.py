"""Completions that `vllm serve` answers with, read from JSON and validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.data.logprobs import LOG_ZERO

_ROUNDING = 1e-3  # how far above 0 a log-probability may be rounded


@dataclass
class Completion:
    """A validated completion of T tokens.

    Attributes:
        ids: The T sampled token ids.
        logprobs: The T log-probabilities of the sampled tokens.
        tables: For each of the T positions, log-probabilities by token id; empty where they were not requested.
        stopped: Whether the completion ended before its token limit.
    """

    ids: list[int]
    logprobs: list[float]
    tables: list[dict[int, float]]
    stopped: bool


def checked_logprob(value: float) -> float:
    """Return a server's log-probability, but at least `LOG_ZERO`.

    Raises:
        ValueError: The value is above 0 (beyond rounding) or not a number.
    """
    if not value <= _ROUNDING:
        raise ValueError(f"invalid log-probability {value} (above 0, or not a number)")
    return max(float(value), LOG_ZERO)


def read_completion(answer: Any, required_ids: Sequence[int] = (), tables: bool = True) -> Completion:
    """Read and validate the JSON of a completion.

    A sampled token has a probability above 0. Other tokens may have none: −inf, or the −9999 that stands for it in
    JSON, counts as `LOG_ZERO`.

    Args:
        answer: The parsed JSON.
        required_ids: Token ids whose log-probabilities the first position must have.
        tables: Whether the log-probabilities of other tokens are needed.

    Raises:
        KeyError, TypeError, ValueError: The answer is not a valid completion. `Server.complete` catches these.
    """
    [choice] = answer["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason {choice['finish_reason']!r}")
    ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
    if not ids or len(ids) != len(logprobs) or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
    if any(checked_logprob(value) == LOG_ZERO for value in logprobs):
        raise ValueError("a sampled token has a probability of 0")
    stopped = choice["finish_reason"] == "stop"
    if not tables:
        return Completion(ids, logprobs, [], stopped)
    by_position = [
        {int(name.removeprefix("token_id:")): checked_logprob(value) for name, value in table.items()}
        for table in choice["logprobs"]["top_logprobs"]
    ]
    if len(by_position) != len(ids) or not set(required_ids) <= by_position[0].keys():
        raise ValueError("requested log-probabilities are missing")
    return Completion(ids, logprobs, by_position, stopped)
