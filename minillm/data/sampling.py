"""Settings for sampling tokens, and the rules for where a response ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled: from softmax(logits / temperature) over the first `vocab_size` ids.

    A response ends with the first of three: an end token, which belongs to the response; the token that completes a
    stop string in its text; or the token that reaches `max_new_tokens`.

    Attributes:
        max_new_tokens: Largest number of tokens of a response.
        eos_ids: End tokens.
        vocab_size: Number of ids that can be sampled. Rows of the output head beyond it are padding.
        temperature: Temperature of the softmax.
        teacher_mix: Share α of the teacher. If above 0, tokens are sampled from (1 − α)·q + α·p, where p is the teacher
            that the engine was started with, at the same temperature.
        top_logprobs: If above 0, an engine also returns the log-probabilities of at least so many of the most likely
            tokens at each position.
        stop: Stop strings, if any.
        no_repeat_ngram: If above 0, tokens that would repeat an n-gram of this length, the prompt included, are not
            sampled. For evaluation, with the transformers engine only.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    temperature: float = 1.0
    teacher_mix: float = 0.0
    top_logprobs: int = 0
    stop: StopStrings | None = None
    no_repeat_ngram: int = 0

    def length(self, ids: list[int]) -> int | None:
        """Return the number of tokens up to the end token or stop string that ends a response.

        The limit `max_new_tokens` is not applied here: whoever samples counts the tokens.

        Args:
            ids: The first tokens of the response.

        Returns:
            The number of tokens, or None if nothing in `ids` ends the response.
        """
        ends = next((position + 1 for position, token in enumerate(ids) if token in self.eos_ids), None)
        if self.stop is not None:
            stopped = self.stop.length(ids if ends is None else ids[:ends])
            ends = ends if stopped is None else stopped
        return ends

    def ended(self, ids: list[int]) -> bool:
        """Return whether the last token of `ids` ends the response, if no token before it does."""
        return ids[-1] in self.eos_ids or (self.stop is not None and self.stop.length(ids) is not None)


class StopStrings:
    """Strings that end a response as soon as one of them appears in its text.

    Args:
        tokenizer: Decodes the response, without its prompt. Special tokens are not part of the text; they end a
            response by their ids if they do at all.
        strings: The strings, none of them empty.

    Raises:
        InputError: A string is empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if not all(strings):
            raise InputError("stop: every string must have at least one character; remove the empty one")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer

    def length(self, ids: Sequence[int]) -> int | None:
        """Return the number of tokens up to the one that completes a string, or None if no string appears."""
        if not self._found(ids):
            return None
        low, high = 1, len(ids)  # a string appears in the first `high` tokens, and more tokens only add text
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._found(ids[:middle]) else (middle + 1, high)
        return high

    def _found(self, ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)
