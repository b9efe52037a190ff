"""What every section of a recipe is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from minillm.errors import InputError

Positive = Annotated[int, Field(ge=1)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


def expand_home(given: Any) -> Any:
    """`~` and `~name` are read here, once: other libraries read it in some places and not in others."""
    return (
        os.path.expanduser(given)
        if isinstance(given, str)
        else given.expanduser()
        if isinstance(given, Path)
        else given
    )


LocalPath = Annotated[Path, BeforeValidator(expand_home)]


ModelSource = Annotated[str, BeforeValidator(expand_home)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def different(values: list[Any]) -> list[Any]:
    """Refuse a value that is there twice: what it stands for, as a seed's answers, would be made twice and counted as two."""
    if again := sorted({value for value in values if values.count(value) > 1}):
        raise InputError(f"{', '.join(map(str, again))} is there more than once; name each once")
    return values
