"""Answers on disk, each file with a note of what its answers depend on, so that nothing is answered twice.

The held-out prompts of a run and the sets of a suite are both answered by way of `AnswerStore.complete`. A run keeps
one file for each model, because all its answers have the same seeds, and a suite one for each model, set and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.data.files import finite, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from minillm.evaluation.dependencies import Dependencies

Row = dict[str, Any]
"""One answer, or what was computed from one prompt: `row` (the prompt's number in its file), `seed`, `text`, `ids`,
..."""
_NOTE_SUFFIXES = (".json", ".made_from")  # earlier versions of suites wrote the second, which is read but not written


@dataclass(frozen=True)
class Task:
    """Parts of a store that are made together.

    Attributes:
        depends_on: What their rows depend on.
        parts: The parts by name, with the sampling seeds of the answers in each; no seeds if it holds something else.
        make: Makes the rows of the parts, given all seeds of those that are missing.
    """

    depends_on: Dependencies
    parts: Mapping[str, Sequence[int]]
    make: Callable[[Sequence[int]], Sequence[Row]]


class AnswerStore:
    """A folder of JSONL files of rows, `PART.jsonl`, each with a note of what its rows depend on, `PART.json`.

    Args:
        folder: Created when the first part is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, part: str) -> Path:
        """The file of a part's rows."""
        return self.folder / f"{part}.jsonl"

    def has(self, part: str, depends_on: Dependencies) -> bool:
        """Whether a part is there, and was made from exactly `depends_on`."""
        notes = self._notes(part) if self.file(part).is_file() else []
        return any(depends_on.agree_with(note.read_text(encoding="utf-8")) for note in notes if note.is_file())

    def read(self, part: str) -> list[Row]:
        """The rows of a part that is there."""
        return read_jsonl(self.file(part))

    def write(self, part: str, rows: Sequence[Row], depends_on: Dependencies) -> None:
        """Write a part and its note. NaN and infinities become null."""
        for note in self._notes(part):
            note.unlink(missing_ok=True)  # an interruption must not leave new rows beside an old note
        write_jsonl(self.file(part), finite(rows))
        self._notes(part)[0].write_text(depends_on.note, encoding="utf-8")

    def complete(self, tasks: Sequence[Task]) -> bool:
        """Make the parts that are missing, or were made from something else.

        Args:
            tasks: All parts, in the order in which they are made.

        Returns:
            Whether there were any.
        """
        missing = [[name for name in task.parts if not self.has(name, task.depends_on)] for task in tasks]
        for task, names in zip(tasks, missing, strict=True):
            rows = task.make([seed for name in names for seed in task.parts[name]]) if names else []
            for name in names:
                seeds = task.parts[name]
                self.write(name, [row for row in rows if not seeds or row["seed"] in seeds], task.depends_on)
        return any(missing)

    def _notes(self, part: str) -> list[Path]:
        return [self.file(part).with_suffix(suffix) for suffix in _NOTE_SUFFIXES]


def part(key: str, of: int | str) -> str:
    """The part of a suite's store with a model's answers to set `key` with one seed.

    Instead of a seed, `choices` stands for the probabilities of the choices, and `exposure` for the divergences from
    which the exposure bias is computed.
    """
    return f"{key}-{of}"
