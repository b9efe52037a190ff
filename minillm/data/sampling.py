"""How tokens are drawn, and where a response ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature) over the first `vocab_size` ids.

    A response ends with the first of `eos_ids`, which belongs to it; with the token that completes one of the `stop`
    strings in its text; or after `max_new_tokens`. With `top_logprobs`, the log-probabilities of at least as many likeliest
    tokens come back for each place. With `no_repeat_ngram`, for evaluation, tokens that would repeat an n-gram of that
    length, prompt included, are not drawn (transformers engine only).
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    temperature: float = 1.0
    top_logprobs: int = 0
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
            raise InputError("stop: an empty string is in every text")
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
