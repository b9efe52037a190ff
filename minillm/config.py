"""Base class and value types that the sections of a recipe share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from minillm.errors import InputError

Positive = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number from 0 to 1."""


def expand_home(given: Any) -> Any:
    """Expand `~` and `~name` at the start of a path.

    This is done once, here, because other libraries do it in some places and not in others.

    Args:
        given: A string, a path, or any other value, which is returned unchanged.
    """
    if isinstance(given, str):
        return os.path.expanduser(given)
    return given.expanduser() if isinstance(given, Path) else given


LocalPath = Annotated[Path, BeforeValidator(expand_home)]
"""A path on this machine."""
ModelSource = Annotated[str, BeforeValidator(expand_home)]
"""A folder, a hub id, or another name that the reader of the setting accepts."""


def folder_name(given: str) -> str:
    """Refuse a name that would leave the folder in which a folder or file gets it.

    Raises:
        InputError: It is empty, too long, begins with a dot, or has a separator or a character that is not printed.
    """
    if not given or len(given) > 100 or given.startswith(".") or set(given) & set("/\\") or not given.isprintable():
        raise InputError(
            f"{given[:100]!r}: the name becomes that of a folder: up to 100 characters without / and \\ and no dot in "
            "front are needed"
        )
    return given


FolderName = Annotated[str, AfterValidator(folder_name)]
"""A name that becomes that of a folder or file."""


class Section(BaseModel):
    """A section of a recipe. Unknown keys are refused, and the docstring of a field is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def unique(values: list[Any]) -> list[Any]:
    """Refuse a list in which a value occurs twice: what it names, such as a seed, would be sampled and counted twice.

    Args:
        values: The list.

    Returns:
        The list, unchanged.

    Raises:
        InputError: Naming the values that occur more than once.
    """
    if again := sorted({value for value in values if values.count(value) > 1}):
        raise InputError(f"every value must be given once only; remove the repeated {', '.join(map(str, again))}")
    return values
