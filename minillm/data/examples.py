"""Instruction data: rows of files and data sets to prompts, and prompts to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from minillm.recipe import Source

_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
# Names that a column goes by, the first that is there.
_KNOWN = {
    "instruction": ("instruction", "prompt"), "input": ("input", "context"), "output": ("output", "response", "completion"),
    "messages": ("messages", "conversations"), "text": ("text",),
}  # fmt: skip
_MIXED = 10_000  # rows of a stream that are held to mix their order
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's chats
_ALPACA_INPUT = ", paired with an input that provides further context"


class DataError(ValueError):
    """A data file that cannot be used; the text names the file and the line."""


@dataclass(frozen=True)
class Example:
    """One instruction. `row` counts from 0 in the file's order and identifies the prompt in seeds and results."""

    row: int
    instruction: str
    input: str = ""
    references: tuple[str, ...] = ()
    chat: tuple[tuple[str, str], ...] = ()
    """(role, content) of what was said before, where that is more than `instruction`, which is its last message."""

    @property
    def output(self) -> str:
        """The first reference; empty where there is none."""
        return self.references[0] if self.references else ""

    @property
    def text(self) -> str:
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Prompt:
    """An example rendered for one tokenizer."""

    example: Example
    ids: list[int]


def read_examples(source: Source | str | Path, limit: int | None = None) -> list[Example]:
    """Read rows of `instruction`, `input` and `output` (which may be a list of references) or of `messages`.

    A chat gives an example for each answer of the assistant, or one without a reference where it ends with the user.

    Raises:
        DataError: the source is missing or empty, or a row is not such a row.
    """
    source = source if isinstance(source, Source) else Source(file=Path(source))
    examples: list[Example] = []
    for fields, place in _rows(source, stream=False):
        for example in _examples_of(fields, place):
            examples.append(replace(example, row=len(examples)))
            if len(examples) == limit:
                return examples
    if not examples:
        raise DataError(f"{source.name}: empty; one JSON object a line is needed")
    return examples


def read_texts(source: Source, seed: int | None = 0) -> Iterator[dict[str, str]]:
    """Rows of `text`, one after another: a data set is streamed, in an order that a buffer of some thousand rows mixes.

    Args:
        seed: of that order; None leaves rows as they come, the first at once.
    Raises:
        DataError: a row without, or a data set that cannot be opened.
    """
    for fields, place in _rows(source, stream=True, seed=seed):
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise DataError(f"{place}: text is missing; a string is needed")
        yield {"text": fields["text"]}


def _rows(source: Source, stream: bool, seed: int | None = 0) -> Iterator[tuple[Any, str]]:
    """A source's rows under the names used here, each with the place to name in an error."""
    for fields, place in _lines(source.file) if source.file is not None else _records(source, stream, seed):
        if isinstance(fields, dict):
            names = {name: next((old for old in known if fields.get(old) is not None), name) for name, known in _KNOWN.items()}
            if unknown := set(source.columns.values()) - fields.keys():
                raise DataError(f"{place}: no column {', '.join(sorted(unknown))}; there are {', '.join(map(str, fields))}")
            names |= source.columns
            fields = {name: fields[old] for name, old in names.items() if fields.get(old) is not None}
        yield fields, place


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8")
                if line.strip():
                    yield json.loads(line), place
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8: byte {error.start + 1} of the line") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None


def _records(source: Source, stream: bool, seed: int | None) -> Iterator[tuple[Any, str]]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(str(source.dataset), source.config, split=source.split, revision=source.revision, streaming=stream)
    except (OSError, ValueError) as error:  # no such data set, configuration, split or revision
        raise DataError(f"{source.name}: {error}") from error
    except RuntimeError as error:  # a data set that is a program, which `datasets` no longer runs
        raise DataError(f"{source.name}: {error}; the hub's own copy of its rows: revision: refs/convert/parquet") from error
    if stream and seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=_MIXED)
    for number, fields in enumerate(rows):
        yield dict(fields), f"{source.name}[{number}]"


