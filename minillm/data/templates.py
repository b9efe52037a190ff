"""Renders examples as token ids of prompts and answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from minillm.data.encoding import Messages, encoder_of
from minillm.data.examples import Example, Prompt
from minillm.data.time_limit import time_limited
from minillm.errors import DataError, one_line

_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_LARGEST = 1_000_000  # characters, or a number, that a multiplication in a template may make
_WIDE = re.compile(r"\d{4,}|\*")  # in a format such as %9999d
_ALPACA_INPUT = ", paired with an input that provides further context"


def render(example: Example, template: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Render the prompt of an example, up to where the response begins.

    Only the template's own special tokens become control tokens; in the text of the example they are text. The
    tokenizer's prefix (BOS) begins every prompt except those of a chat template, which brings its own.

    Args:
        example: The example.
        template: Value of `data.template`.
        tokenizer: Tokenizer of the models.
        system: System message, used if the example has none.

    Returns:
        Token ids of the prompt.

    Raises:
        DataError: Naming the row. The template takes one message and the example is a chat of several, or the template
            refuses the example.
    """
    encoder = encoder_of(tokenizer)
    if template == "chat":
        return encoder.chat(_messages(example, system), example.place)
    if template in ("alpaca", "plain"):
        return encoder.document(prompt_text(example, template, system, tokenizer))
    ids = encoder.rendered(_render_jinja(example, template, system, tokenizer))
    has_prefix = ids[: len(encoder.prefix)] == encoder.prefix  # a template may write the BOS itself
    return ids if has_prefix else [*encoder.prefix, *ids]


def prompt_text(example: Example, template: str, system: str | None = None, tokenizer: Any = None) -> str:
    """Render the prompt of an example as text, for every template except `chat`.

    Args:
        example: The example.
        template: Value of `data.template`.
        system: System message, used if the example has none.
        tokenizer: Tokenizer whose `bos_token` and `eos_token` a Jinja template may name.

    Raises:
        DataError: As for `render`.
    """
    if template not in ("alpaca", "plain"):
        return _render_jinja(example, template, system, tokenizer, marked=False)
    where = example.place or f"row {example.row}"
    if any(role != "user" for role, _ in example.chat):
        raise DataError(
            f"{where}: row {example.row} is a chat of several messages, not one for template {template}; use chat or a "
            "Jinja text"
        )
    text = example.text
    if template == "plain":
        return text
    if "### Response:" in text:
        raise DataError(
            f"{where}: row {example.row} is rendered by the alpaca template already (it has '### Response:'): give its "
            "columns instruction, input and output as they were before, or set template: plain"
        )
    head = _ALPACA.format(_ALPACA_INPUT if example.input else "")
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{head}### Instruction:\n{example.instruction}\n\n{middle}### Response:\n"


def _render_jinja(example: Example, template: str, system: str | None, tokenizer: Any, *, marked: bool = True) -> str:
    """Render an example with the user's own template; with `marked`, special tokens in its text stay text."""
    mark = encoder_of(tokenizer).mark if marked else str
    where = example.place or f"row {example.row}"
    compiled = _jinja(template)
    given = {
        "instruction": mark(example.instruction),
        "input": mark(example.input),
        "system": None if system is None else mark(system),
        "messages": [{**message, "content": mark(message["content"])} for message in _messages(example, system)],
        "bos_token": getattr(tokenizer, "bos_token", None) or "",
        "eos_token": getattr(tokenizer, "eos_token", None) or "",
    }
    try:
        with time_limited(f"{where}: data.template"):
            return compiled.render(**given)
    except DataError:
        raise
    except Exception as error:  # whatever the template raises
        raise DataError(f"{where}: data.template does not take it: {one_line(error)}") from None


def _messages(example: Example, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": role, "content": content} for role, content in example.chat or (("user", example.text),)]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def render_answer(prompt: Prompt, template: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Render the first reference of an example as a response, with the token that ends it.

    A chat template says where the assistant's turn ends: if it marks what the assistant says (`generation`), the
    response is exactly that, and otherwise it ends with the first special token after the answer. If no template says
    where an answer ends, the tokenizer's EOS ends it.

    Args:
        prompt: The rendered prompt and its example.
        template: Value of `data.template`.
        tokenizer: Tokenizer of the models.
        system: System message, used if the example has none.

    Returns:
        Token ids that follow those of the prompt.

    Raises:
        DataError: As for `render`.
    """
    encoder, example = encoder_of(tokenizer), prompt.example
    if template == "chat":
        ids = encoder.answer(_messages(example, system), example.output, example.place)
        if ids is not None:
            return ids
    return [*encoder.text(example.output, first=not prompt.ids), tokenizer.eos_token_id]


@cache
def _jinja(template: str) -> Any:
    """Compile a Jinja template, given as text or as the path of a `.jinja` file."""
    try:
        source = Path(template).read_text(encoding="utf-8-sig") if template.endswith(".jinja") else template
        with time_limited("data.template: it"):
            return _sandbox().from_string(source)
    except DataError:
        raise
    except Exception as error:  # of the file, and whatever Jinja says of a text that is no template
        raise DataError(f"data.template: {one_line(error)}") from error


@cache
def _sandbox() -> Any:
    """An environment whose templates reach no attribute of Python's, and multiply to no more than memory holds."""
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            wide = operator == "%" and isinstance(left, str) and _WIDE.search(left)
            if operator == "**" or wide:
                raise SecurityError(f"{operator} is not allowed in a template")
            sizes = [value if isinstance(value, int) else len(value) for value in (left, right) if _counts(value)]
            if operator == "*" and len(sizes) == 2 and abs(sizes[0] * sizes[1]) > _LARGEST:
                raise SecurityError(f"a template multiplies to at most {_LARGEST:,}")
            return super().call_binop(context, operator, left, right)

    return Sandbox(keep_trailing_newline=True)


def _counts(value: Any) -> bool:
    return isinstance(value, int | str | list | tuple)


def chat_ids(messages: Messages, tokenizer: Any) -> list[int]:
    """Return the token ids of a conversation, up to where the assistant's answer begins.

    Args:
        messages: The conversation, with `role` and `content` of each message.
        tokenizer: Tokenizer whose chat template renders it.

    Raises:
        DataError: The tokenizer has no chat template, or its template refuses the conversation.
    """
    return encoder_of(tokenizer).chat(messages)


def render_all(
    examples: Iterable[Example], template: str, tokenizer: Any, max_prompt_tokens: int, system: str | None = None
) -> tuple[list[Prompt], list[Example]]:
    """Render the prompts of all examples.

    Args:
        examples: The examples.
        template: Value of `data.template`.
        tokenizer: Tokenizer of the models.
        max_prompt_tokens: Largest number of tokens of a prompt.
        system: System message, used if an example has none.

    Returns:
        The prompts within the limit, and the examples whose prompts are longer.

    Raises:
        DataError: As for `render`.
    """
    prompts, too_long = [], []
    for example in examples:
        ids = render(example, template, tokenizer, system)
        if len(ids) <= max_prompt_tokens:
            prompts.append(Prompt(example, ids))
        else:
            too_long.append(example)
    return prompts, too_long
