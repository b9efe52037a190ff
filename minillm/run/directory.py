"""What a run directory holds: which stages are finished, and the settings each was made with."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.errors import RunError
from minillm.redaction import redacted
from minillm.run.recipe import Recipe
from minillm.run.tree import flatten

_FORMAT = 2  # of what is recorded of a stage
_LONGEST_PATH = 4096  # a template can be a text
_PROMPTS = ("data.train", "data.template", "data.system", "data.max_prompt_tokens", "data.limit")
_VALIDATION = (
    "data.validation", "data.validation_limit", "rollout.max_new_tokens", "rollout.temperature", "rollout.stop",
)  # fmt: skip
# The settings that decide what a stage makes, by the beginning of their names; and the stages it builds on.
_READS: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher.source", "teacher.adapter"),
    "finetune": (*_PROMPTS, "finetune", "responses.max_new_tokens", "seed"),
    "sft": (*_PROMPTS, "sft", "responses.max_new_tokens", "student.lora", "student.dtype", "seed"),
    "student": (*_PROMPTS, "student.source", "student.keep_layers", "student.probe_prompts"),
    "responses": (*_PROMPTS, "responses", "rollout.stop", "seed"),
    "warmup": (*_PROMPTS, "warmup", "responses", "student.lora", "student.dtype", "teacher.quantization", "seed"),
    "minillm": (
        *_PROMPTS, "data.text", "objective", "rollout", "training", "student.lora", "student.dtype", "teacher.quantization",
        "teacher.top_k", "seed",
    ),
    "evaluate": (
        "data.heldout", *_PROMPTS[1:], "evaluate", "rollout.stop", "student.source", "teacher.quantization",
    ),
    "report": (),
}  # fmt: skip
_NEEDS: dict[str, tuple[str, ...]] = {
    "teacher": (), "finetune": ("teacher",), "student": ("finetune",), "responses": ("finetune",), "warmup": ("student", "responses"),
    "sft": ("student",), "minillm": ("warmup",), "evaluate": ("minillm", "sft"), "report": (),
}  # fmt: skip
# Where each training stage's `transformers.TrainingArguments` stand.
_TRAINING = {"finetune": "finetune", "sft": "sft", "warmup": "warmup.training", "minillm": "training"}

# Where and when responses are drawn and scored, not from what. A run may go on with others.
_OPERATIONAL = frozenset(
    f"rollout.{name}"
    for name in ("servers", "server_patience", "server_timeout", "engine_memory", "engine_options", "overlap", "lora")
)
# TrainingArguments that say what is logged, kept and told to whom, and where it is computed; what is trained stays the same.
_OPERATIONAL_TRAINING = re.compile(
    r"(logging_|save_|hub_|push_to_hub|dataloader_|ddp_|trackio|project$|report_to$|run_name$|disable_tqdm$|log_level|log_on_each_node$"
    r"|skip_memory_metrics$|use_cpu$|gradient_checkpointing|torch_empty_cache_steps$|enable_jit_checkpoint$|include_for_metrics$"
    r"|include_num_input_tokens_seen$|liger_kernel_config$)"
)
_VALIDATING = re.compile(
    r"(eval_|metric_for_best_model$|greater_is_better$|load_best_model_at_end$|per_device_eval_batch_size$)"
)


def absolute_paths(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings with every local path in full: one setting however it is written, and wherever from."""
    tree = recipe.model_dump(mode="json")
    places = [(tree, "run_dir"), (tree["data"], "template"), (tree["teacher"], "source"), (tree["teacher"], "adapter")]
    places += [
        (source, key) for source in tree["data"].values() if isinstance(source, dict) for key in ("file", "dataset")
    ]
    places += [
        (tree["responses"], "file"),
        *([(tree["student"], "source")] if recipe.student.source != "prune" else []),
    ]
    for section, key in places:
        value = section[key]
        if key == "run_dir" or (isinstance(value, str) and len(value) < _LONGEST_PATH and Path(value).exists()):
            section[key] = os.path.abspath(value)
    return tree


def _by_content(value: Any) -> Any:
    """A data file's digest instead of its name, with the names of its columns where they are given."""
    if isinstance(value, dict) and value.get("file"):
        return (
            {"file": _digest(value["file"]), "columns": value["columns"]}
            if value["columns"]
            else _digest(value["file"])
        )
    if isinstance(value, str) and value.endswith(".jinja"):
        return _digest(value)
    return value


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _is_run_directory(run_dir: Path) -> bool:
    """Empty, or begun this moment by another process."""
    names = {file.name for file in run_dir.iterdir()}
    return names <= {"recipe.json", "state.part", "launched"} or "state.json" in names


