"""Reads instruction data: rows become examples, which `minillm.data.templates` renders as token ids."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from minillm.data.config import Source
from minillm.data.lazy import IN_MEMORY, LazySequence
from minillm.data.rows import Remarks, RowReader, read_rows
from minillm.errors import DataError

# Names for the speakers of a chat, those of ShareGPT and similar data included.
_ROLE_NAMES = {
    "user": ("user", "human", "prompter", "instruction", "question"),
    "assistant": (
        *("assistant", "model", "bot", "ai", "llm", "chatbot"),
        *("gpt", "chatgpt", "gpt-3.5", "gpt-4", "gpt4", "bing", "bard", "claude"),
    ),
    "system": ("system", "developer"),
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_MESSAGE_KEYS = frozenset(
    ("role", "from", "content", "value", "name", "id", "weight", "timestamp", "metadata", "markdown", "text")
)


@dataclass(frozen=True)
class Example:
    """One instruction, with the answers that are known for it.

    Attributes:
        row: Number of the example, counted from 0 in the order of the file. It identifies the prompt in seeds and
            results.
        instruction: The instruction; for a chat, its last message.
        input: Text that the instruction is about; empty if there is none.
        references: Known answers.
        chat: Role and content of every message, the last one included, if there is more than the instruction.
        place: File and line, or data set and number, for error messages.
        teacher: What the row's column `teacher` holds, which is read where there are several teachers; None if the row
            has no such column.
    """

    row: int
    instruction: str
    input: str = ""
    references: tuple[str, ...] = ()
    chat: tuple[tuple[str, str], ...] = ()
    place: str = ""
    teacher: str | None = None

    @property
    def output(self) -> str:
        """The first reference; empty if there is none."""
        return self.references[0] if self.references else ""

    @property
    def text(self) -> str:
        """The instruction, followed by the input if there is one."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Prompt:
    """An example with its prompt as token ids of one tokenizer."""

    example: Example
    ids: list[int]


def read_examples(source: Source | str | Path, limit: int | None = None) -> list[Example]:
    """Read instruction data.

    A row has either `instruction`, `input` and `output` (one answer or a list of them), or `messages`. A chat gives one
    example for each answer of the assistant, and one without a reference if it ends with a message of the user.
    `system` and `history` (pairs of a question and an answer) turn a row into a chat. Columns that are ignored are
    reported.

    Args:
        source: A JSONL file or data set.
        limit: Largest number of examples.

    Returns:
        The examples, numbered in order.

    Raises:
        DataError: The source is missing or empty, or a row has another form.
    """
    source = source if isinstance(source, Source) else Source(file=Path(source))
    return [example for _, example in _scan(source, RowReader(source), limit)]


class ExampleFile(LazySequence[Example]):
    """Examples of a large source, each read again when it is asked for.

    Args:
        reader: Reads the rows, which it has scanned.
        rows: Number of the row of each example.
        answered: Numbers of the examples that have references.
    """

    def __init__(self, reader: RowReader, rows: array[int], answered: array[int]) -> None:
        super().__init__(len(rows), self._example)
        self.answered = answered
        self._reader, self._rows = reader, rows

    def _example(self, number: int) -> Example:
        row = self._rows[number]
        fields, place = self._reader[row]
        of_row = _examples_of(fields, place, Remarks())
        example = next(islice(of_row, number - bisect_left(self._rows, row), None))
        return replace(example, row=number, place=place, teacher=_teacher_of(fields))

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleFile, (self._reader, self._rows, self.answered)


def open_examples(source: Source, limit: int | None = None) -> list[Example] | ExampleFile:
    """Read instruction data as `read_examples` does, but keep only the places of more than `IN_MEMORY` examples.

    Every row is read and checked once, so that a broken one is named now.

    Args:
        source: A JSONL file or data set.
        limit: Largest number of examples.

    Raises:
        DataError: As for `read_examples`.
    """
    reader = RowReader(source)
    examples: list[Example] = []
    rows, answered = array("q"), array("q")
    for row, example in _scan(source, reader, limit):
        rows.append(row)
        if example.references:
            answered.append(example.row)
        if len(rows) <= IN_MEMORY:
            examples.append(example)
        else:
            examples.clear()
    return examples or ExampleFile(reader, rows, answered)


def _scan(source: Source, reader: RowReader, limit: int | None) -> Iterator[tuple[int, Example]]:
    """Yield the examples of a source with the number of their row; report what was ignored at the end."""
    remarks, number = Remarks(), 0
    for row, (fields, place) in enumerate(reader.scan(remarks)):
        for example in _examples_of(fields, place, remarks):
            if limit is None or number < limit:
                yield row, replace(example, row=number, place=place, teacher=_teacher_of(fields))
            number += 1
        if limit is not None and number >= limit:
            break
    remarks.report()
    if not number:
        raise DataError(f"{source.name}: empty; one JSON object a line is needed")


def read_texts(source: Source, seed: int | None = 0) -> Iterator[dict[str, str]]:
    """Read rows of `text` one after another. A data set is streamed, and shuffled within a buffer of 10,000 rows.

    Args:
        source: A JSONL file, whose rows keep their order, or a data set.
        seed: Seed of the shuffling. With None the rows keep their order, and the first arrives without filling a
            buffer.

    Yields:
        Dictionaries with the key `text` alone.

    Raises:
        DataError: A row has no `text`, or the source cannot be read.
    """
    for fields, place in read_rows(source, stream=True, seed=seed):
        yield _text_of(fields, place)


