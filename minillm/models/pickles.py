"""Weights that are stored as a pickle are refused, unless they are asked for.

A pickle is a program that makes the objects, and safetensors hold numbers alone. PyTorch reads weights with a
restricted reader (`weights_only`), in which faults have been found before.
"""

from __future__ import annotations

import os
from pathlib import Path

from minillm.errors import InputError

ENVIRONMENT = "MINILLM_ALLOW_PICKLE"
_allowed: set[str] = set()


def allow_pickle(source: str) -> None:
    """Let the weights, or the adapter, of a source be read from a pickle in this process."""
    _allowed.add(source)


def pickle_is_allowed(source: str) -> bool:
    """Whether a source may be read from a pickle: by its recipe, or by `MINILLM_ALLOW_PICKLE=1` where there is none."""
    return source in _allowed or os.environ.get(ENVIRONMENT) == "1"


def check_no_pickle(source: str, file: Path) -> None:
    """Refuse a file of weights that is a pickle.

    Raises:
        InputError: It is one, and was not asked for.
    """
    if ".bin" in file.suffixes and not pickle_is_allowed(source):
        raise InputError(
            f"{file}: these weights are a pickle, which is a program, and not safetensors. If you trust whoever made "
            f"them, set allow_pickle: true beside the model's source in the recipe, or {ENVIRONMENT}=1 where there is "
            "no recipe"
        )
