"""The run directory: which stages are finished, and the settings that each was made with."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.config import Section
from minillm.distribution import versions
from minillm.errors import RunError
from minillm.redaction import redacted
from minillm.run.operational import (
    LENGTH,
    is_longer,
    is_operational,
    length_of,
    same_update,
    same_warm_up,
    training_sections,
)
from minillm.run.stages import STAGES, stage_named
from minillm.run.stages.stage import Stage
from minillm.run.tree import flatten
from minillm.run.written import read_states

if TYPE_CHECKING:
    from minillm.run.recipe import Recipe

_FORMAT = 2  # of what is recorded of a stage
_LONGEST_PATH = 4096  # a template can be a text
_RECORDED_LATER = ("rollout.engine", "teacher.quantization")  # of what validation reads: since format 2


def absolute_paths(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's settings with absolute local paths, so that equal settings compare as equal.

    A path may be written relative to any folder, and a run may be continued from another working directory.
    """
    tree = recipe.model_dump(mode="json")
    places = [(tree, "run_dir"), (tree["data"], "template")]
    teachers = tree["teacher"].values() if recipe.teacher.several else [tree["teacher"]]
    places += [(teacher, key) for teacher in teachers for key in ("source", "adapter")]
    places += [
        (source, key) for source in tree["data"].values() if isinstance(source, dict) for key in ("file", "dataset")
    ]
    places += [(tree["responses"], "file"), (tree["logits"], "folder")]
    places += [(tree["student"], "like")]
    if not recipe.student.is_made:
        places += [(tree["student"], "source")]
    for section, key in places:
        value = section[key]
        if key == "run_dir" or (isinstance(value, str) and len(value) < _LONGEST_PATH and os.path.exists(value)):
            section[key] = os.path.abspath(value)
    return tree


def _by_content(value: Any) -> Any:
    """A data file's digest instead of its name, with the names of its columns where they are given."""
    if isinstance(value, dict) and value.get("file"):
        digest = _digest(value["file"])
        return {"file": digest, "columns": value["columns"]} if value["columns"] else digest
    if isinstance(value, str) and value.endswith(".jinja"):
        return _digest(value)
    return value


def _digest(file: str) -> str:
    with Path(file).open("rb") as opened:  # in pieces: a data file may be larger than memory
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _is_run_directory(folder: Path) -> bool:
    """Whether a folder is a run directory, or empty, or was begun this moment by another process."""
    names = {file.name for file in folder.iterdir() if not file.name.startswith("launched")}
    return names <= {"logs", "recipe.json", "state.part"} or "state.json" in names


