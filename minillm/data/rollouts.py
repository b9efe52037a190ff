"""A sampled response, and what its tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class EngineError(RuntimeError):
    """What draws or scores rollouts is not to be had, or has stopped answering."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature) over the first `vocab_size` ids.

    A response ends with the first of `eos_ids`, which belongs to it; with the token that completes one of the `stop`
    strings in its text; or after `max_new_tokens`. With `likeliest`, the log-probabilities of at least as many likeliest
    tokens come back for each place. With `no_repeat_ngram`, for evaluation, tokens that would repeat an n-gram of that
    length, prompt included, are not drawn (transformers engine only).
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    temperature: float = 1.0
    likeliest: int = 0
    stop: StopStrings | None = None
    no_repeat_ngram: int = 0

    def length(self, ids: list[int]) -> int | None:
        """Tokens of a response that begins with `ids`, up to the one that ends it; None while none does.

        The limit is not looked at: who draws counts the tokens.
        """
        ends = next((place + 1 for place, token in enumerate(ids) if token in self.eos_ids), None)
        if self.stop is not None:
            stopped = self.stop.length(ids if ends is None else ids[:ends])
            ends = ends if stopped is None else stopped
        return ends

    def ended(self, ids: list[int]) -> bool:
        """Whether the last of `ids` ends the response, given that none before it did."""
        return ids[-1] in self.eos_ids or (self.stop is not None and self.stop.length(ids) is not None)


class StopStrings:
    """Strings of which the first to appear in a response's text ends it.

    Args:
        tokenizer: decodes the response by itself; special tokens are no text (their ids end a response, where they do).
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("stop: an empty string is in every text")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer

    def length(self, ids: Sequence[int]) -> int | None:
        """Tokens up to the one that completes a string; None where there is none."""
        if not self._found(ids):
            return None
        low, high = 1, len(ids)  # found in the first `high` tokens, and text only grows
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._found(ids[:middle]) else (middle + 1, high)
        return high

    def _found(self, ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)


@dataclass
class TeacherRows:
    """Log p of a few tokens after each of N prefixes, for a teacher that is not at hand to give all of them.

    ids, logprobs: [N, K]. Slot 0 is the token that was drawn; a slot that is not used repeats it.
    """

    ids: Tensor
    logprobs: Tensor


@dataclass
class Rollout:
    """One sampled response; nothing is padded.

    Attributes:
        response_ids: T tokens, up to and including the first EOS.
        student_logprobs: [T] float32, log q_old(y_t) in the engine's own numbers.
        behaviour_logprobs: [T] float32, log-probability under the distribution that really drew y_t.
        weights_version: which weights q_old is.
        finished: it ended with an EOS or a stop string rather than at the limit.
        teacher_logprobs: [T] float32, log p(y_t); None until scored.
        teacher_hidden: [T, H_p], the teacher's final states that predict y_t; None until scored, and for a served teacher.
        teacher_rows: what a served teacher tells instead; None otherwise.
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
    teacher_rows: TeacherRows | None = None
    reverse_kl: Tensor | None = None
    likeliest: Sequence[dict[int, float]] | None = None

    @classmethod
    def drawn(
        cls, prompt: list[int], ids: list[int], logprobs: Sequence[float], sampling: Sampling, version: int, *,
        stopped: bool = False, likeliest: Sequence[dict[int, float]] | None = None,
    ) -> Rollout:  # fmt: skip
        """What an engine drew, cut after the token that ends it; `stopped`: the engine saw an end."""
        length = sampling.length(ids)
        values = torch.tensor(logprobs[:length], dtype=torch.float32)
        finished = stopped or length is not None
        return cls(prompt, ids[:length], values, values, version, finished, likeliest=likeliest and likeliest[:length])


def next_token_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [..., vocab_size], float32, of the distribution that tokens are drawn from."""
    return torch.log_softmax(logits[..., : sampling.vocab_size].float() / sampling.temperature, dim=-1)
