"""Reads YAML as plain data: text, numbers, true, false, null, lists and sections, bounded in size, depth and number.

Nothing that a file says makes an object or runs code. A few lines of aliases can stand for more values than memory
holds, so what they stand for is counted before it is built.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from minillm.errors import RecipeError

MAX_CHARACTERS = 1 << 18
"""Of a file; the longest shipped recipe has 2 % of them."""
MAX_DEPTH = 24
"""Sections and lists within each other."""
MAX_VALUES = 20_000
"""Values and keys, as often as aliases repeat them."""

_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML 1.1, which takes 1e-6 for text since it has no point, with such numbers read as numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def compose(text: str, place: str) -> yaml.Node | None:
    """Parse a text of YAML, without building its values.

    Args:
        text: The text.
        place: What errors call it.

    Returns:
        The root; None for an empty text.

    Raises:
        RecipeError: It is no YAML, no plain data, or too much of it.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{place}: {len(text):,} characters are too many for a recipe (at most {MAX_CHARACTERS:,})")
    try:
        node = yaml.compose(text, _Loader)
        count = 0 if node is None else _measure(node, place, 0, {})[0]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{place}{line}: not YAML: {what}") from None
    except RecursionError:
        raise RecipeError(f"{place}: nested too deeply to be a recipe (at most {MAX_DEPTH} levels)") from None
    if count > MAX_VALUES:
        raise RecipeError(f"{place}: its aliases and lists stand for more than {MAX_VALUES:,} values")
    return node


def value_of(node: yaml.Node, place: str) -> Any:
    """Build the value of a node of `compose`.

    Args:
        node: The node.
        place: What errors call the text; the line is added.

    Raises:
        RecipeError: A value cannot be built, such as a number of more digits than Python reads.
    """
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:  # of PyYAML's constructors
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{place}:{node.start_mark.line + 1}: a value that cannot be read: {what}") from None
    finally:
        loader.dispose()


def _is_text(value: str) -> bool:
    """Whether a text can be written: it has no NUL, and no half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _measure(node: yaml.Node, place: str, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The values that a node stands for, and its height; a node that holds itself is too deep."""
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")[:80]
        raise RecipeError(
            f"{place}:{node.start_mark.line + 1}: a value of the kind {kind}: a recipe holds plain text, numbers, "
            "lists and sections; put quotes around what is meant as text"
        )
    if isinstance(node, yaml.ScalarNode) and not _is_text(node.value):
        raise RecipeError(f"{place}:{node.start_mark.line + 1}: a character that no file and no name holds")
    count, height = known.get(id(node), (0, 0))
    if depth + height > MAX_DEPTH:
        raise RecursionError
    if count:
        return count, height
    count, children = 1, node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            more, below = _measure(part, place, depth + 1, known)
            count, height = min(count + more, MAX_VALUES + 1), max(height, below + 1)
    known[id(node)] = count, height
    return count, height
