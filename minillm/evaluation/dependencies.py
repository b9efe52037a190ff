"""What a model's answers depend on. While it stays the same, answers that are on disk are not sampled again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from minillm.data.examples import Prompt
from minillm.models.configs import text_config
from minillm.rollout.engines.choose import choose_engine

_MODEL_FILES = ("*.safetensors", "*.bin", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """What a model's answers to a set of prompts depend on.

    Attributes:
        model: Folder or hub id; `of` fills it in, with the engine.
        engine: Name of the engine that samples.
        tokenizer: Encodes prompts and decodes answers.
        settings: How answers are sampled and scored, in values that JSON can hold.
        prompts: The rendered prompts.
        choices: The possible answers, if it is a classification task.
        teacher: Folder or hub id of the model that answers are scored with, or of several by name; None without one.
        ends: The end tokens and the size of the vocabulary, where they do not follow from the model alone.
    """

    model: str = ""
    engine: str = ""
    tokenizer: Any
    settings: Mapping[str, Any]
    prompts: Sequence[Prompt] = ()
    choices: Sequence[str] = ()
    teacher: str | Mapping[str, str] | None = None
    ends: tuple[Sequence[int], int] | None = None

    def of(self, model: str, engine: str) -> Dependencies:
        """The same for a model, given the setting that chooses its engine.

        Raises:
            EngineError: The engine is not available, or cannot sample the model.
        """
        return replace(self, model=model, engine=choose_engine(engine, text_config(model)))

    @cached_property
    def note(self) -> str:
        """All facts, as text that is the same while they are. It is kept beside the answers."""
        facts = {
            "weights": file_times(self.model) or self.model,
            "teacher": self._teacher_files(),
            "tokenizer": digest(*_vocabulary(self.tokenizer)),
            "engine": self.engine,
            "settings": self.settings,
            "prompts": digest(self._rendered(), list(self.choices), self.ends),
        }
        return json.dumps(facts, sort_keys=True)

    def agree_with(self, note: str) -> bool:
        """Whether a note beside answers states these facts, perhaps in the form of an earlier version."""
        if note.startswith("{"):
            return note == self.note or json.loads(note) == self._earlier_facts_of_a_run()
        return note == self._earlier_digest_of_a_suite()

    def _teacher_files(self) -> Any:
        if self.teacher is None or isinstance(self.teacher, str):
            return None if self.teacher is None else file_times(self.teacher) or self.teacher
        return {name: file_times(folder) or folder for name, folder in self.teacher.items()}

    def _rendered(self) -> list[Any]:
        return [(prompt.ids, prompt.example.references) for prompt in self.prompts]

    def _earlier_facts_of_a_run(self) -> dict[str, Any]:
        """What an earlier version noted in a run, without .bin files, generation config, tokenizer and teacher."""
        weights = {name: time for name, time in file_times(self.model).items() if name.endswith(".safetensors")}
        prompts = digest([prompt.ids for prompt in self.prompts], *(self.ends or ()))[:16]
        return {
            "weights": weights or self.model,
            "settings": dict(self.settings),
            "prompts": prompts,
            "engine": self.engine,
        }

    def _earlier_digest_of_a_suite(self) -> str:
        teacher = file_times(self.teacher) if isinstance(self.teacher, str) else {}  # suites have one teacher at most
        weights = file_times(self.model) or self.model
        shared = digest(weights, dict(self.settings), self.engine, _vocabulary(self.tokenizer), teacher)
        return digest(shared, list(self.choices), self._rendered())


@lru_cache(maxsize=2)  # the sets of a suite have the model's tokenizer in common
def _vocabulary(tokenizer: Any) -> tuple[list[tuple[str, int]], int | None]:
    return sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id


def digest(*parts: Any) -> str:
    """SHA-256 of the representation of the parts, in hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_times(folder: str | Path) -> dict[str, int]:
    """Modification times, in nanoseconds, of the files of a model that its answers depend on; empty for a hub id."""
    return {file.name: file.stat().st_mtime_ns for kind in _MODEL_FILES for file in sorted(Path(folder).glob(kind))}
