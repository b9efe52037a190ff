"""Instruction data: rows to examples, and examples to prompts and answers in token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillm.data.config import Source
from minillm.data.rows import Remarks, read_rows
from minillm.errors import DataError

# Who speaks, under the names of ShareGPT and its kin.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(
        (
            "assistant",
            "gpt",
            "chatgpt",
            "gpt-3.5",
            "gpt-4",
            "gpt4",
            "bing",
            "bard",
            "claude",
            "model",
            "bot",
            "ai",
            "llm",
            "chatbot",
        ),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
}
_MESSAGE_KEYS = frozenset(
    ("role", "from", "content", "value", "name", "id", "weight", "timestamp", "metadata", "markdown", "text")
)


@dataclass(frozen=True)
class Example:
    """One instruction. `row` counts from 0 in the file's order and identifies the prompt in seeds and results."""

    row: int
    instruction: str
    input: str = ""
    references: tuple[str, ...] = ()
    chat: tuple[tuple[str, str], ...] = ()
    """(role, content) of what was said before, where that is more than `instruction`, which is its last message."""
    place: str = ""
    """Where it was read (`file:line`), for messages."""

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

    A chat gives an example for each answer of the assistant, or one without a reference where it ends with the user. `system`
    and `history` ([question, answer] pairs) of a row become a chat. Columns that are passed over are reported.

    Raises:
        DataError: the source is missing or empty, or a row is not such a row.
    """
    source = source if isinstance(source, Source) else Source(file=Path(source))
    examples: list[Example] = []
    remarks = Remarks()
    for fields, place in read_rows(source, remarks=remarks):
        for example in _examples_of(fields, place, remarks):
            examples.append(replace(example, row=len(examples), place=place))
        if limit is not None and len(examples) >= limit:
            break
    remarks.report()
    if not examples:
        raise DataError(f"{source.name}: empty; one JSON object a line is needed")
    return examples[:limit]


def read_texts(source: Source, seed: int | None = 0) -> Iterator[dict[str, str]]:
    """Rows of `text`, one after another: a data set is streamed, in an order that a buffer of some thousand rows mixes.

    Args:
        seed: of that order; None leaves rows as they come, the first at once.

    Raises:
        DataError: a row without, or a data set that cannot be opened.
    """
    for fields, place in read_rows(source, stream=True, seed=seed):
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise DataError(f"{place}: text is missing; a string is needed")
        yield {"text": fields["text"]}


def _examples_of(fields: Any, place: str, remarks: Remarks) -> Iterator[Example]:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a JSON object is needed, not {type(fields).__name__}")
    messages = fields.get("messages")
    if isinstance(fields.get("instruction"), list):  # TRL's conversational prompts, with a completion or without
        completion = fields.get("output", [])
        messages = fields["instruction"] + (completion if isinstance(completion, list) else [])
        if isinstance(completion, str):
            messages.append({"role": "assistant", "content": completion})
    elif messages is not None and (
        meant := [name for name in ("instruction", "input", "output", "history") if fields.get(name)]
    ):
        remarks.add(f"a row of messages has {', '.join(meant)} too, which is not read", place)
    if messages is None:
        yield _example_of(fields, place)
        return
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages is {type(messages).__name__}; a list is needed")
    said = [_message(message, f"{place}: messages[{number}]", remarks) for number, message in enumerate(messages)]
    if (system := _system(fields, place)) and not any(role == "system" for role, _ in said):
        said.insert(0, ("system", system))
    if all(role != "user" for role, _ in said):
        raise DataError(f"{place}: messages holds no message of the user")
    for number, (role, content) in enumerate(said):
        if role == "assistant":
            if not number or said[number - 1][0] != "user":
                raise DataError(
                    f"{place}: messages[{number}]: an answer of the assistant follows a message of the user"
                )
            if content.strip():
                yield _answered(said[:number], content)
            else:
                remarks.add("an answer of the assistant is blank, and not trained on", place)
    if said[-1][0] == "user":
        yield _answered(said, "")


def _message(message: Any, where: str, remarks: Remarks) -> tuple[str, str]:
    """(role, content) of a message under whatever names it has.

    Raises:
        DataError: it has none, or nobody knows who speaks.
    """
    if isinstance(message, dict):
        role, content = (
            message.get("role", message.get("from")),
            message.get("content", message.get("value", message.get("text"))),
        )
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if isinstance(role, str) and isinstance(content, str):
            if role.lower() not in _ROLES:
                known = ", ".join(sorted(_ROLES))
                raise DataError(
                    f"{where}: unknown role {role!r}; known are user, assistant and system, by one of the names {known}"
                )
            for name in message.keys() - _MESSAGE_KEYS:
                if message[name]:
                    remarks.add(f"{name} of a message is not read", where.split(": messages")[0])
            return _ROLES[role.lower()], content
    raise DataError(f"{where} needs a role and a content, both strings")


def _answered(said: Sequence[tuple[str, str]], answer: str) -> Example:
    references = (answer,) if answer.strip() else ()
    return Example(0, said[-1][1], "", references, tuple(said) if len(said) > 1 else ())


def _system(fields: dict[str, Any], place: str) -> str:
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise DataError(f"{place}: system is {type(system).__name__}; a string is needed")
    return system


def _example_of(fields: dict[str, Any], place: str) -> Example:
    instruction, output = fields.get("instruction"), fields.get("output", "")
    parts = {"instruction": instruction, "input": fields.get("input", "")}
    parts |= (
        {"output": output} if not isinstance(output, list) else {f"output[{i}]": text for i, text in enumerate(output)}
    )
    for name, value in parts.items():
        if not isinstance(value, str):
            given = "is missing" if value is None else f"is {type(value).__name__}"
            raise DataError(f"{place}: {name} {given}; a string is needed")
    if not str(instruction).strip():
        raise DataError(f"{place}: instruction is blank")
    references = output if isinstance(output, list) else [output]
    example = Example(0, str(instruction), parts["input"], tuple(text for text in references if text.strip()))
    before = [("system", system)] if (system := _system(fields, place)) else []
    for number, pair in enumerate(fields.get("history", [])):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{place}: history[{number}] needs a question and an answer, both strings")
        before += [("user", pair[0]), ("assistant", pair[1])]
    return replace(example, chat=(*before, ("user", example.text))) if before else example
