"""Reads rows of JSONL files and data sets under this package's column names, each with its place for error messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from minillm.data.config import Source
from minillm.data.json_lines import JsonLines
from minillm.errors import DataError

logger = logging.getLogger(__name__)

# Names that a column is known by. If a row has several of them, the first is read.
_ALIASES = {
    "instruction": ("instruction", "prompt"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "text": ("text",),
    "teacher": ("teacher",),
    "prompt_ids": ("prompt_ids",),  # of a run's responses.jsonl, as is the next
    "response_ids": ("response_ids",),
}
# Columns that only describe a row, which nobody expects to be trained on. They are passed over without a warning.
_DESCRIPTIVE_COLUMNS = frozenset(
    {
        *("id", "idx", "index", "row", "uid", "uuid", "hash", "prompt_id", "conversation_id", "turn"),
        *("task", "task_id", "task_name", "name", "category", "kind", "type", "topic", "tags", "is_classification"),
        *("label_source", "source", "dataset", "origin", "split", "url", "license", "licence", "model", "generator"),
        *("lang", "language", "meta", "metadata", "info", "created", "created_at", "date", "timestamp"),
        *("score", "toxic", "redacted", "difficulty", "quality", "length", "num_turns"),
    }
)
_SHUFFLE_BUFFER = 10_000  # rows of a stream that are held in memory to shuffle them


class Remarks:
    """Collects what was ignored while rows were read, to report each kind once, with a count and the first place."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Note that something was ignored.

        Args:
            kind: What was ignored, the same text for every row that it happens to.
            place: File and line, or data set and number, of the row.
        """
        count, first = self._found.get(kind, (0, place))
        self._found[kind] = count + 1, first

    def report(self) -> None:
        """Log one warning for each kind."""
        for kind, (count, first) in self._found.items():
            logger.warning("%s: %s (%s)", first, kind, "this row" if count == 1 else f"{count} rows, the first here")


def read_rows(
    source: Source, *, stream: bool = False, seed: int | None = 0, remarks: Remarks | None = None
) -> Iterator[tuple[Any, str]]:
    """Read the rows of a source.

    Args:
        source: The JSONL file or data set.
        stream: Whether to stream a data set rather than load it.
        seed: Seed for shuffling a stream within a buffer. With None the rows keep their order.
        remarks: Collects the columns that are ignored although they do more than describe the row.

    Yields:
        Each row and its place (`file:line`, or `dataset[number]`). The columns of a JSON object are renamed to those of
        this package, and empty ones are left out. Any other JSON value is passed on unchanged.

    Raises:
        DataError: The source cannot be read, a row is not JSON, or a row holds text that cannot be encoded.
    """
    if source.file is None and stream:
        rows = _load(source, stream=True)
        for number, fields in enumerate(rows if seed is None else rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
            yield _renamed(dict(fields), f"{source.name}[{number}]", source, remarks)
    else:
        yield from RowReader(source).scan(remarks)


class RowReader:
    """Reads the rows of a source as `read_rows` does, and then any of them again by its number.

    Only the places of the rows are kept in memory. Rows of a file are read from the file again, and those of a data set
    from the memory-mapped Arrow files of `datasets`. A user's JSONL file is not made into such a data set: that needs
    one schema for all rows, where `output` may be a text in one row and a list in the next, and names no line of a
    broken row.

    Args:
        source: The JSONL file or data set.

    Raises:
        DataError: The source cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rows: Any = JsonLines(source.file) if source.file is not None else _load(source, stream=False)

    def scan(self, remarks: Remarks | None = None) -> Iterator[tuple[Any, str]]:
        """Yield all rows in order, with their places; see `read_rows`."""
        if isinstance(self._rows, JsonLines):
            for fields, place in self._rows.scan():
                yield _renamed(fields, place, self._source, remarks)
        else:
            for number, fields in enumerate(self._rows):
                yield _renamed(dict(fields), f"{self._source.name}[{number}]", self._source, remarks)

    def __getitem__(self, number: int) -> tuple[Any, str]:
        """Return a row that `scan` has passed, by its number from 0, with its place.

        Raises:
            DataError: The file has changed since it was scanned.
        """
        if isinstance(self._rows, JsonLines):
            fields, place = self._rows[number]
        else:
            fields, place = dict(self._rows[number]), f"{self._source.name}[{number}]"
        return _renamed(fields, place, self._source, None, checked=True)


def _renamed(
    fields: Any, place: str, source: Source, remarks: Remarks | None, *, checked: bool = False
) -> tuple[Any, str]:
    """Return a row under this package's column names, and its place; `checked` rows are not checked again."""
    if not isinstance(fields, dict):
        return fields, place
    names = {
        name: next((old for old in known if fields.get(old) is not None), name) for name, known in _ALIASES.items()
    }
    if unknown := set(source.columns.values()) - fields.keys():
        raise DataError(f"{place}: no column {', '.join(sorted(unknown))}; there are {', '.join(map(str, fields))}")
    names |= source.columns
    try:
        for name, value in () if checked else fields.items():
            check_text(value, f"{place}: {name}")
    except RecursionError:
        raise DataError(f"{place}: nested too deeply to be a row of text") from None
    if remarks is not None:
        for name in fields.keys() - set(names.values()) - _DESCRIPTIVE_COLUMNS:
            if fields[name] not in (None, "", [], {}):
                remarks.add(f"column {name} is not read (columns: {{instruction: …}} says which column is what)", place)
    return {name: fields[old] for name, old in names.items() if fields.get(old) is not None}, place


def check_text(value: Any, where: str) -> None:
    """Refuse text that no tokenizer can encode: half of a surrogate pair, which JSON's \\ud83d is when it stands alone.

    Args:
        value: Anything that JSON can hold. Nested texts and keys are checked too.
        where: Place of the value, for the error message.

    Raises:
        DataError: Naming the place and the character.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            raise DataError(
                f"{where}: character {error.start + 1} is half of a surrogate pair ({half}), which cannot be encoded: "
                "an emoji was cut in two"
            ) from None
    elif isinstance(value, dict):
        for name, inner in value.items():
            check_text(name, where)
            check_text(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if type(inner) is int:  # of token ids there are hundreds in a row
                continue
            check_text(inner, f"{where}[{number}]")


def _load(source: Source, *, stream: bool) -> Any:
    """Load or stream a data set."""
    from datasets import load_dataset

    try:
        return load_dataset(
            str(source.dataset), source.config, split=source.split, revision=source.revision, streaming=stream
        )
    except (OSError, ValueError) as error:  # no such data set, configuration, split or revision
        raise DataError(f"{source.name}: {error}") from error
    except RuntimeError as error:  # a data set that is a program, which `datasets` no longer runs
        raise DataError(
            f"{source.name}: {error}; the hub's own copy of its rows: revision: refs/convert/parquet"
        ) from error
