"""Reads recipes, suites and comparisons: YAML with `extends` and overrides, and errors that name file, line and key.

A value that starts with `./` or `../` is a path relative to the file that it stands in. The names and values of
`transformers.TrainingArguments`, and the existence of files, are checked here too, before any model loads.
"""

from __future__ import annotations

import os
import re
import sys
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minillm.data.config import Source
from minillm.errors import RecipeError
from minillm.evaluation.config import Suite
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe
from minillm.run.training_arguments import name_faults, training_faults
from minillm.run.tree import Key, merge, suggest_names
from minillm.teacher.config import FORMS, TeacherConfig


class _Loader(yaml.SafeLoader):
    """YAML 1.1, which takes 1e-6 for text since it has no point, with such numbers read as numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
Kind = TypeVar("Kind", bound=BaseModel)
STANDARD_INPUT = Path("-")
"""The path of a recipe that is piped in."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, follow its `extends`, apply overrides and validate the result.

    Args:
        path: a YAML file, or `-` for standard input.
        overrides: texts `section.key=value`, which replace what the file says.

    Raises:
        RecipeError: naming the file and line (or the override), the key, the value and what is allowed.
    """
    path = Path(path)
    recipe, tree, where = _load(path, overrides, Recipe)
    if faults := _faults(recipe, tree, where, path):
        raise RecipeError("\n".join(faults))
    return recipe


def recipe_of(tree: dict[str, Any], source: str) -> Recipe:
    """Make a recipe of settings that another file holds.

    Args:
        tree: nested settings, as YAML would give them.
        source: what error messages call the place they come from.

    Raises:
        RecipeError: as `load_recipe`, naming `source` instead of a line.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(fault, {}, Path(source), Recipe) for fault in error.errors())) from None
    if faults := _faults(recipe, tree, {}, Path(source)):
        raise RecipeError("\n".join(faults))
    return recipe


def load_comparison(path: str | Path, overrides: Iterable[str] = ()) -> Comparison:
    """Read a comparison of methods; see `load_recipe`."""
    return _load(Path(path), overrides, Comparison)[0]


def is_comparison(path: str | Path) -> bool:
    """Whether a file, or one that it extends, describes a comparison (it has `methods`)."""
    return "methods" in _read(Path(path), {}, ())


def _faults(recipe: Recipe, tree: dict[str, Any], where: dict[Key, str], path: Path) -> list[str]:
    """Faults that a section cannot find in itself: training arguments, and files that are not there."""
    trainings = recipe.trainings(idle=True)
    found = [fault for stage, given in trainings for fault in name_faults(stage, given)]
    if not found:
        found = [fault for stage, given in trainings for fault in training_faults(recipe, stage, given)]
    faults = [f"{_place(where, key, path)}: {'.'.join(key)}: {fault}" for key, fault in found]
    files = {name: value.file for name, value in recipe.data if isinstance(value, Source)}
    if recipe.data.template.endswith(".jinja"):
        files["template"] = Path(recipe.data.template)
    faults += [
        f"{_place(where, ('data', name), path)}: data.{name}: no such file: {file}"
        for name, file in files.items()
        if file is not None and not file.is_file()
    ]
    return faults


def load_suite(path: str | Path, overrides: Iterable[str] = ()) -> Suite:
    """Read a suite of test sets; see `load_recipe`. Its data files are looked for when the suite is run."""
    return _load(Path(path), overrides, Suite)[0]


def extending_recipe(parent: Path, target: Path, overrides: Iterable[str]) -> str:
    """The text of a recipe at `target` that extends the one at `parent` with some overrides."""
    tree: dict[str, Any] = {}
    for text in overrides:
        _override(tree, text, {})
    base = os.path.relpath(parent.resolve(), target.resolve().parent)
    return yaml.safe_dump({"extends": base} | tree, sort_keys=False, allow_unicode=True)


def is_suite(path: str | Path) -> bool:
    """Whether a file, or one that it extends, describes a suite (it has `sets`)."""
    return "sets" in _read(Path(path), {}, ())


