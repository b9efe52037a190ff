"""What every sampling engine gives: responses, and the log-probabilities that drew them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# q_old differs from the training forward by this kind of rounding; see `engine_mismatch` in the logs.
NamedTensors = Iterable[tuple[str, Tensor]]


class EngineError(RuntimeError):
    """An engine that is not to be had, or that has stopped answering."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature) over the first `vocab_size` ids.

    A response ends with the first of `eos_ids`, which belongs to it, or after `max_new_tokens`. With `likeliest`, the
    log-probabilities of at least as many likeliest tokens come back for each place.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    temperature: float = 1.0
    likeliest: int = 0


@dataclass
class Rollout:
    """One sampled response; nothing is padded.

    Attributes:
        response_ids: T tokens, up to and including the first EOS.
        student_logprobs: [T] float32, log q_old(y_t) in the engine's own numbers.
        behaviour_logprobs: [T] float32, log-probability under the distribution that really drew y_t.
        weights_version: which weights q_old is.
        finished: it ended with an EOS rather than at the limit.
        teacher_logprobs: [T] float32, log p(y_t); None until scored.
        teacher_hidden: [T, H_p], the teacher's final states that predict y_t; None until scored.
        likeliest: for each place, log q of the likeliest tokens by id; None unless asked for.
        reverse_kl: [T] float32, KL(q‖p) after each prefix, of the student that first trained on it; None until then.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    student_logprobs: Tensor
    behaviour_logprobs: Tensor
    weights_version: int
    finished: bool
    teacher_logprobs: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reverse_kl: Tensor | None = None
    likeliest: list[dict[int, float]] | None = None


class Engine(Protocol):
    """Samples from one model whose weights can be replaced."""

    version: int

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False) -> list[Rollout]:
        """One response a prompt, in order. The same seed, prompt and weights draw the same response."""
        ...

    def logprobs_of(self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling) -> list[Tensor]:
        """Log-probability, as `generate` would draw it, of each of `ids[i]` as the token after `prefixes[i]`."""
        ...

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Replace every weight; names are those of the model's state dict."""
        ...

    def close(self) -> None: ...


def next_token_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [..., vocab_size], float32, of the distribution that tokens are drawn from."""
    return torch.log_softmax(logits[..., : sampling.vocab_size].float() / sampling.temperature, dim=-1)
