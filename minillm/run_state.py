"""What a run directory holds: which stages are finished, and the settings each was made with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minillm.recipe import Recipe
from minillm.recipe_file import flatten

# The sections of a recipe that decide what a stage makes, and the stages it builds on.
_READS: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher",),
    "finetune": ("data", "finetune", "seed"),
    "sft": ("data", "sft", "seed"),
    "student": ("data", "student"),
    "responses": ("data", "responses", "seed"),
    "warmup": ("warmup", "seed"),
    "minillm": ("data", "objective", "rollout", "training", "seed"),
    "evaluate": ("data", "evaluate"),
    "report": (),
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "teacher": (), "finetune": ("teacher",), "student": ("finetune",), "responses": ("finetune",), "warmup": ("student", "responses"),
    "sft": ("student",), "minillm": ("warmup",), "evaluate": ("minillm", "sft"), "report": (),
}  # fmt: skip

# Where and when responses are drawn and scored, not from what. A run may go on with others.
_OPERATIONAL = {
    "rollout": {"servers", "server_patience", "server_timeout", "engine_memory", "engine_options", "overlap", "lora"},
    "teacher": {"servers"},
}


def _by_content(value: Any) -> Any:
    """A data file's digest instead of its name, with the names of its columns where they are given."""
    if isinstance(value, dict) and value.get("file"):
        digest = hashlib.sha256(Path(value["file"]).read_bytes()).hexdigest()[:16]
        return {"file": digest, "columns": value["columns"]} if value["columns"] else digest
    if isinstance(value, str) and value.endswith(".jinja"):
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]
    return value


def _whole(key: str, value: Any) -> Any:
    """A local path in full: one setting however it is written, and wherever from."""
    named = key.endswith((".source", ".adapter", ".file", ".dataset")) and isinstance(value, str) and value != "prune"
    return os.path.abspath(value) if named and Path(value).exists() else value


class RunError(RuntimeError):
    """A run directory that does not fit the recipe, or lacks what a stage needs."""


class Interrupted(Exception):
    """Ctrl-C, after what was done has been saved."""


def _is_ours(run_dir: Path) -> bool:
    """Empty, or begun this moment by another process."""
    names = {file.name for file in run_dir.iterdir()}
    return names <= {"recipe.json", "state.part", "launched"} or "state.json" in names


class RunState:
    """`state.json` of a run directory."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._file = recipe.run_dir / "state.json"
        self._stages: dict[str, Any] = {}
        if self._file.is_file():
            self._stages = json.loads(self._file.read_text(encoding="utf-8"))["stages"]
        elif recipe.run_dir.is_dir() and not _is_ours(recipe.run_dir):
            raise RunError(f"{recipe.run_dir}: not empty, and not the directory of a minillm run; choose another run_dir")

    def finished(self, stage: str) -> bool:
        return bool(self._stages.get(stage, {}).get("finished"))

    def seconds(self) -> dict[str, float]:
        return {stage: entry["seconds"] for stage, entry in self._stages.items() if "seconds" in entry}

    def check(self, stage: str) -> None:
        """Refuse to go on from a stage, or from one it builds on, that was begun or finished with other settings.

        Raises:
            RunError: naming the settings that differ.
        """
        for earlier in _NEEDS[stage]:
            self.check(earlier)
        entry = self._stages.get(stage)
        if entry is None:
            return
        new, old = self.settings(self._sections(stage)), {key: _whole(key, value) for key, value in entry["settings"].items()}
        changed = [
            f"{key} (there {old.get(key)!r}, now {new.get(key)!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise RunError(
                f"{self._recipe.run_dir}: stage {stage} there was made with other settings: {shown}. Choose another "
                f"run_dir=…, or add --redo to make {stage} again"
            )

    def needs(self, stage: str, planned: Sequence[str]) -> None:
        """Refuse a stage whose inputs are neither there nor about to be made."""
        for earlier in _NEEDS[stage]:
            if earlier in self._recipe.stages and not self.finished(earlier) and earlier not in planned:
                raise RunError(
                    f"{self._recipe.run_dir}: stage {stage} needs stage {earlier}, which is not finished; run it first (--stage {earlier})"
                )

    def forget(self, stage: str) -> list[str]:
        """Drop a stage and those that build on it; returns their names."""
        dropped = [stage]
        for later, needs in _NEEDS.items():
            if stage in needs:
                dropped += self.forget(later)
        if self._stages.pop(stage, None):
            self._write()
        return dropped

    def begin(self, stage: str) -> None:
        self._stages[stage] = {"finished": False, "settings": self.settings(self._sections(stage))}
        self._write()

    def finish(self, stage: str, seconds: float, processes: int = 1) -> None:
        self._stages[stage] |= {"finished": True, "seconds": round(seconds, 1), "processes": processes}
        self._write()

    def settings(self, names: Iterable[str]) -> dict[str, Any]:
        """Some sections of the recipe, flat; data files by their content."""
        tree = self._recipe.model_dump(mode="json")
        sections = {section: tree[section] for section in sorted(names)}
        if "data" in sections:
            sections["data"] = {name: _by_content(value) for name, value in sections["data"].items()}
        for section, names in _OPERATIONAL.items():
            if section in sections:
                sections[section] = {name: value for name, value in sections[section].items() if name not in names}
        return {".".join(key): _whole(".".join(key), value) for key, value in flatten(sections).items()}

    def _sections(self, stage: str) -> set[str]:
        """What a stage reads, itself or through the stages it builds on."""
        own = set(_READS[stage])
        if stage in ("finetune", "sft") and stage not in self._recipe.stages:
            own = set()
        return own.union(*(self._sections(earlier) for earlier in _NEEDS[stage]))

    def _write(self) -> None:
        self._recipe.run_dir.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"stages": self._stages}, indent=1), encoding="utf-8")
        part.replace(self._file)
