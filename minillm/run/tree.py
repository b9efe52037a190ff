"""Nested settings: flattened, merged."""

from __future__ import annotations

from typing import Any

Key = tuple[str, ...]


def flatten(tree: Any, prefix: Key = ()) -> dict[Key, Any]:
    """Leaves of nested mappings, keyed by their path."""
    if isinstance(tree, dict) and tree:
        return {leaf: value for key, child in tree.items() for leaf, value in flatten(child, (*prefix, key)).items()}
    return {prefix: tree}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `over` where both say something."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out
