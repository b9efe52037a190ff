"""The file of the teacher's responses: how it is appended to, continued and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.config import Source
from minillm.data.lazy import IN_MEMORY, LazySequence
from minillm.data.rows import RowReader
from minillm.errors import DataError


@dataclass(frozen=True)
class ResponseCheck:
    """Refuses rows that are not responses of the teacher.

    Attributes:
        vocab_size: number of the teacher's tokens.
        teacher: name of the teacher, for messages.
        names: the names of several teachers, of which each row names its own; empty with a single one.
    """

    vocab_size: int
    teacher: str
    names: Sequence[str] = ()

    def __call__(self, fields: Any, place: str) -> None:
        """Check a row.

        Raises:
            DataError: naming the line.
        """
        for name in ("prompt_ids", "response_ids"):
            ids = fields.get(name) if isinstance(fields, dict) else None
            if not _is_token_ids(ids):
                raise DataError(
                    f"{place}: {name} is missing, or no list of token ids: responses.file is the responses.jsonl "
                    "of a run with this teacher. Answers as text are references: name them output in data.train "
                    "and set warmup.targets: references"
                )
            if strange := [token for token in ids or () if not 0 <= token < self.vocab_size]:
                raise DataError(
                    f"{place}: {name} has id {strange[0]}, beyond the {self.vocab_size} tokens of {self.teacher}"
                )
        if self.names and fields.get("teacher") not in self.names:
            raise DataError(
                f"{place}: teacher names none of {', '.join(self.names)}: responses.file is the responses.jsonl "
                "of a run with these teachers"
            )


def open_responses(file: Path, check: ResponseCheck | None = None) -> Sequence[dict[str, Any]]:
    """Read responses. Of more than `IN_MEMORY` rows only the places are kept in memory.

    Args:
        file: a `responses.jsonl`.
        check: refuses rows; None for a file that this run has written.

    Returns:
        Rows with `prompt_ids` and `response_ids`, and with `teacher` if there are several.

    Raises:
        DataError: naming the line that cannot be read or is refused.
    """
    reader, number, longest = RowReader(Source(file=file)), 0, 0
    rows: list[dict[str, Any]] = []
    for number, (fields, place) in enumerate(reader.scan(), 1):
        if check is not None:
            check(fields, place)
        longest = max(longest, len(fields["prompt_ids"]) + len(fields["response_ids"]))
        if number <= IN_MEMORY:
            rows.append(fields)
        else:
            rows.clear()
    if not number:
        raise DataError(f"{file}: empty; the responses.jsonl of a run is needed")
    return rows or LazySequence(number, _RowOf(reader), longest)


class _RowOf:
    """Reads a row again; a class, because a closure cannot be pickled."""

    def __init__(self, reader: RowReader) -> None:
        self._reader = reader

    def __call__(self, number: int) -> dict[str, Any]:
        return self._reader[number][0]


@dataclass
class Progress:
    """How far the responses have come.

    A teacher answers all its prompts, once for each sample, before the next teacher begins.

    Attributes:
        teacher: name of the teacher that answered last; None if nobody has.
        sample: number of the pass over the prompts of this teacher.
        row: number of the example that was answered last.
        count: number of answers.
    """

    teacher: str | None = None
    sample: int = 0
    row: int = -1
    count: int = 0

    def note(self, teacher: str, row: int) -> None:
        """Note an answer, in the order in which they are written: in a pass the numbers of the rows increase."""
        if teacher != self.teacher:
            self.teacher, self.sample = teacher, 0
        elif row <= self.row:
            self.sample += 1
        self.row = row
        self.count += 1


class ResponsesFile:
    """A file of responses, to which waves of rows are appended.

    To write the whole file again at every wave would take a time that grows with the square of the rows.

    Args:
        path: the file. A last line that is incomplete, because its writing was interrupted, is cut off.

    Attributes:
        progress: how far the rows of the file have come.
    """

    def __init__(self, path: Path) -> None:
        self.progress = Progress()
        self._path = path
        if path.is_file():
            with path.open("r+b") as lines:
                end = 0
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    self._note(json.loads(line))
                lines.truncate(end)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows at the end."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for row in rows:
            self._note(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        self.progress.note(row.get("teacher", ""), row["row"])


def _is_token_ids(ids: Any) -> bool:
    """Whether a value is a list of integers with at least one of them."""
    if not isinstance(ids, list) or not ids:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
