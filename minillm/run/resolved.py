"""A recipe written out: every setting as YAML, with the place that each value comes from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from minillm.loss.presets import PRESETS
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import COMMAND_LINE, resolve_recipe
from minillm.run.stages import STAGES
from minillm.run.tree import Key, flatten

_COLUMN = 48  # where the comments begin, unless a value is longer


def resolved_text(path: str | Path, overrides: Iterable[str] = ()) -> str:
    """A recipe with all that it extends, its overrides and the defaults, as YAML that is a recipe again.

    Args:
        path: a recipe's file or name.
        overrides: texts `section.key=value`.

    Returns:
        Lines `key: value   # place`. A place is `file:line`, `command line`, `preset NAME` or `default`.

    Raises:
        RecipeError: as `minillm.run.recipe_file.resolve_recipe`.
    """
    recipe, where = resolve_recipe(path, overrides)
    lines = [f"# {path}{''.join(f' {text}' for text in overrides)}"]
    lines += [
        f"# Not listed: TrainingArguments that are left to transformers, in {', '.join(_trainings())}.",
        *_lines(_tree(recipe), (), recipe, where),
    ]
    return "\n".join(lines) + "\n"


def sources(recipe: Recipe, where: dict[Key, str]) -> dict[Key, str]:
    """The place that each setting of a recipe comes from."""
    return {key: _source(key, recipe, where) for key in flatten(_tree(recipe))}


def _tree(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    tree["rollout"]["max_prompt_tokens"] = recipe.data.max_prompt_tokens  # whose limit it is in a recipe
    return tree


def _trainings() -> list[str]:
    return [stage.training for stage in STAGES if stage.training]


def _lines(tree: dict[str, Any], above: Key, recipe: Recipe, where: dict[Key, str]) -> Iterator[str]:
    for name, value in tree.items():
        key, indent = (*above, name), "  " * len(above)
        if isinstance(value, dict) and value:
            yield f"{indent}{_scalar(name)}:"
            yield from _lines(value, key, recipe, where)
        else:
            yield f"{f'{indent}{_scalar(name)}: {_scalar(value)}':<{_COLUMN}}  # {_source(key, recipe, where)}"


def _scalar(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").rstrip()


def _source(key: Key, recipe: Recipe, where: dict[Key, str]) -> str:
    """The place of a setting: that of a section given in one piece is the place of the section."""
    if key == ("rollout", "max_prompt_tokens"):
        return "data.max_prompt_tokens"
    if key in where:
        return os.path.normpath(where[key])  # without the `..` of what is extended
    if key[0] == "objective" and len(key) > 1 and key[1] in PRESETS[recipe.objective.preset]:
        return f"preset {recipe.objective.preset}"
    above = key[:-1]
    while above:
        if where.get(above) == COMMAND_LINE and _given_whole(key, above, recipe):
            return COMMAND_LINE
        above = above[:-1]
    return "default"


def _given_whole(key: Key, above: Key, recipe: Recipe) -> bool:
    """Whether an override of a section (`data.train={file: x}`) gave this key, and not a default within it."""
    value: Any = recipe
    for part in key[:-1]:
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return isinstance(value, dict) or key[-1] in getattr(value, "model_fields_set", ())