def _examples_of(fields: Any, place: str) -> Iterator[Example]:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a JSON object is needed, not {type(fields).__name__}")
    messages = fields.get("messages")
    if isinstance(fields.get("instruction"), list):  # TRL's conversational prompts, with a completion or without
        completion = fields.get("output", [])
        messages = fields["instruction"] + (completion if isinstance(completion, list) else [])
    if messages is None:
        yield _example_of(fields, place)
        return
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        try:
            role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        except AttributeError:
            role = content = None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: messages[{number}] needs a role and a content, both strings")
        role = _ROLES.get(role, role)
        if role == "assistant":
            if not said or said[-1][0] != "user":
                raise DataError(f"{place}: messages[{number}]: an answer of the assistant follows a message of the user")
            yield _answered(said, content)
        said.append((role, content))
    if not said or all(role != "user" for role, _ in said):
        raise DataError(f"{place}: messages holds no message of the user")
    if said[-1][0] == "user":
        yield _answered(said, "")


def _answered(said: Sequence[tuple[str, str]], answer: str) -> Example:
    references = (answer,) if answer.strip() else ()
    return Example(0, said[-1][1], "", references, tuple(said) if len(said) > 1 else ())


def _example_of(fields: dict[str, Any], place: str) -> Example:
    instruction, output = fields.get("instruction"), fields.get("output", "")
    parts = {"instruction": instruction, "input": fields.get("input", "")}
    parts |= {"output": output} if not isinstance(output, list) else {f"output[{i}]": text for i, text in enumerate(output)}
    for name, value in parts.items():
        if not isinstance(value, str):
            given = "is missing" if value is None else f"is {type(value).__name__}"
            raise DataError(f"{place}: {name} {given}; a string is needed")
    if not str(instruction).strip():
        raise DataError(f"{place}: instruction is blank")
    references = output if isinstance(output, list) else [output]
    return Example(0, str(instruction), parts["input"], tuple(text for text in references if text.strip()))


def render(example: Example, template: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Token ids of the prompt, up to where the response begins. `system`: the system message, where the example has none.

    Raises:
        DataError: a chat of several turns for a template that takes one.
    """
    if template == "chat":
        return chat_ids(_messages(example, system), tokenizer)
    return list(tokenizer(prompt_text(example, template, system, tokenizer), add_special_tokens=False)["input_ids"])


def prompt_text(example: Example, template: str, system: str | None = None, tokenizer: Any = None) -> str:
    """The prompt as text, for every template but `chat`; see `render`. `tokenizer`: whose marks a Jinja text may name."""
    if template not in ("alpaca", "plain"):
        return _jinja(template).render(
            instruction=example.instruction, input=example.input, system=system, messages=_messages(example, system),
            bos_token=getattr(tokenizer, "bos_token", None) or "", eos_token=getattr(tokenizer, "eos_token", None) or "",
        )  # fmt: skip
    if any(role != "user" for role, _ in example.chat):
        raise DataError(f"row {example.row} is a chat of several messages, not one for template {template}; use chat or a Jinja text")
    text = example.text
    if template == "plain":
        return text
    if "### Response:" in text:
        raise DataError(
            f"row {example.row} is rendered by the alpaca template already (it has '### Response:'): give its columns instruction, input "
            "and output as they were before, or set template: plain"
        )
    head = _ALPACA.format(_ALPACA_INPUT if example.input else "")
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{head}### Instruction:\n{example.instruction}\n\n{middle}### Response:\n"


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
    if template == "chat":
        answered = [*_messages(prompt.example, system), {"role": "assistant", "content": prompt.example.output}]
        marked = "generation %}" in str(tokenizer.chat_template).replace("add_generation", "")
        whole = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=marked)
        ids, start = list(whole["input_ids"]), len(prompt.ids)
        if ids[:start] == prompt.ids:
            ids, special = ids[start:], set(tokenizer.all_special_ids)
            said = whole["assistant_masks"][start:] if marked else [True] * len(ids)
            ids = [token for token, by_assistant in zip(ids, said, strict=True) if by_assistant]
            ends = [place for place, token in enumerate(ids) if token in special]
            if marked or ends:
                return ids if marked else ids[: ends[0] + 1]
    return [*tokenizer(prompt.example.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@cache
def _jinja(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        source = Path(template).read_text(encoding="utf-8") if template.endswith(".jinja") else template
        return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(source)
    except (OSError, TemplateError) as error:
        raise DataError(f"data.template: {error}") from error


def chat_ids(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set data.template to alpaca or plain")
    # Templates that can have a model think first (Qwen3's) are told not to: it would think longer than an answer may be.
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False, enable_thinking=False))


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


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
