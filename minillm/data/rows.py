"""Reads rows of JSONL files and data sets under this package's column names, each with its place for error messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.data.config import Source
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
    for fields, place in _lines(source.file) if source.file is not None else _records(source, stream, seed):
        if not isinstance(fields, dict):
            yield fields, place
            continue
        names = {
            name: next((old for old in known if fields.get(old) is not None), name) for name, known in _ALIASES.items()
        }
        if unknown := set(source.columns.values()) - fields.keys():
            raise DataError(f"{place}: no column {', '.join(sorted(unknown))}; there are {', '.join(map(str, fields))}")
        names |= source.columns
        for name, value in fields.items():
            check_text(value, f"{place}: {name}")
        if remarks is not None:
            for name in fields.keys() - set(names.values()) - _DESCRIPTIVE_COLUMNS:
                if fields[name] not in (None, "", [], {}):
                    remarks.add(
                        f"column {name} is not read (columns: {{instruction: …}} says which column is what)", place
                    )
        yield {name: fields[old] for name, old in names.items() if fields.get(old) is not None}, place


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
            check_text(inner, f"{where}[{number}]")


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Parse the lines of a JSONL file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            place = f"{path}:{number}"
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{path}: UTF-16; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
                if raw.strip() in (b"[", b"[{"):
                    raise DataError(
                        f"{path}: one JSON array; JSONL is needed, one object a line (jq -c '.[]' converts it)"
                    )
            try:
                line = raw.decode("utf-8")
                if line.strip():
                    yield json.loads(line), place
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8: byte {error.start + 1} of the line") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
            except RecursionError:
                raise DataError(f"{place}: JSON nested too deeply to be a row of text") from None
            except ValueError as error:  # a number with more digits than Python reads
                raise DataError(f"{place}: JSON that cannot be read: {error}") from None


def _records(source: Source, stream: bool, seed: int | None) -> Iterator[tuple[Any, str]]:
    """Load or stream the rows of a data set."""
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(
            str(source.dataset), source.config, split=source.split, revision=source.revision, streaming=stream
        )
    except (OSError, ValueError) as error:  # no such data set, configuration, split or revision
        raise DataError(f"{source.name}: {error}") from error
    except RuntimeError as error:  # a data set that is a program, which `datasets` no longer runs
        raise DataError(
            f"{source.name}: {error}; the hub's own copy of its rows: revision: refs/convert/parquet"
        ) from error
    if stream and seed is not None:
        rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    for number, fields in enumerate(rows):
        yield dict(fields), f"{source.name}[{number}]"
