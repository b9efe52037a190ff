"""Instruction data: JSONL rows to prompts, and prompts to token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Template = Literal["chat", "alpaca", "plain"]

_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
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


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """Read `instruction`/`input`/`output` or `prompt`/`response` rows; an output may be a list of references.

    Raises:
        DataError: the file is missing or empty, or a line is not such a row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    examples = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: byte {error.start + 1} of the line") from None
            if line.strip():
                examples.append(_example(line, len(examples), f"{path}:{number}"))
            if len(examples) == limit:
                break
    if not examples:
        raise DataError(f"{path}: empty; one JSON object a line is needed")
    return examples


def _example(line: str, row: int, place: str) -> Example:
    try:
        fields: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    return example_of(fields, row, place)


def example_of(fields: Any, row: int, place: str) -> Example:
    """A row of a file or of a data set; `place` names it in errors."""
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a JSON object is needed, not {type(fields).__name__}")
    instruction = fields.get("instruction", fields.get("prompt"))
    output = fields.get("output", fields.get("response", ""))
    parts = {"instruction": instruction, "input": fields.get("input", "")}
    parts |= {"output": output} if not isinstance(output, list) else {f"output[{i}]": text for i, text in enumerate(output)}
    for name, value in parts.items():
        if not isinstance(value, str):
            given = "is missing" if value is None else f"is {type(value).__name__}"
            raise DataError(f"{place}: {name} {given}; a string is needed")
    if not str(instruction).strip():
        raise DataError(f"{place}: instruction is blank")
    references = output if isinstance(output, list) else [output]
    return Example(row, str(instruction), parts["input"], tuple(text for text in references if text.strip()))


def render(example: Example, template: Template, tokenizer: Any, system: str | None = None) -> list[int]:
    """Token ids of the prompt, up to where the response begins. `system` is the chat template's system message."""
    if template == "chat":
        first = [] if system is None else [{"role": "system", "content": system}]
        return chat_ids([*first, {"role": "user", "content": example.text}], tokenizer)
    text = example.text
    if template == "alpaca":
        head = _ALPACA.format(_ALPACA_INPUT if example.input else "")
        middle = f"### Input:\n{example.input}\n\n" if example.input else ""
        text = f"{head}### Instruction:\n{example.instruction}\n\n{middle}### Response:\n"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_ids(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set data.template to alpaca or plain")
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def render_all(
    examples: Iterable[Example], template: Template, tokenizer: Any, max_prompt_tokens: int, system: str | None = None
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
