"""Examples to prompts and answers in token ids."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from minillm.data.encoding import Messages, encoder_of
from minillm.data.examples import Example, Prompt
from minillm.errors import DataError

_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)


_ALPACA_INPUT = ", paired with an input that provides further context"


def render(example: Example, template: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Token ids of the prompt, up to where the response begins. `system`: the system message, where the example has none.

    Only the template's own special tokens are control tokens; in the text of the example they are text. What the tokenizer
    puts before a text by itself (BOS) begins a prompt that is not of a chat template, which brings its own.

    Raises:
        DataError: naming the row; a chat of several turns for a template that takes one, or one that its template refuses.
    """
    encoder = encoder_of(tokenizer)
    if template == "chat":
        return encoder.chat(_messages(example, system), example.place)
    if template in ("alpaca", "plain"):
        return encoder.document(prompt_text(example, template, system, tokenizer))
    ids = encoder.rendered(_of_own_template(example, template, system, tokenizer))
    begun = ids[: len(encoder.prefix)] == encoder.prefix  # a template may write the BOS itself
    return ids if begun else [*encoder.prefix, *ids]


def prompt_text(example: Example, template: str, system: str | None = None, tokenizer: Any = None) -> str:
    """The prompt as text, for every template but `chat`; see `render`. `tokenizer`: whose marks a Jinja text may name."""
    if template not in ("alpaca", "plain"):
        return _of_own_template(example, template, system, tokenizer, marked=False)
    where = example.place or f"row {example.row}"
    if any(role != "user" for role, _ in example.chat):
        raise DataError(
            f"{where}: row {example.row} is a chat of several messages, not one for template {template}; use chat or a Jinja text"
        )
    text = example.text
    if template == "plain":
        return text
    if "### Response:" in text:
        raise DataError(
            f"{where}: row {example.row} is rendered by the alpaca template already (it has '### Response:'): give its columns "
            "instruction, input and output as they were before, or set template: plain"
        )
    head = _ALPACA.format(_ALPACA_INPUT if example.input else "")
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{head}### Instruction:\n{example.instruction}\n\n{middle}### Response:\n"


def _of_own_template(
    example: Example, template: str, system: str | None, tokenizer: Any, *, marked: bool = True
) -> str:
    """What the user's own template makes of an example, in which text that reads like special tokens is marked as text."""
    from jinja2 import TemplateError

    mark = encoder_of(tokenizer).mark if marked else str
    try:
        return _jinja(template).render(
            instruction=mark(example.instruction), input=mark(example.input), system=None if system is None else mark(system),
            messages=[{**message, "content": mark(message["content"])} for message in _messages(example, system)],
            bos_token=getattr(tokenizer, "bos_token", None) or "", eos_token=getattr(tokenizer, "eos_token", None) or "",
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{example.place or f'row {example.row}'}: data.template does not take it: {error}") from None


def _messages(example: Example, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": role, "content": content} for role, content in example.chat or (("user", example.text),)]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def render_answer(prompt: Prompt, template: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Token ids of the example's first reference, with the token that ends an answer.

    Of a chat template that is what it makes of the assistant's turn: where it marks what the assistant says (`generation`), exactly
    that, else everything up to the first special token. The tokenizer's EOS where no template says.
    """
    encoder, example = encoder_of(tokenizer), prompt.example
    if template == "chat":
        ids = encoder.answer(_messages(example, system), example.output, example.place)
        if ids is not None:
            return ids
    return [*encoder.text(example.output, first=not prompt.ids), tokenizer.eos_token_id]


@cache
def _jinja(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        source = Path(template).read_text(encoding="utf-8-sig") if template.endswith(".jinja") else template
        return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(source)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise DataError(f"data.template: {error}") from error


def chat_ids(messages: Messages, tokenizer: Any) -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins."""
    return encoder_of(tokenizer).chat(messages)


def render_all(
    examples: Iterable[Example], template: str, tokenizer: Any, max_prompt_tokens: int, system: str | None = None
) -> tuple[list[Prompt], list[Example]]:
    """Prompts that fit, and the examples left out because they do not."""
    prompts, too_long = [], []
    for example in examples:
        ids = render(example, template, tokenizer, system)
        if len(ids) <= max_prompt_tokens:
            prompts.append(Prompt(example, ids))
        else:
            too_long.append(example)
    return prompts, too_long
