"""A commented recipe for a pair and files of the user's own, sized by the plan to a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minillm.distribution import RECIPES
from minillm.errors import InputError, SourceError
from minillm.models.configs import context_length, text_config
from minillm.models.load import load_tokenizer
from minillm.models.shape import shape_of
from minillm.models.sources import check_source
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan.fit import fit_recipe
from minillm.run.plan.machine import Machine
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import recipe_of
from minillm.run.tree import Key, merge
from minillm.train.update_size import sizes_of_update

_UPDATE = 32  # responses of one weight update, or a few fewer where processes could not share them alike
_COLUMN = 44  # where comments begin
_COMMENTS: dict[Key, str] = {
    ("run_dir",): "everything that the run makes is kept here",
    ("data", "train"): "JSONL: instruction (and input), prompt, or messages; output is not needed",
    ("data", "heldout"): "prompts of the same form that no stage trains on",
    ("data", "template"): "chat, alpaca, plain, or a Jinja template of your own",
    ("data", "max_prompt_tokens"): "longer prompts are left out, counted and reported",
    ("student", "source"): "a folder or hub id, or prune: some layers of the teacher",
    ("responses", "max_new_tokens"): "of the teacher's answers, which the warm-up trains on",
    ("warmup", "cross_entropy"): "the rest is KL(p‖q) to the teacher, on its answers",
    ("objective", "preset"): "minillm show FILE prints what it sets",
    ("rollout", "num_rollouts"): "responses for one set of weights; a multiple of an update",
    ("rollout", "inner_epochs"): "passes over them",
    ("rollout", "teacher_mix"): "share of the teacher in sampling; importance weights correct it",
    ("rollout", "max_new_tokens"): "longer answers are cut and count as unfinished",
    ("training", "learning_rate"): "higher for small students, lower for large ones",
    ("training", "max_steps"): "weight updates",
    ("training", "responses_per_update"): "of a weight update, on any number of GPUs",
    ("training", "per_device_train_batch_size"): "the largest micro-batch of one GPU",
    ("training", "gradient_checkpointing"): "less memory, a third more time",
    ("evaluate", "seeds"): "one answer to each held-out prompt with each",
}


@dataclass(frozen=True)
class Wanted:
    """What the user says of the recipe."""

    target: Path
    """The file to write."""
    teacher: str
    student: str
    """A folder, a hub id, or `prune`."""
    train: Path
    heldout: Path
    keep_layers: int | None = None
    """How many of the teacher's layers a pruned student keeps; by default five of six."""


def new_recipe(wanted: Wanted, machine: Machine) -> tuple[str, str]:
    """The text of a recipe, and what is said about its size.

    Args:
        wanted: the pair and the files.
        machine: the machine that it is sized to.

    Raises:
        InputError, MissingError: files or models are not there, or the settings cannot be combined. Where the hub
            cannot be asked, the recipe is written unsized.
    """
    for name, file in (("--train", wanted.train), ("--heldout", wanted.heldout)):
        if not file.is_file():
            raise InputError(f"{name} {file}: no such file")
    try:
        for source in [wanted.teacher] + [wanted.student] * (wanted.student != "prune"):
            check_source(source, ("config", "tokenizer"))
        tree, size = _sized(_tree(wanted, machine), wanted, machine)
    except SourceError as error:
        tree, size = _tree(wanted, machine, known=False), f"Not sized to a machine: {error}"
    schema = os.path.relpath(RECIPES / "schemas" / "recipe.json", wanted.target.resolve().parent)
    head = [
        f"# yaml-language-server: $schema={schema}",
        f"# {wanted.student if wanted.student != 'prune' else 'A pruned student'} from {wanted.teacher}.",
        *(f"# {line}" for line in size.splitlines()),
        "# Every other key has a default: minillm show FILE prints all of them.",
    ]
    return "\n".join([*head, *_lines(tree, ())]) + "\n", size


