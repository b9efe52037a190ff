"""Pages of keys: every setting of a recipe, a suite and a comparison, from the classes that read them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from generate.presets import shown
from minillm.evaluation.config import Suite
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe
from minillm.run.stages import STAGES
from minillm.train.supported_arguments import FINE_TUNING_ONLY, HONOURED, IN_A_RECIPE, REFUSED, RENAMED

_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", dict: "mapping"}


def _sections(annotation: Any, key: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The classes of settings in an annotation, with the beginning of the names of their keys."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_fields:
            yield kind, f"{key}."
        elif get_origin(kind) is dict:
            yield from ((inner, f"{key}.NAME.") for inner, _ in _sections(get_args(kind)[1], key))


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation itself, without what pydantic adds."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for one in get_args(annotation) for kind in _kinds(one)]
    return [annotation]


def type_text(annotation: Any) -> str:
    """A type in words."""
    return " or ".join(dict.fromkeys(_kind_text(kind) for kind in _kinds(annotation)))


def _kind_text(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if kind is type(None):
        return "`null`"
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of names to {type_text(arguments[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _limits(field: FieldInfo) -> str:
    """The limits of a number, from its metadata and from that of its parts."""
    found, parts = list(field.metadata), [field.annotation]
    while parts:
        part = parts.pop()
        found += getattr(part, "__metadata__", ())
        parts += [one for one in get_args(part) if hasattr(one, "__metadata__")]
    texts = [
        f"{text} {getattr(one, name):g}"
        for one in _flat(found)
        for name, text in _LIMITS.items()
        if getattr(one, name, None) is not None
    ]
    return "".join(f", {text}" for text in dict.fromkeys(texts))


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for one in metadata:
        yield from getattr(one, "metadata", None) or [one]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.is_required() else ""
    if isinstance(field.default, BaseModel):
        return ""
    return f"default `{shown(field.default)}`"


def key_entry(key: str, field: FieldInfo, same_as: str | None = None) -> str:
    """A key as a heading with an anchor, its type, its default and its text.

    Args:
        key: Its dotted name.
        field: What is known about it.
        same_as: A section above that has the same keys as this one.
    """
    facts = f"{type_text(field.annotation)}{_limits(field)}"
    default = _default(field)
    about = " ".join((field.description or "").split())
    keys = f"\n\nIts keys are those of [`{same_as}`](#{same_as})." if same_as else ""
    return f"### `{key}` {{ #{key} }}\n\n{facts}{'; ' if default else ''}{default}\n\n{about}{keys}\n"


def keys_page(title: str, intro: str, model: type[BaseModel]) -> str:
    """A page of all keys of a kind of file. What keys a section has is said once, where it first occurs."""
    shown_at: dict[type[BaseModel], str] = {}
    loose, sectioned = [], []
    for name, field in model.model_fields.items():
        inner = [kind for kind, _ in _sections(field.annotation, name)]
        if not inner:
            loose.append(key_entry(name, field))
            continue
        about = " ".join((field.description or "").split())
        sectioned.append(f"## `{name}` {{ #{name} }}\n\n{about}\n")
        sectioned += _entries(field, name, shown_at)
    top = ["## At the top\n", *loose] if loose else []
    return "\n".join([f"# {title}\n\n{intro}\n", *top, *sectioned])


def _entries(field: FieldInfo, key: str, shown_at: dict[type[BaseModel], str]) -> Iterator[str]:
    """The entries of the keys below a key, without those of sections that have been shown."""
    for section, prefix in _sections(field.annotation, key):
        if section in shown_at:
            continue
        shown_at[section] = key
        for name, inner in section.model_fields.items():
            place = f"{prefix}{name}"
            again = next((shown_at[one] for one, _ in _sections(inner.annotation, place) if one in shown_at), None)
            yield key_entry(place, inner, again)
            yield from _entries(inner, place, shown_at)


def recipe_page() -> str:
    """The page of the keys of recipes."""
    holders = ", ".join(f"[`{stage.training}`](#{stage.training})" for stage in STAGES if stage.training)
    intro = (
        "Every key that a recipe can have, with its type, its default and what it does. `minillm show RECIPE` prints "
        "the value of each in a recipe and where it comes from. An unknown key is refused, with file and line.\n\n"
        f"The sections {holders} take the fields of `transformers.TrainingArguments` that are listed "
        "[at the end](#training-arguments)."
    )
    return keys_page("Recipe keys", intro, Recipe) + _training_arguments()


def _training_arguments() -> str:
    def listed(names: Any) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names))

    def reasons(table: dict[str, str]) -> str:
        return "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(table.items()))

    head = "| field | why |\n| --- | --- |\n"
    return f"""
## Training arguments {{ #training-arguments }}

The fields of `transformers.TrainingArguments` that the trainers honour, as transformers documents them:

{listed(HONOURED - IN_A_RECIPE.keys())}.

Honoured by the stages `finetune` and `sft` alone, which train with TRL's SFTTrainer. The reason is that of the others:

{head}{reasons(FINE_TUNING_ONLY)}

Refused in a recipe, where they belong to the stage:

{head}{reasons(IN_A_RECIPE)}

Refused by every trainer:

{head}{reasons(REFUSED)}

Names of transformers 4: {"; ".join(f"`{old}` is now {new}" for old, new in RENAMED.items())}.
"""


def suite_page() -> str:
    """The page of the keys of suites."""
    return keys_page(
        "Suite keys",
        "A suite lists test sets, and how models answer them: `minillm evaluate SUITE model=FOLDER`. See "
        "[Evaluate and compare](../guides/evaluation.md).",
        Suite,
    )


def comparison_page() -> str:
    """The page of the keys of comparisons."""
    return keys_page(
        "Comparison keys",
        "A comparison trains several methods from one start, tunes them alike and tests them once: `minillm run "
        "COMPARISON`. The mappings `recipe` and `tuning` hold [recipe keys](recipe.md).",
        Comparison,
    )
