"""The measured points of `scaling.py` in a file of JSON lines, which an interrupted call leaves whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """Records of measured points, one JSON object a line.

    A record has the `key` of its point, the machine and versions that it was measured on (`on`), and what was measured.
    A line is written when its point is complete. Of a line that a kill has cut off nothing is read, and the next record
    takes its place.

    Args:
        file: The file.
        on: This machine, and the versions of what is measured. Records of others are kept and not used.
    """

    def __init__(self, file: Path, on: Record) -> None:
        self._file, self._on = file, on
        self.others = 0
        """How many records are of another machine or version."""
        self.by_key: dict[str, Record] = {}
        """The records of this machine and these versions by key; the last one of a point counts."""
        self._whole = 0  # bytes of the file up to the end of its last whole line
        if not file.is_file():
            return
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            self._whole += len(line)
            self._read(line, f"{file}:{number}")

    def _read(self, line: bytes, place: str) -> None:
        try:
            record = json.loads(line)
            key, on = record["key"], record["on"]
        except (ValueError, KeyError, TypeError) as error:
            fault = f"{place}: no record of a point ({error}): remove the line, or name another file"
            raise SystemExit(fault) from None
        if on == self._on:
            self.by_key[key] = record
        else:
            self.others += 1

    def add(self, key: str, found: Record) -> Record:
        """Append the record of a point; returns it."""
        record = {"key": key, "on": self._on, **found}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("r+b" if self._file.is_file() else "w+b") as file:
            file.seek(self._whole)
            file.truncate()
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        self.by_key[key] = record
        return record