def _tree(wanted: Wanted, machine: Machine, *, known: bool = True) -> dict[str, Any]:
    """The settings before they are sized.

    Args:
        known: whether the models can be looked at; otherwise they are taken for chat models of half a billion.
    """
    template, prompt, response, rate = _by_models(wanted) if known else ("chat", 512, 256, 1e-5)
    folder = wanted.target.resolve().parent
    student: dict[str, Any] = {"source": wanted.student}
    if wanted.student == "prune":
        layers = wanted.keep_layers or (text_config(wanted.teacher).num_hidden_layers * 5 // 6 if known else 20)
        student["keep_layers"] = layers
    update = machine.processes * max(1, _UPDATE // machine.processes)
    shared = {
        "lr_scheduler_type": "cosine",
        "bf16": machine.bf16,
        "responses_per_update": update,
        "per_device_train_batch_size": sizes_of_update(update, machine.processes)[0],
    }
    return {
        "run_dir": f"runs/{wanted.target.stem}",
        "data": {
            "train": _beside(wanted.train, folder),
            "heldout": _beside(wanted.heldout, folder),
            "template": template,
            "max_prompt_tokens": prompt,
        },
        "teacher": {"source": _model(wanted.teacher)},
        "student": student | {"source": _model(wanted.student)},
        "responses": {"max_new_tokens": response},
        "warmup": {
            "cross_entropy": 0.5,
            "training": {"learning_rate": 2 * rate, "num_train_epochs": 1, "warmup_steps": 0.05, **shared},
        },
        "objective": {"preset": "recommended"},
        "rollout": {
            "num_rollouts": 4 * update,
            "inner_epochs": 2,
            "teacher_mix": 0.2,
            "temperature": 1.0,
            "max_new_tokens": response,
        },
        "training": {"learning_rate": rate, "max_steps": 500, "warmup_steps": 10, "save_steps": 50, **shared},
        "evaluate": {"seeds": [10, 20, 30], "max_new_tokens": response},
    }


def _by_models(wanted: Wanted) -> tuple[str, int, int, float]:
    """Template, longest prompt and response in tokens, and learning rate that suit the models."""
    student = wanted.teacher if wanted.student == "prune" else wanted.student
    context = min(context_length(text_config(source)) or 1 << 20 for source in (wanted.teacher, student))
    prompt = min(512, context // 2)
    small = shape_of(student).parameters < 10**9
    template = "chat" if load_tokenizer(wanted.teacher).chat_template else "alpaca"
    return template, prompt, min(256, context - prompt), 1e-5 if small else 5e-6


def _sized(tree: dict[str, Any], wanted: Wanted, machine: Machine) -> tuple[dict[str, Any], str]:
    """The settings with the changes that make them fit, and the plan in words."""
    folder = wanted.target.resolve().parent

    def override(changes: list[str]) -> Recipe:
        return recipe_of(_from(folder, _changed(tree, changes)), str(wanted.target))

    found, _ = fit_recipe(override([]), machine, override)
    where = f"{machine.processes} GPU(s) of" if machine.gpu else "a CPU with"
    peak = f"{found.peak / GIB:.1f} of {machine.memory / GIB:.0f} GiB and {found.hours:.1f} hours"
    verdict = "" if found.fits else "\nIt does not fit: choose a smaller model, or see `minillm plan`."
    size = f"Sized for {where} {machine.memory / GIB:.0f} GiB: {peak}, estimated.{verdict}"
    return _changed(tree, found.overrides), size


def _changed(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    for text in overrides:
        name, _, value = text.partition("=")
        change: Any = yaml.safe_load(value)
        for part in reversed(name.split(".")):
            change = {part: change}
        tree = merge(tree, change)
    return tree


def _from(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The settings with the paths that are relative to the recipe's folder made whole, as its reader does."""
    data = {
        name: os.path.normpath(folder / value) if name in ("train", "heldout") else value
        for name, value in tree["data"].items()
    }
    return tree | {"data": data}


def _beside(file: Path, folder: Path) -> str:
    """A path from the recipe's folder, in the form that its reader takes for one."""
    path = os.path.relpath(file.resolve(), folder)
    return path if path.startswith("../") else f"./{path}"


def _model(source: str) -> str:
    """A model folder by its whole path, so that the recipe can be run from anywhere; other sources as they are."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _lines(tree: dict[str, Any], above: Key) -> Iterator[str]:
    for name, value in tree.items():
        key, indent = (*above, name), "  " * len(above)
        comment = f"  # {_COMMENTS[key]}" if key in _COMMENTS else ""
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, key)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
            text = text.removesuffix("\n").removesuffix("\n...")
            yield f"{f'{indent}{name}: {text}':<{_COLUMN if comment else 0}}{comment}"
