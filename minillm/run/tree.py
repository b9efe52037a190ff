"""Nested settings: flattened, merged, and the names that are near to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

Key = tuple[str, ...]
"""Path of a setting through nested sections."""


def flatten(tree: Any, prefix: Key = ()) -> dict[Key, Any]:
    """Leaves of nested mappings, keyed by their path."""
    if isinstance(tree, dict) and tree:
        return {leaf: value for key, child in tree.items() for leaf, value in flatten(child, (*prefix, key)).items()}
    return {prefix: tree}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of both; where both have a value, that of `over`."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def suggest_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the name that was probably meant, or all that are allowed."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return "allowed: " + (", ".join(names) if len(names) < 40 else "the fields of transformers.TrainingArguments")