def _load(path: Path, overrides: Iterable[str], kind: type[Kind]) -> tuple[Kind, dict[str, Any], dict[Key, str]]:
    """The validated settings, the settings as given, and the place (`file:line`) of each key."""
    where: dict[Key, str] = {}
    tree = _read(path, where, ())
    for text in overrides:
        _override(tree, text, where)
    try:
        return kind.model_validate(tree), tree, where
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(fault, where, path, kind) for fault in error.errors())) from None


def _read(path: Path, where: dict[Key, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file and of those that it extends. `where` is filled with the place of each key."""
    if path != STANDARD_INPUT and not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself, through {seen[-1].name}")
    try:
        text = _standard_input() if path == STANDARD_INPUT else path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: byte {error.start + 1}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply to be a recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, and this file is not")
    own: dict[Key, str] = {}
    tree = _construct(node, path, own, ())
    parent = tree.pop("extends", None)
    if parent is None:
        where.update(own)
        return tree
    base = _read(path.parent / os.path.expanduser(str(parent)), where, (*seen, path.resolve()))
    where.update(own)
    return merge(base, tree)


@cache
def _standard_input() -> str:
    return sys.stdin.read()


def _construct(node: yaml.Node, path: Path, where: dict[Key, str], key: Key) -> Any:
    """The value of a YAML node, with relative paths made relative to the file's folder."""
    where[key] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, child in node.value:
            name = str(key_node.value)
            if name == "<<":  # YAML's merge key: an anchored section, which this one changes
                merged = merge(merged, _construct(child, path, where, key))
                continue
            if name in out:
                raise RecipeError(f"{path}:{key_node.start_mark.line + 1}: {'.'.join((*key, name))}: duplicate key")
            out[name] = _construct(child, path, where, (*key, name))
            where[(*key, name)] = f"{path}:{key_node.start_mark.line + 1}"
        return {**merged, **out}
    value = yaml.load(yaml.serialize(node), _Loader)
    if isinstance(value, str) and value.startswith(("./", "../")) and key != ("extends",):
        return str(path.parent / value)
    return value


def _override(tree: dict[str, Any], text: str, where: dict[Key, str]) -> None:
    """Set the value of a text `section.key=value` in the tree."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"{text!r}: an override is section.key=value")
    *sections, last = name.split(".")
    at = tree
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise RecipeError(f"{text!r}: {section} is not a section")
    try:
        at[last] = yaml.load(value, _Loader) if value else ""
    except (yaml.YAMLError, RecursionError):
        raise RecipeError(f"{text!r}: the value is not YAML") from None
    where[tuple(name.split("."))] = "command line"


def _place(where: dict[Key, str], key: Key, path: Path) -> str:
    """The place of a key, or of the nearest section around it."""
    while key and key not in where:
        key = key[:-1]
    return where.get(key, str(path))


def _explain(fault: Any, where: dict[Key, str], path: Path, kind: type[BaseModel]) -> str:
    """One line about a fault that pydantic found."""
    key = tuple(str(part) for part in fault["loc"] if part not in FORMS)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key; " + suggest_names(key[-1], _fields(key[:-1], kind))
    elif fault["type"] == "missing":
        message = "needed, and not given"
    elif not isinstance(fault["input"], dict):
        message += f" (given: {fault['input']!r})"
    # A check of several keys begins its message with the key that it is about.
    if not key and (named := re.match(r"([\w.]+): (.*)", message, re.S)):
        key, message = tuple(named[1].split(".")), named[2]
    return f"{_place(where, key, path)}: {'.'.join(key) or 'recipe'}: {message}"


def _fields(key: Key, kind: type[BaseModel]) -> list[str]:
    """The keys that are allowed in a section."""
    model: Any = kind
    if key[:1] == ("teacher",) and kind is Recipe:  # one teacher, or a section of several
        return list(TeacherConfig.model_fields)
    for part in key:
        # A mapping holds a section for each name.
        model = typing.get_args(model)[1] if typing.get_origin(model) is dict else model.model_fields[part].annotation
        if typing.get_origin(model) is not dict:  # a section that may be left out
            model = next(
                (kind for kind in typing.get_args(model) if isinstance(kind, type) and issubclass(kind, BaseModel)),
                model,
            )
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
