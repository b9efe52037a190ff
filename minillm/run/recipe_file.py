"""Reads recipes, suites and comparisons: YAML with `extends` and overrides, and errors that name file, line and key.

A recipe is a file, or the name of one that is shipped (`minillm.run.shipped`); so is what it extends.

A value that starts with `./` or `../` is a path relative to the file that it stands in. The names and values of
`transformers.TrainingArguments`, and the existence of files, are checked here too, before any model loads.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minillm.data.config import Source
from minillm.errors import RecipeError
from minillm.evaluation.config import Suite
from minillm.redaction import is_secret, redacted, redacted_text
from minillm.run.experiments.config import Comparison
from minillm.run.plain_yaml import MAX_CHARACTERS, compose, value_of
from minillm.run.recipe import Recipe
from minillm.run.shipped import find_recipe, suggestion
from minillm.run.training_arguments import name_faults, training_faults
from minillm.run.tree import Key, flatten, merge, suggest_names
from minillm.teacher.config import FORMS, TeacherConfig

Kind = TypeVar("Kind", bound=BaseModel)
Fault = tuple[Key, str]
"""A key, and what is wrong with its value."""
_LONGEST = 1000  # characters that are said of one fault
COMMAND_LINE = "command line"
"""The place of a key that an override gives."""
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
    overrides = list(overrides)
    recipe, where = _load(Path(path), overrides, Recipe)
    if faults := _faults(recipe):
        before = _faults_before(Path(path)) if overrides else None
        raise RecipeError("\n".join(_say(fault, where, Path(path), before) for fault in faults))
    return recipe


def resolve_recipe(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, dict[Key, str]]:
    """Read a recipe as `load_recipe` does, without what needs transformers: the values of training arguments.

    Neither are its data files looked for.

    Returns:
        The recipe, and the place (`file:line`, or `command line`) of each key that was given.

    Raises:
        RecipeError: as `load_recipe`.
    """
    recipe, where = _load(Path(path), overrides, Recipe)
    if faults := _name_faults(recipe):
        raise RecipeError("\n".join(_say(fault, where, Path(path)) for fault in faults))
    return recipe, where


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
        faults = [_explain(fault, Recipe) for fault in error.errors()]
        raise RecipeError("\n".join(_say(fault, {}, Path(source)) for fault in faults)) from None
    if faults := _faults(recipe):
        raise RecipeError("\n".join(_say(fault, {}, Path(source)) for fault in faults))
    return recipe


def load_comparison(path: str | Path, overrides: Iterable[str] = ()) -> Comparison:
    """Read a comparison of methods; see `load_recipe`."""
    return _load(Path(path), overrides, Comparison)[0]


def is_comparison(path: str | Path) -> bool:
    """Whether a file, or one that it extends, describes a comparison (it has `methods`)."""
    return "methods" in _read(Path(path), {}, ())


def _name_faults(recipe: Recipe) -> list[Fault]:
    """Training arguments that do not exist."""
    return [fault for stage, given in recipe.trainings(idle=True) for fault in name_faults(stage, given)]


def _faults(recipe: Recipe) -> list[Fault]:
    """Faults that a section cannot find in itself: training arguments, and files that are not there."""
    found = _name_faults(recipe)
    if not found:
        for stage, given in recipe.trainings(idle=True):
            found += training_faults(recipe, stage, given)
    files = {name: value.file for name, value in recipe.data if isinstance(value, Source)}
    if recipe.data.template.endswith(".jinja"):
        files["template"] = Path(recipe.data.template)
    missing = {name: file for name, file in files.items() if file is not None and not os.path.isfile(file)}
    return found + [(("data", name), f"no such file: {file}") for name, file in missing.items()]


def _faults_before(path: Path) -> list[Fault]:
    """The faults of a recipe without its overrides, which are to blame for all others."""
    try:
        return _faults(_load(path, (), Recipe)[0])
    except RecipeError:
        return []


def _say(fault: Fault, where: dict[Key, str], path: Path, before: Sequence[Fault] | None = None) -> str:
    """One line about a fault.

    Args:
        fault: the key and what is wrong with it.
        where: the places of the keys.
        path: the file, for a key that has no place.
        before: the faults without overrides; None where there are no overrides.
    """
    key, message = fault
    place = COMMAND_LINE if before is not None and fault not in before else _place(where, key, path)
    if key and is_secret(key[-1], "a value"):
        message = message.partition(" (given")[0]
    text = f"{place}: {'.'.join(key) or 'recipe'}: {redacted_text(message)}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def load_suite(path: str | Path, overrides: Iterable[str] = ()) -> Suite:
    """Read a suite of test sets; see `load_recipe`. Its data files are looked for when the suite is run."""
    return _load(Path(path), overrides, Suite)[0]


def extending_recipe(parent: Path, target: Path, overrides: Iterable[str]) -> str:
    """The text of a recipe at `target` that extends the one at `parent` with some overrides."""
    tree: dict[str, Any] = {}
    for text in overrides:
        _override(tree, text, {})
    by_name = not parent.is_file() and parent != STANDARD_INPUT
    base = str(parent) if by_name else os.path.relpath(parent.resolve(), target.resolve().parent)
    return yaml.safe_dump({"extends": base} | tree, sort_keys=False, allow_unicode=True)


def is_suite(path: str | Path) -> bool:
    """Whether a file, or one that it extends, describes a suite (it has `sets`)."""
    return "sets" in _read(Path(path), {}, ())


def _load(path: Path, overrides: Iterable[str], kind: type[Kind]) -> tuple[Kind, dict[Key, str]]:
    """The validated settings, and the place (`file:line`) of each key."""
    where: dict[Key, str] = {}
    tree = _read(path, where, ())
    given = copy.deepcopy(tree)
    for text in overrides:
        _override(tree, text, where)
    try:
        return kind.model_validate(tree), where
    except ValidationError as error:
        faults = [_explain(fault, kind) for fault in error.errors()]
    before = _section_faults(given, kind) if given != tree else None
    raise RecipeError("\n".join(_say(fault, where, path, before) for fault in faults))


def _section_faults(tree: dict[str, Any], kind: type[BaseModel]) -> list[Fault]:
    """What pydantic finds wrong with settings."""
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        return [_explain(fault, kind) for fault in error.errors()]
    return []


def _read(path: Path, where: dict[Key, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file and of those that it extends. `where` is filled with the place of each key."""
    if path != STANDARD_INPUT:
        found = _find(path)
        if found is None:
            raise RecipeError(f"{textwrap.shorten(str(path), 300)}: no such recipe; {suggestion(path)}")
        path = found
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself, through {seen[-1].name}")
    try:
        text = _standard_input() if path == STANDARD_INPUT else _text_of(path)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: byte {error.start + 1}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    node = compose(text, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, and this file is not")
    own: dict[Key, str] = {}
    tree = _construct(node, path, own, ())
    parent = tree.pop("extends", None)
    if parent is None:
        where.update(own)
        return tree
    beside, named = path.parent / os.path.expanduser(str(parent)), Path(str(parent))
    extended = beside if os.path.isfile(beside) else _find(named)
    if extended is None:
        name = textwrap.shorten(str(parent), 300)
        raise RecipeError(f"{own[('extends',)]}: extends: {name}: no such recipe; {suggestion(named)}")
    base = _read(extended, where, (*seen, path.resolve()))
    _given(where, own, flatten(tree))
    return merge(base, tree)


def _given(where: dict[Key, str], own: dict[Key, str], leaves: Iterable[Key]) -> None:
    """Add the places of keys, and forget those of what these leaves replace."""
    replaced = set(leaves)
    for key in [key for key in where if any(key[:n] in replaced for n in range(1, len(key)))]:
        del where[key]
    where.update(own)


@cache
def _standard_input() -> str:
    return sys.stdin.read(MAX_CHARACTERS + 1)


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(MAX_CHARACTERS + 1)  # one more than `compose` accepts


def _find(path: Path) -> Path | None:
    """The file that a path or a name means; None for what no file can be called."""
    try:
        return find_recipe(path)
    except (OSError, ValueError):  # too long, or with a character that no file name has
        return None


def _construct(node: yaml.Node, path: Path, where: dict[Key, str], key: Key) -> Any:
    """The value of a YAML node, with relative paths made relative to the file's folder."""
    where[key] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, child in node.value:
            name = str(key_node.value)
            if name == "<<":  # YAML's merge key: an anchored section, which this one changes
                merged = merge(merged, _merged_section(child, path, where, key))
                continue
            if name in out:
                raise RecipeError(f"{path}:{key_node.start_mark.line + 1}: {'.'.join((*key, name))}: duplicate key")
            out[name] = _construct(child, path, where, (*key, name))
            where[(*key, name)] = f"{path}:{key_node.start_mark.line + 1}"
        return {**merged, **out}
    value = value_of(node, str(path))
    if isinstance(value, str) and value.startswith(("./", "../")) and key != ("extends",):
        return str(path.parent / value)
    return value


def _merged_section(node: yaml.Node, path: Path, where: dict[Key, str], key: Key) -> dict[str, Any]:
    """The section, or the sections, that a merge key puts in; of several the first has the last word, as in YAML."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    merged: dict[str, Any] = {}
    for each in reversed(nodes):
        value = _construct(each, path, where, key)
        if not isinstance(value, dict):
            line = f"{path}:{node.start_mark.line + 1}"
            raise RecipeError(f"{line}: {'.'.join((*key, '<<'))}: what is merged is a section, such as *name")
        merged = merge(merged, value)
    return merged


def _override(tree: dict[str, Any], text: str, where: dict[Key, str]) -> None:
    """Set the value of a text `section.key=value` in the tree."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"{_shortened(text)}: an override is section.key=value")
    *sections, last = name.split(".")
    at = tree
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise RecipeError(f"{_shortened(text)}: {section[:100]} is not a section")
    place = f"{COMMAND_LINE}: {name}"
    node = compose(value, place) if value else None
    at[last] = "" if node is None else value_of(node, place)
    _given(where, {tuple(name.split(".")): COMMAND_LINE}, {tuple(name.split("."))})


def _shortened(text: str) -> str:
    return textwrap.shorten(repr(text), 200)


def _place(where: dict[Key, str], key: Key, path: Path) -> str:
    """The place of a key, or of the nearest section around it."""
    while key and key not in where:
        key = key[:-1]
    return where.get(key, str(path))


def _explain(fault: Any, kind: type[BaseModel]) -> Fault:
    """The key and the message of a fault that pydantic found."""
    key = tuple(str(part) for part in fault["loc"] if part not in FORMS)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key; " + suggest_names(key[-1], _fields(key[:-1], kind))
    elif fault["type"] == "missing":
        message = "needed, and not given"
    elif not isinstance(fault["input"], dict):
        message += f" (given: {textwrap.shorten(repr(redacted(fault['input'], key[-1] if key else '')), 200)})"
    # A check of several keys begins its message with the key that it is about.
    if not key and (named := re.match(r"([\w.]+): (.*)", message, re.S)):
        key, message = tuple(named[1].split(".")), named[2]
    return key, message


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
