"""Answers on disk, each file with a note of what its answers depend on, so that nothing is answered twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.data.files import finite, read_jsonl, write_jsonl

Row = dict[str, Any]
"""One answer, or what was computed from one prompt: `row` (the prompt's number in its file), `seed`, `text`, `ids`,
..."""
Dependencies = str | Mapping[str, Any]
"""What answers depend on: a digest (`digest`), or settings by name."""


class AnswerStore:
    """A folder of JSONL files of rows, `PART.jsonl`, each with a note of what its rows depend on beside it.

    Args:
        folder: Created when the first part is written.
        note_suffix: Suffix of the notes' file names, e.g. `.json`.
    """

    def __init__(self, folder: Path, note_suffix: str) -> None:
        self.folder = folder
        self._note_suffix = note_suffix

    def file(self, part: str) -> Path:
        """The file of a part's rows."""
        return self.folder / f"{part}.jsonl"

    def has(self, part: str, depends_on: Dependencies) -> bool:
        """Whether a part is there, and was made from exactly `depends_on`."""
        note = self._note(part)
        if not (self.file(part).is_file() and note.is_file()):
            return False
        text = note.read_text(encoding="utf-8")
        return text == depends_on if isinstance(depends_on, str) else json.loads(text) == depends_on

    def read(self, part: str) -> list[Row]:
        """The rows of a part that is there."""
        return read_jsonl(self.file(part))

    def write(self, part: str, rows: Sequence[Row], depends_on: Dependencies) -> None:
        """Write a part and its note. NaN and infinities become null."""
        note = self._note(part)
        note.unlink(missing_ok=True)  # an interruption must not leave new rows beside an old note
        write_jsonl(self.file(part), finite(rows))
        note.write_text(depends_on if isinstance(depends_on, str) else json.dumps(depends_on), encoding="utf-8")

    def _note(self, part: str) -> Path:
        return self.file(part).with_suffix(self._note_suffix)


def suite_store(out: Path, model: str) -> AnswerStore:
    """The answers of one model to the sets of a suite that is kept in `out`; its parts are named as follows."""
    return AnswerStore(out / model, ".made_from")


def seed_part(key: str, seed: int) -> str:
    """The part of a `suite_store` that has the answers to set `key` with one seed."""
    return f"{key}-{seed}"


def choices_part(key: str) -> str:
    """The part of a `suite_store` that has the probabilities of the choices of set `key`."""
    return f"{key}-choices"


def exposure_part(key: str) -> str:
    """The part of a `suite_store` that has the divergences from which the exposure bias on set `key` is computed."""
    return f"{key}-exposure"


def digest(*parts: Any) -> str:
    """SHA-256 of the representation of the parts, in hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_times(folder: str | Path, *patterns: str) -> dict[str, int]:
    """Modification times, in nanoseconds, of the files of a folder that match a pattern; empty for a hub id."""
    return {file.name: file.stat().st_mtime_ns for kind in patterns for file in sorted(Path(folder).glob(kind))}
