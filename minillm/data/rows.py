"""Rows of JSONL files and data sets, under the column names used here, each with the place to name in an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.data.config import Source
from minillm.errors import DataError

logger = logging.getLogger(__name__)

# Names that a column goes by, the first that is there.
_ALIASES = {
    "instruction": ("instruction", "prompt"), "input": ("input", "context"), "output": ("output", "response", "completion"),
    "messages": ("messages", "conversations", "conversation"), "system": ("system", "system_prompt"), "history": ("history",),
    "text": ("text",),
}  # fmt: skip
# Columns that say where a row comes from, which nobody expects to be trained on.
_ABOUT_THE_ROW = frozenset(
    ("id", "idx", "index", "row", "uid", "uuid", "hash", "prompt_id", "conversation_id", "task", "task_id", "task_name", "name",
     "category", "kind", "type", "topic", "tags", "label_source", "source", "dataset", "origin", "split", "lang", "language", "url",
     "license", "licence", "meta", "metadata", "info", "model", "generator", "created", "created_at", "date", "timestamp", "turn",
     "score", "toxic", "redacted", "difficulty", "quality", "length", "num_turns", "is_classification")
)  # fmt: skip
_SHUFFLE_BUFFER = 10_000  # rows of a stream that are held to mix their order


class Remarks:
    """What was passed over while rows were read: counted by kind, and reported once with the first place."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, place: str) -> None:
        count, first = self._found.get(kind, (0, place))
        self._found[kind] = count + 1, first

    def report(self) -> None:
        for kind, (count, first) in self._found.items():
            logger.warning("%s: %s (%s)", first, kind, "this row" if count == 1 else f"{count} rows, the first here")


def read_rows(
    source: Source, *, stream: bool = False, seed: int | None = 0, remarks: Remarks | None = None
) -> Iterator[tuple[Any, str]]:
    """A source's rows, each with its place (`file:line`, or `dataset[number]`).

    Args:
        stream: do not hold a data set; with `seed`, its order is mixed within a buffer.
        remarks: told of columns that are not read though they do not only describe the row.

    Raises:
        DataError: the source cannot be read; a row is not JSON, or holds text that cannot be encoded.
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
            for name in fields.keys() - set(names.values()) - _ABOUT_THE_ROW:
                if fields[name] not in (None, "", [], {}):
                    remarks.add(
                        f"column {name} is not read (columns: {{instruction: …}} says which column is what)", place
                    )
        yield {name: fields[old] for name, old in names.items() if fields.get(old) is not None}, place


def check_text(value: Any, where: str) -> None:
    """Refuse text that no tokenizer can encode: half of a surrogate pair, as JSON's \\ud83d alone is.

    Raises:
        DataError: naming `where` and the character.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            raise DataError(
                f"{where}: character {error.start + 1} is half of a surrogate pair ({half}), which is no text: an emoji was cut in two"
            ) from None
    elif isinstance(value, dict):
        for name, inner in value.items():
            check_text(name, where)
            check_text(inner, f"{where}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check_text(inner, f"{where}[{number}]")


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
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
                        f"{path}: one JSON array; JSONL is needed, one object a line (jq -c '.[]' makes it)"
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
            except ValueError as error:  # a number of more digits than Python reads
                raise DataError(f"{place}: not JSON that can be read: {error}") from None


def _records(source: Source, stream: bool, seed: int | None) -> Iterator[tuple[Any, str]]:
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
