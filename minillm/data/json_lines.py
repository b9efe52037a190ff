"""Reads JSONL files: all lines in order, and then any of them again from where it begins."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minillm.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which some editors write


class JsonLines:
    """A JSONL file, of whose lines only the places are kept in memory: 16 bytes a line.

    Args:
        path: The file. Blank lines do not count.

    Raises:
        DataError: There is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        self.path = path
        self._starts, self._numbers, self._end = array("q"), array("q"), 0
        self._file: BinaryIO = path.open("rb")
        self._version = self._current_version()

    def scan(self) -> Iterator[tuple[Any, str]]:
        """Parse the lines in order.

        Yields:
            The value of each line, and its place (`file:line`).

        Raises:
            DataError: Naming the line: it is not UTF-8 or not JSON.
        """
        self._starts, self._numbers = array("q"), array("q")
        end = 0
        with self.path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                start, end = end, end + len(raw)
                if number == 1:
                    self._check_first(raw)
                    raw = raw.removeprefix(_BYTE_ORDER_MARK)
                place = f"{self.path}:{number}"
                line = _decoded(raw, place)
                if line.strip():
                    value = _parsed(line, place)
                    self._starts.append(start)
                    self._numbers.append(number)
                    self._end = end
                    yield value, place

    def __len__(self) -> int:
        """The number of lines that `scan` has passed."""
        return len(self._starts)

    def __getitem__(self, number: int) -> tuple[Any, str]:
        """Return the value of a line that `scan` has passed, and its place.

        Raises:
            DataError: The file has changed since then.
        """
        place = f"{self.path}:{self._numbers[number]}"
        if self._current_version() != self._version:
            raise DataError(f"{self.path}: changed while it was being read; start again, which continues the run")
        start = self._starts[number]
        end = self._starts[number + 1] if number + 1 < len(self._starts) else self._end
        raw = os.pread(self._file.fileno(), end - start, start)  # moves no position, which forks would share
        line = raw.partition(b"\n")[0].removeprefix(b"" if start else _BYTE_ORDER_MARK)
        return _parsed(_decoded(line, place), place), place

    def _check_first(self, raw: bytes) -> None:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path}: UTF-16; save it as UTF-8")
        if raw.removeprefix(_BYTE_ORDER_MARK).strip() in (b"[", b"[{"):
            raise DataError(
                f"{self.path}: one JSON array; JSONL is needed, one object a line (jq -c '.[]' converts it)"
            )

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        """The state without the open file, for the worker processes of a data loader."""
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._file = self.path.open("rb")


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: byte {error.start + 1} of the line") from None


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply to be a row of text") from None
    except ValueError as error:  # a number with more digits than Python reads
        raise DataError(f"{place}: JSON that cannot be read: {error}") from None
