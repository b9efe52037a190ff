"""Tables of what the presets of the objective set, for the pages of methods."""

from __future__ import annotations

import re

from minillm.loss.config import Objective
from minillm.loss.presets import PRESETS

_MARK = re.compile(r"^<!-- preset: ([\w-]+) -->$", re.M)


def with_tables(text: str) -> str:
    """A page whose marks `<!-- preset: NAME -->` are replaced by a table of the preset's settings."""
    return _MARK.sub(lambda found: preset_table(found[1]), text)


def preset_table(name: str) -> str:
    """The fields in which a preset differs from `recommended`, as a Markdown table.

    Raises:
        KeyError: There is no such preset.
    """
    settings = PRESETS[name]
    if not settings:
        return "It is the default of every field of [`objective`](../../reference/recipe.md#objective)."
    rows = [
        f"| [`{key}`](../../reference/recipe.md#objective.{key}) | `{shown(value)}` | `{shown(default_of(key))}` |"
        for key, value in settings.items()
    ]
    return "\n".join(["| field of `objective` | here | in `recommended` |", "| --- | --- | --- |", *rows])


def default_of(key: str) -> object:
    """The default of a field of `objective`."""
    return Objective.model_fields[key].default


def shown(value: object) -> str:
    """A value as a recipe writes it."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