def _in_full(key: str, value: Any) -> Any:
    """A path that an earlier version wrote down as it was said."""
    named = key.endswith((".source", ".adapter", ".file", ".dataset")) and isinstance(value, str) and value != "prune"
    return os.path.abspath(os.path.expanduser(value)) if named and Path(value).expanduser().exists() else value


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else -1.0


class RunState:
    """`state.json` of a run directory."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._file = recipe.run_dir / "state.json"
        self._stages: dict[str, Any] = {}
        if self._file.is_file():
            try:
                self._stages = json.loads(self._file.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{self._file}: cannot be read ({error}); choose another run_dir, or delete this one"
                ) from None
        elif recipe.run_dir.is_dir() and not _is_run_directory(recipe.run_dir):
            raise RunError(
                f"{recipe.run_dir}: not empty, and not the directory of a minillm run; choose another run_dir"
            )
        elif recipe.run_dir.exists() and not recipe.run_dir.is_dir():
            raise RunError(f"{recipe.run_dir}: a file, where the run's directory would be; choose another run_dir")

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
        new, old = self.settings(stage), self._recorded(stage, entry)
        changed = [
            f"{key} (there {old.get(key)!r}, now {new.get(key)!r})"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not (entry.get("format") != _FORMAT and key not in old)
        ]
        longer = f"{_TRAINING.get(stage)}.max_steps"
        if not entry["finished"] and 0 < _number(old.get(longer)) < _number(
            new.get(longer)
        ):  # it has not come to its end yet
            changed = [text for text in changed if not text.startswith(f"{longer} (")]
        if changed:
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise RunError(
                f"{self._recipe.run_dir}: stage {stage} there was made with other settings: {shown}. Choose another "
                f"run_dir=…, or add --stage {stage} --redo to make {stage}, and what builds on it, again"
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
        self._stages[stage] = {"finished": False, "format": _FORMAT, "settings": self.settings(stage)}
        self._write()

    def finish(self, stage: str, seconds: float, processes: int = 1) -> None:
        self._stages[stage] |= {"finished": True, "seconds": round(seconds, 1), "processes": processes}
        self._write()

    def settings(self, stage: str) -> dict[str, Any]:
        """What a stage reads of the recipe, itself or through the stages it builds on, flat: data files by their content, without
        secrets and without what decides nothing that is made."""
        tree = absolute_paths(self._recipe)
        tree["data"] = {name: _by_content(value) for name, value in tree["data"].items()}
        if tree["responses"]["file"] is not None:
            tree["responses"]["file"] = _digest(tree["responses"]["file"])
        return self._read_by(stage, {".".join(key): value for key, value in flatten(redacted(tree)).items()})

    def _recorded(self, stage: str, entry: dict[str, Any]) -> dict[str, Any]:
        """The settings that a stage was made with, of those that it reads; earlier versions wrote down more."""
        return self._read_by(stage, {key: _in_full(key, value) for key, value in entry["settings"].items()})

    def _read_by(self, stage: str, settings: dict[str, Any]) -> dict[str, Any]:
        parts = self._parts(stage)
        return {
            key: value
            for key, value in settings.items()
            if any(key == part or key.startswith(f"{part}.") for part in parts)
            and value != {}
            and not self._decides_nothing(key)
        }

    def _parts(self, stage: str) -> set[str]:
        own = set(_READS[stage]) if stage in self._recipe.stages or stage not in ("finetune", "sft") else set()
        if stage in _TRAINING and own and self._chooses_best(stage):
            own |= set(_VALIDATION)
        return own.union(*(self._parts(earlier) for earlier in _NEEDS[stage]))

    def _chooses_best(self, stage: str) -> bool:
        """Whether validation decides which student a stage leaves, rather than being looked at alone."""
        return bool(self._training(stage).get("load_best_model_at_end"))

    def _training(self, stage: str) -> dict[str, Any]:
        recipe = self._recipe
        return {
            "finetune": recipe.finetune,
            "sft": recipe.sft,
            "warmup": recipe.warmup.training,
            "minillm": recipe.training,
        }[stage]

    def _decides_nothing(self, key: str) -> bool:
        if key in _OPERATIONAL or any(key.startswith(f"{name}.") for name in _OPERATIONAL):
            return True
        if key == "teacher.top_k":
            return not self._recipe.teacher.servers
        for stage, section in _TRAINING.items():
            if key.startswith(f"{section}."):
                name = key.removeprefix(f"{section}.")
                schedule = "save_steps" if self._chooses_best(stage) else None  # the best is chosen among what is kept
                watched = bool(_VALIDATING.match(name)) and not self._chooses_best(stage)
                return watched or (bool(_OPERATIONAL_TRAINING.match(name)) and name != schedule)
        return False

    def _write(self) -> None:
        self._recipe.run_dir.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(redacted({"stages": self._stages}), indent=1), encoding="utf-8")
        part.replace(self._file)