def _normalise_path(key: str, value: Any) -> Any:
    """The absolute form of a local path that an earlier version recorded as it was written."""
    is_path = key.endswith((".source", ".adapter", ".file", ".dataset")) and isinstance(value, str)
    if is_path and value not in ("prune", "config") and os.path.exists(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _unnamed(key: str) -> str:
    """The name of a setting without the name of one of several teachers: `teacher.source` for `teacher.math.source`."""
    section, *path = key.split(".")
    return ".".join([section, *path[1:]]) if section == "teacher" and len(path) == 2 else key


@contextmanager
def writing_to(run_dir: Path) -> Iterator[None]:
    """Report a run directory that cannot be made or written to as an error that the user can mend.

    Raises:
        RunError: a file operation in the body of the `with` statement failed.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"run_dir: {run_dir} cannot be written ({error.strerror or error}): make room and check the permissions "
            "there, or choose another run_dir"
        ) from error


class RunState:
    """`state.json` of a run directory.

    Raises:
        RunError: the directory holds something else, or its state cannot be read.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._file = recipe.run_dir / "state.json"
        self._stages: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._reopened: set[str] = set()  # in the file they are unfinished once they begin
        self._longer: dict[str, tuple[str, str]] = {}  # stages that are to go on: their lengths, as made and now
        if self._file.is_file():
            self._stages = read_states(self._file)
            return
        if recipe.run_dir.is_dir() and not _is_run_directory(recipe.run_dir):
            raise RunError(
                f"{recipe.run_dir}: not empty, and not the directory of a minillm run; choose another run_dir"
            )
        if recipe.run_dir.exists() and not recipe.run_dir.is_dir():
            raise RunError(f"{recipe.run_dir}: a file, where the run's directory would be; choose another run_dir")

    def finished(self, stage: str) -> bool:
        """Whether a stage has been finished, and is not to go on or to be made again since another one does."""
        return stage not in self._reopened and bool(self._stages.get(stage, {}).get("finished"))

    def seconds(self, stage: str) -> float | None:
        """How long a finished stage took; None for one that is not finished."""
        return self._stages[stage].get("seconds") if self.finished(stage) else None

    def check(self, stage: str) -> None:
        """Refuse to go on from a stage, or from one it builds on, that was made with other settings.

        A stage that was begun and has made nothing yet is made with the settings of now.

        Raises:
            RunError: naming the settings that differ.
        """
        for earlier in self._built_on(stage):
            self.check(earlier)
        entry = self._stages.get(stage)
        if entry is None or not (entry["finished"] or stage_named(stage).has_made_something(self._recipe.run_dir)):
            return
        changed, old, new = self._changed(stage, entry)
        self._allow_longer(stage, changed, old, new)
        if changed:
            texts = [f"{key} (there {old.get(key)!r}, now {new.get(key)!r})" for key in changed]
            shown = ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
            names = [stage, *self.lost_with([stage])]
            raise RunError(
                f"{self._recipe.run_dir}: stage {stage} there was made with other settings: {shown}. Choose another "
                f"run_dir=…, or make {' and '.join(names)} again: --stage {','.join(names)} --redo"
            )

    def _changed(self, stage: str, entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The settings that differ from those that a stage was made with, and all of these, then and now."""
        new, old = self.settings(stage), self._recorded(stage, entry)
        # Earlier versions recorded fewer settings, or none where the recipe did not list the stage.
        known = entry.get("format") == _FORMAT and bool(entry["settings"])
        changed = {
            key: new.get(key)
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and (key in old or (known and not self._is_later(key, old)))
        }
        for section in training_sections():
            same_update(section, changed, old, entry.get("processes"))
            same_warm_up(section, changed, old)
        return changed, old, new

    def _allow_longer(self, stage: str, changed: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
        """Take a longer training out of what has changed, where a stage can go on, or is cheaply made again.

        A stage that trains goes on from its last checkpoint. One that keeps what still holds of its work, as evaluate
        does, follows a longer training of another stage.

        Raises:
            RunError: the stage is finished, and its last checkpoint is not there any more.
        """
        own = stage_named(stage)
        for section, trained in training_sections().items():
            if not is_longer(section, changed, old, new) or not (trained is own or own.keeps_work):
                continue
            rest = [key for key in changed if key not in (f"{section}.{name}" for name in LENGTH)]
            if rest and trained is own:
                continue  # it is made again anyway
            for key in changed.keys() - rest:
                del changed[key]
            if trained is own:
                if self._stages[stage]["finished"] and not own.has_made_something(self._recipe.run_dir):
                    raise RunError(self._no_checkpoint(own, old, new))
                self._longer[stage] = (length_of(section, old), length_of(section, new))
            self._reopened.add(stage)

    def _no_checkpoint(self, stage: Stage, old: dict[str, Any], new: dict[str, Any]) -> str:
        section, names = str(stage.training), [stage.name, *self.lost_with([stage.name])]
        return (
            f"{self._recipe.run_dir}: stage {stage.name} there is finished ({length_of(section, old)}), and its last "
            f"checkpoint, from which it would go on to {length_of(section, new)}, is not there (keep_checkpoint: "
            'false, save_strategy: "no", or a stage that builds on it is finished). Leave the length as it was, or '
            f"make {' and '.join(names)} again: --stage {','.join(names)} --redo"
        )

    def needs(self, stage: str, planned: Sequence[str]) -> None:
        """Refuse a stage whose inputs are neither there nor about to be made.

        Args:
            planned: stages that run before it.

        Raises:
            RunError: naming the stage that has to be run first.
        """
        for earlier in stage_named(stage).needs:
            if earlier in self._recipe.stages and not self.finished(earlier) and earlier not in planned:
                raise RunError(
                    f"{self._recipe.run_dir}: stage {stage} needs stage {earlier}, which is not finished; run it first "
                    f"(--stage {earlier})"
                )

    def lost_with(self, stages: Sequence[str]) -> list[str]:
        """Name the other stages whose work is thrown away when some are made again: those that build on them."""
        return [
            stage.name
            for stage in STAGES
            if stage.name not in stages
            and not stage.keeps_work
            and self._has_work(stage)
            and any(named in self.all_below(stage.name) for named in stages)
        ]

    def made(self) -> list[str]:
        """Name the stages whose work would be lost if all were made again."""
        return [stage.name for stage in STAGES if not stage.keeps_work and self._has_work(stage)]

    def _has_work(self, stage: Stage) -> bool:
        begun = stage.name in self._stages and not stage.always_runs
        return begun and (self.finished(stage.name) or stage.has_made_something(self._recipe.run_dir))

    def all_below(self, name: str) -> set[str]:
        """The stages that a stage builds on, directly and through others."""
        needs = stage_named(name).needs
        return set(needs).union(*map(self.all_below, needs))

    def forget(self, stage: str) -> list[str]:
        """Drop a stage and those that build on it, and return their names."""
        dropped = [stage]
        for later in STAGES:
            if stage in later.needs:
                dropped += self.forget(later.name)
        if self._stages.pop(stage, None):
            self._write()
        return dropped

    def begin(self, stage: str) -> None:
        """Record that a stage has begun, with its settings.

        Raises:
            RunError: the run directory cannot be written.
        """
        before, self._before = self._stages.get(stage, {}), copy.deepcopy(self._stages)
        self._stages[stage] = {"finished": False, "format": _FORMAT, "settings": self.settings(stage)}
        self._reopened.discard(stage)
        lengthened = before.get("lengthened", []) if stage_named(stage).has_made_something(self._recipe.run_dir) else []
        if stage in self._longer:
            lengthened = [*lengthened, list(self._longer.pop(stage))]
            for later in STAGES:  # what is measured of the shorter one does not hold any more
                if later.keeps_work and later.name in self._stages and stage in self.all_below(later.name):
                    self._stages[later.name]["finished"] = False
        if lengthened:
            self._stages[stage]["lengthened"] = lengthened
        self._write()

    def take_back(self) -> None:
        """Record what was recorded before a stage began: it has refused to go on, and is what it was."""
        self._stages = self._before
        self._write()

    def finish(self, stage: str, seconds: float, processes: int = 1) -> None:
        """Record that a stage is finished, after so many seconds and in so many processes.

        Raises:
            RunError: the run directory cannot be written.
        """
        self._stages[stage] |= {"finished": True, "seconds": round(seconds, 1), "processes": processes}
        self._stages[stage]["versions"] = versions()
        self._write()

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that decide a stage's result, its own and those of the stages it builds on.

        Returns:
            Values by dotted name. A data file stands by the digest of its content; secrets are hidden.
        """
        tree = absolute_paths(self._recipe)
        tree["data"] = {name: _by_content(value) for name, value in tree["data"].items()}
        if tree["responses"]["file"] is not None:
            tree["responses"]["file"] = _digest(tree["responses"]["file"])
        return self._read_by(stage, {".".join(key): value for key, value in flatten(redacted(tree)).items()})

    def _recorded(self, stage: str, entry: dict[str, Any]) -> dict[str, Any]:
        """The recorded settings that decide the stage's result; earlier versions recorded more than those."""
        return self._read_by(
            stage, {key: _normalise_path(key, value) for key, value in entry.get("settings", {}).items()}
        )

    def _read_by(self, stage: str, settings: dict[str, Any]) -> dict[str, Any]:
        parts = self._parts(stage)
        return {
            key: value
            for key, value in settings.items()
            if any(_unnamed(key) == part or _unnamed(key).startswith(f"{part}.") for part in parts)
            and value != {}
            and not self._is_operational(key)
        }

    def _parts(self, name: str) -> set[str]:
        """Beginnings of the names of the settings that a stage reads, itself or through the stages it builds on.

        A default stage counts even where the recipe does not list it. Its result is then read from elsewhere, and its
        settings are those that it was made with: an earlier recipe of this directory listed it, or the recipe starts
        from the result of another run, as the methods of a comparison start from the shared warm-up.
        """
        stage = stage_named(name)
        own, arguments = stage.settings_read(self._recipe), stage.arguments(self._recipe)
        if own and stage.validation_decides(self._recipe):
            own |= set(stage.validation_settings)
            if str(arguments.get("metric_for_best_model")).removeprefix("eval_") == "reverse_kl":
                own.add("teacher.quantization")
        return own.union(*map(self._parts, self._built_on(name)))

    def _built_on(self, name: str) -> list[str]:
        """The stages that a stage builds on: where the recipe leaves one out, those before that one."""
        found = []
        for earlier in stage_named(name).needs:
            absent = earlier not in self._recipe.stages and not stage_named(earlier).default
            found += self._built_on(earlier) if absent else [earlier]
        return found

    def _is_later(self, key: str, recorded: dict[str, Any]) -> bool:
        """Whether a setting that was not recorded is one that earlier versions had not, or did not record.

        The former are told by being at their default in a section that was recorded without them. A run without
        servers records no `teacher.top_k`, which tells it from one with servers.
        """
        if _unnamed(key) in _RECORDED_LATER:
            return True
        *path, name = key.split(".")
        section: Any = self._recipe
        for part in path:
            section = getattr(section, part, None)
        siblings = bool(path) and any(other.startswith(".".join([*path, ""])) for other in recorded)
        field = type(section).model_fields.get(name) if isinstance(section, Section) and siblings else None
        if field is None or field.is_required() or _unnamed(key) == "teacher.top_k":
            return False
        return getattr(section, name) == field.get_default(call_default_factory=True)

    def _is_operational(self, key: str) -> bool:
        """Whether a setting changes nothing that a stage makes."""
        if _unnamed(key) == "teacher.top_k":  # which several teachers never read
            return not self._recipe.teacher.first.servers or self._recipe.teacher.several
        arguments = {section: stage.arguments(self._recipe) for section, stage in training_sections().items()}
        return is_operational(key, arguments)

    def _write(self) -> None:
        text, part = json.dumps(redacted({"stages": self._stages}), indent=1), self._file.with_suffix(".part")
        with writing_to(self._recipe.run_dir):
            self._recipe.run_dir.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(self._file)
