"""The recipes that come with the library, by name: `gpt2/120m` is the file recipes/gpt2/120m.yaml."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from minillm.distribution import RECIPES, ROOT
from minillm.run.tree import merge

_FOLDERS = (RECIPES, ROOT / "eval")
_NOT_RECIPES = ("accelerate", "schemas")  # folders beside those of the families
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # all recipes are read at once, to list them


@dataclass(frozen=True)
class ShippedRecipe:
    """What `minillm recipes` says of a recipe."""

    name: str
    teacher: str
    student: str
    """The student's source, or how many of the teacher's layers it keeps."""
    trains: str
    """The stages that train, in order, and the objective."""
    gpus: str
    """The fewest GPUs of 80 GiB that it fits on, by the plan in recipes/README.md; empty where none is there."""
    hours: str
    """Hours on 8 of them, by the same plan."""
    about: str
    """The first sentence of its comment."""


def names() -> list[str]:
    """The names of the shipped recipes that can be run, or extended where they lack a pair."""
    found = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    return sorted(
        (name for name in found if name.split("/")[0] not in _NOT_RECIPES), key=lambda name: ("/" in name, name)
    )


def find_recipe(given: Path) -> Path | None:
    """The file that a path or a name means; a file that is there comes before a shipped recipe of the same name.

    Args:
        given: a path, or the name of a shipped recipe, suite or comparison: `gpt2/120m`, `recipes/gpt2/120m.yaml` and
            `eval/paper` are found from every working directory.

    Returns:
        The path of the file, or None where there is none.
    """
    if given.is_file():
        return given
    if given.is_absolute() or ".." in given.parts or not given.parts:
        return None
    for base in (RECIPES, ROOT):
        for path in (base / given, base / given.parent / f"{given.name}.yaml"):
            if path.suffix == ".yaml" and path.is_file() and any(map(path.is_relative_to, _FOLDERS)):
                return _from_here(path)
    return None


def _from_here(path: Path) -> Path:
    """A path below the working directory from there, which is how a command would write it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def name_of(path: Path) -> str | None:
    """The name of a shipped recipe, or None for another file."""
    path = path.resolve()
    return path.relative_to(RECIPES).with_suffix("").as_posix() if path.is_relative_to(RECIPES) else None


def suggestion(given: Path) -> str:
    """The end of an error message about a recipe that is not there."""
    close = difflib.get_close_matches(given.with_suffix("").as_posix(), names(), n=1, cutoff=0.7)
    listed = "`minillm recipes` lists those that come with the library"
    return f"did you mean {close[0]}? {listed}" if close else listed


def shipped_recipes() -> list[ShippedRecipe]:
    """The shipped recipes that have a pair, described by what they say."""
    plans = _plans()
    return [
        _described(name, settings, plans.get(name, ("", "")))
        for name in names()
        if "source" in (settings := _settings(RECIPES / f"{name}.yaml")).get("teacher", {})
    ]


def bases() -> list[tuple[str, str]]:
    """The shipped recipes without a pair, to be extended: name and first sentence of each."""
    paths = {name: RECIPES / f"{name}.yaml" for name in names()}
    return [(name, _about(path)) for name, path in paths.items() if "source" not in _settings(path).get("teacher", {})]


def _described(name: str, settings: dict[str, Any], plan: tuple[str, str]) -> ShippedRecipe:
    from minillm.run.stages import STAGES

    stages = settings.get("stages") or [stage.name for stage in STAGES if stage.default]
    trained = [stage.name for stage in STAGES if stage.training and stage.name in stages]
    objective = settings.get("objective", {}).get("preset", "recommended")
    student = settings.get("student", {})
    source = str(student.get("source", "prune"))
    return ShippedRecipe(
        name=name,
        teacher=str(settings["teacher"]["source"]),
        student={"prune": f"{student.get('keep_layers')} of its layers", "config": "random weights"}.get(
            source, source
        ),
        trains=f"{', '.join(trained)} ({objective}{', LoRA' if student.get('lora') else ''})",
        gpus=plan[0],
        hours=plan[1],
        about=_about(RECIPES / f"{name}.yaml"),
    )


@cache
def _settings(path: Path) -> dict[str, Any]:
    """The settings of a shipped recipe with those that it extends, unchecked."""
    tree = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    parent = tree.pop("extends", None)
    return tree if parent is None else merge(_settings((path.parent / parent).resolve()), tree)


def _about(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#") or line.strip() == "#":
            break
        if not line.startswith("# yaml-language-server"):
            comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[A-Za-z\d)])\. (?=[A-Z])", " ".join(comment))[0].rstrip(".")


def _plans() -> dict[str, tuple[str, str]]:
    """GPUs and hours by name, from the table that `minillm plan recipes` has printed into recipes/README.md."""
    rows = re.findall(
        r"^\| (\S+) \| .* \| (\d+|more) \| ([\d.]+) \|$", (RECIPES / "README.md").read_text(encoding="utf-8"), re.M
    )
    return {name: (gpus, hours) for name, gpus, hours in rows}