class _TextReader:
    """Reads the rows of text of a source again."""

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader

    def __call__(self, number: int) -> dict[str, str]:
        return _text_of(*self._reader[number])


class _TextStream:
    """A stream of rows of text, which begins again for every pass over it."""

    def __init__(self, source: Source, seed: int | None) -> None:
        self._source, self._seed = source, seed

    def __iter__(self) -> Iterator[dict[str, str]]:
        return read_texts(self._source, self._seed)


def open_texts(source: Source, seed: int | None) -> Iterable[dict[str, str]]:
    """Read and check the rows of `text` of a file; of more than `IN_MEMORY` of them only the places are kept.

    Args:
        source: A JSONL file, or a data set, of which the first row is checked and which is then streamed.
        seed: Seed of the shuffling of a stream.

    Raises:
        DataError: A row has no `text`, or the source cannot be read or is empty.
    """
    if source.file is None:
        if next(read_texts(source, seed=None), None) is None:
            raise DataError(f"{source.name}: empty; rows of text are needed")
        return _TextStream(source, seed)
    reader, number = RowReader(source), 0
    texts: list[dict[str, str]] = []
    for number, (fields, place) in enumerate(reader.scan(), 1):
        text = _text_of(fields, place)
        if number <= IN_MEMORY:
            texts.append(text)
        else:
            texts.clear()
    if not number:
        raise DataError(f"{source.name}: empty; rows of text are needed")
    return texts or LazySequence(number, _TextReader(reader))


def _text_of(fields: Any, place: str) -> dict[str, str]:
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise DataError(f"{place}: text is missing; a string is needed")
    return {"text": fields["text"]}


def _examples_of(fields: Any, place: str, remarks: Remarks) -> Iterator[Example]:
    """Make the examples of one row; `row` and `place` are filled in by the caller."""
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a JSON object is needed, not {type(fields).__name__}")
    messages = fields.get("messages")
    if isinstance(fields.get("instruction"), list):  # TRL's conversational prompts, with or without a completion
        completion = fields.get("output", [])
        messages = fields["instruction"] + (completion if isinstance(completion, list) else [])
        if isinstance(completion, str):
            messages.append({"role": "assistant", "content": completion})
    elif messages is not None and (
        ignored := [name for name in ("instruction", "input", "output", "history") if fields.get(name)]
    ):
        remarks.add(f"a row of messages has {', '.join(ignored)} too, which is not read", place)
    if messages is None:
        yield _instruction_example(fields, place)
        return
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages is {type(messages).__name__}; a list is needed")
    said = [_message(message, f"{place}: messages[{number}]", remarks) for number, message in enumerate(messages)]
    if (system := _system_of(fields, place)) and not any(role == "system" for role, _ in said):
        said.insert(0, ("system", system))
    if all(role != "user" for role, _ in said):
        raise DataError(f"{place}: messages holds no message of the user")
    for number, (role, content) in enumerate(said):
        if role == "assistant":
            if not number or said[number - 1][0] != "user":
                raise DataError(
                    f"{place}: messages[{number}]: an answer of the assistant must follow a message of the user"
                )
            if content.strip():
                yield _chat_example(said[:number], content)
            else:
                remarks.add("an answer of the assistant is blank, and not trained on", place)
    if said[-1][0] == "user":
        yield _chat_example(said, "")


def example_of(fields: dict[str, Any], place: str) -> Example:
    """Make the example of one row that was not read from a file: of a chat, that of its last answer.

    Args:
        fields: A row as `read_examples` reads it.
        place: What to call the row in messages.

    Raises:
        DataError: The row cannot be read.
    """
    *_, example = [None, *_examples_of(fields, place, Remarks())]
    if example is None:
        raise DataError(f"{place}: messages has no answer that is not blank, and does not end with the user's turn")
    return replace(example, place=place)


def _teacher_of(fields: dict[str, Any]) -> str | None:
    return None if fields.get("teacher") is None else str(fields["teacher"])


def _message(message: Any, where: str, remarks: Remarks) -> tuple[str, str]:
    """Return the role and content of a message, whatever names they have.

    Raises:
        DataError: The message lacks one of them, or its role is unknown.
    """
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value", message.get("text")))
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


def _chat_example(said: Sequence[tuple[str, str]], answer: str) -> Example:
    """Make the example of a chat that ends with a message of the user, and of the answer to it, if there is one."""
    references = (answer,) if answer.strip() else ()
    return Example(0, said[-1][1], "", references, tuple(said) if len(said) > 1 else ())


def _system_of(fields: dict[str, Any], place: str) -> str:
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise DataError(f"{place}: system is {type(system).__name__}; a string is needed")
    return system


def _instruction_example(fields: dict[str, Any], place: str) -> Example:
    """Make the example of a row with an instruction."""
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
    before = [("system", system)] if (system := _system_of(fields, place)) else []
    history = fields.get("history", [])
    if not isinstance(history, list):
        raise DataError(f"{place}: history is {type(history).__name__}; a list of questions and answers is needed")
    for number, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{place}: history[{number}] needs a question and an answer, both strings")
        before += [("user", pair[0]), ("assistant", pair[1])]
    return replace(example, chat=(*before, ("user", example.text))) if before else example
