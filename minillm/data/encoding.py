"""Encodes text as token ids, so that only special tokens written by a template become control tokens.

Users and data may write the text of a special token ("a turn ends with <|im_end|>"). A tokenizer would encode that text
as the token itself, which would end an answer, or begin another speaker's turn. Such text is marked before a template
renders it, and is then encoded as the ordinary text that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from minillm.data.time_limit import time_limited
from minillm.errors import DataError, one_line

# Private-use characters, which no template looks at. They enclose the number of a special token whose text was meant as
# text.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ANSWER = f"{_OPEN}answer{_CLOSE}"  # placeholder for an answer while a conversation is rendered
Messages = Sequence[Mapping[str, str]]


class TextEncoder:
    """Encodes text with one tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.

    Attributes:
        prefix: Ids that the tokenizer itself puts before a text, such as BOS.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {
            token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        # The longest come first, because the longest text that matches is the token.
        self._added = {text: added[text] for text in sorted(added, key=len, reverse=True)}
        self._numbers = {text: number for number, text in enumerate(self._added)}
        self._texts = list(self._added)
        self._special = re.compile("|".join(map(re.escape, self._added)) or r"(?!)")
        plain, whole = self._ids("a"), list(tokenizer("a")["input_ids"])
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.prefix: list[int] = whole[:start]
        # Some tokenizers put a space before every text that they are given, as if it began a sequence.
        self._newline = self._ids("\n")
        self._adds_space = self._ids("\na")[len(self._newline) :] != plain

    def has_special(self, text: str) -> bool:
        """Return whether a text contains the text of a special token."""
        return self._special.search(text) is not None

    def document(self, text: str) -> list[int]:
        """Return the ids of a text that is a sequence by itself, after the tokenizer's prefix (BOS)."""
        return [*self.prefix, *self.text(text)]

    def text(self, text: str, *, first: bool = True) -> list[int]:
        """Return the ids of ordinary text, without the tokenizer's prefix.

        Args:
            text: The text. The text of a special token in it is encoded as text.
            first: Whether the text begins a sequence. If it follows other text, a tokenizer adds no space before it.
        """
        if not first and self._adds_space and text:
            ids = self._ids("\n" + text)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        as_text = {"split_special_tokens": True} if self._special.search(text) else {}
        return list(self._tokenizer(text, add_special_tokens=False, **as_text)["input_ids"])

    def mark(self, text: str) -> str:
        """Mark the texts of special tokens in a text that is put into a template; `rendered` removes the marks."""
        return self._special.sub(lambda found: f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}", text)

    def rendered(self, text: str, *, first: bool = True) -> list[int]:
        """Return the ids of a rendered template. Its special tokens are control tokens; marked text is encoded as text.

        Args:
            text: The rendered template.
            first: Whether it begins a sequence.
        """
        if _OPEN not in text and first:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        ids: list[int] = []
        start = 0
        for found in self._special.finditer(text):
            number, token = self._added[found[0]]
            between = text[start : found.start()]
            ids += self.text(self._unmarked(between.rstrip() if token.lstrip else between), first=first and not ids)
            ids.append(number)
            start = found.end()
            if token.rstrip:
                start += len(text[start:]) - len(text[start:].lstrip())
        return ids + self.text(self._unmarked(text[start:]), first=first and not ids)

    def _unmarked(self, text: str) -> str:
        return _MARKED.sub(lambda found: self._texts[int(found[1])], text)

    def chat(self, messages: Messages, place: str = "") -> list[int]:
        """Return the ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: The conversation, with `role` and `content` of each message.
            place: File and line, or row, of the conversation, for error messages.

        Raises:
            DataError: The tokenizer has no chat template, or its template refuses the conversation.
        """
        return self.rendered(self._prompt(messages, place))

    def answer(self, messages: Messages, answer: str, place: str = "") -> list[int] | None:
        """Return the ids of an answer to a conversation, as a model would sample them after `chat`, with the end token.

        If the template marks what the assistant says (`generation`), the answer is exactly that. Otherwise it ends with
        the first special token after it.

        Args:
            messages: The conversation before the answer.
            answer: Text of the answer.
            place: File and line, or row, of the conversation, for error messages.

        Returns:
            The ids. None if the template neither marks the answer nor puts a special token after it.

        Raises:
            DataError: As for `chat`.
        """
        prompt = self._prompt(messages, place)
        whole, spans = self._conversation([*messages, {"role": "assistant", "content": _ANSWER}], place)
        at = whole.find(_ANSWER)
        if at < 0:
            return None
        lead = whole[len(prompt) : at] if whole.startswith(prompt) and at >= len(prompt) else ""
        tail = whole[at + len(_ANSWER) :]
        end = next((end for start, end in spans if start <= at < end), None)
        if end is not None:
            tail = whole[at + len(_ANSWER) : end]
        elif (special := self._special.search(tail)) is not None:
            tail = tail[: special.end()]
        else:
            return None
        answer = self._stripped_as_template(messages, answer, whole, place)
        lead, answer = _without_second_thought(prompt, lead, answer)
        return self.rendered(lead + self.mark(answer) + tail, first=False)

    def end_of_answer(self) -> int | None:
        """Return the special token with which the chat template ends the assistant's turn, or None if it has none."""
        if not self._tokenizer.chat_template:
            return None
        try:
            ids = self.answer([{"role": "user", "content": "a"}], "a") or []
        except DataError:
            return None
        special = {number for number, _ in self._added.values()}
        return next((token for token in reversed(ids) if token in special), None)

    def _stripped_as_template(self, messages: Messages, answer: str, whole: str, place: str) -> str:
        """Strip an answer as the template strips it: what the template does not keep is not trained on."""
        if answer == answer.strip():
            return answer
        spaced, _ = self._conversation([*messages, {"role": "assistant", "content": f" {_ANSWER} "}], place)
        before, _, after = whole.partition(_ANSWER)
        before_spaced, _, after_spaced = spaced.partition(_ANSWER)
        answer = answer.lstrip() if before == before_spaced else answer
        return answer.rstrip() if after == after_spaced else answer

    def _prompt(self, messages: Messages, place: str) -> str:
        # Thinking is turned off in templates that offer it (Qwen3): a thought can be longer than the response limit.
        return self._apply(messages, place, add_generation_prompt=True, enable_thinking=False)[0]

    def _conversation(self, messages: Messages, place: str) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation that ends with an answer, and return the spans that the template marks as generated."""
        marks_answers = "generation %}" in str(self._tokenizer.chat_template).replace("add_generation", "")
        return self._apply(messages, place, return_assistant_tokens_mask=marks_answers, enable_thinking=False)

    def _apply(self, messages: Messages, place: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; set data.template to alpaca or plain")
        marked = [{**message, "content": self._mark_unless_answer(message["content"])} for message in messages]
        try:
            with time_limited(f"{place or 'a conversation'}: the chat template"):
                found: Any = render_jinja_template(
                    [marked], chat_template=tokenizer.get_chat_template(), **options, **tokenizer.special_tokens_map
                )
        except DataError:
            raise
        except Exception as error:  # whatever the template raises
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{place or 'a conversation'}: the chat template does not take it (roles: {roles}): {one_line(error)}; "
                "correct the conversation, or set data.template to a template that takes it"
            ) from None
        [rendered], spans = found
        return rendered, [(start, end) for start, end in spans[0]] if spans else []

    def _mark_unless_answer(self, text: str) -> str:
        return text if _ANSWER in text else self.mark(text)


def _without_second_thought(prompt: str, lead: str, answer: str) -> tuple[str, str]:
    """Keep one thought: if the prompt has already closed (or opened) it, the answer does not repeat it.

    Args:
        prompt: The rendered prompt.
        lead: Text that the template puts between the prompt and the answer.
        answer: Text of the answer.

    Returns:
        The lead and the answer without a second thought.
    """
    end = prompt.rstrip()
    if "</think>" in answer:
        if end.endswith("</think>"):
            return lead, answer.rpartition("</think>")[2].lstrip()
        if end.endswith("<think>"):
            return "", answer.lstrip().removeprefix("<think>")
        return (lead.partition("<think>")[0] if "</think>" in lead else lead), answer
    if end.endswith("<think>") and "</think>" not in lead:
        return lead, f"\n</think>\n\n{answer}"
    return lead, answer


_ENCODERS: dict[int, tuple[Any, TextEncoder]] = {}


def encoder_of(tokenizer: Any) -> TextEncoder:
    """Return the encoder of a tokenizer. It is created once and reused until another tokenizer is asked for."""
    kept = _ENCODERS.get(id(tokenizer))
    if kept is None or kept[0] is not tokenizer:
        _ENCODERS.clear()  # a run has one tokenizer, and the evaluation of a suite uses one after another
        kept = _ENCODERS[id(tokenizer)] = (tokenizer, TextEncoder(tokenizer))
    return kept[1]
