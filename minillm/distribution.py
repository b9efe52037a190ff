"""How this library is installed: its name on the package index, its version, and the folders that it ships."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import minillm

DISTRIBUTION = "minillm-distill"
"""What `pip install` calls this library. The distribution called `minillm` is another author's."""

_LIBRARIES = ("torch", "transformers", "vllm", "accelerate", "peft", "trl")
_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
"""The folder that holds `recipes` and `eval`: the package where it was installed, and otherwise the checkout."""
RECIPES = ROOT / "recipes"
"""The recipes, with the prompts of the quickstart, accelerate's configs and the schemas."""


def install_command(extra: str) -> str:
    """The command that installs the library with an extra, for messages.

    Args:
        extra: a name of `project.optional-dependencies` in pyproject.toml, such as `vllm`.
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def shipped_path(name: str) -> str:
    """The path of a file that is shipped, as a command would write it.

    Args:
        name: its path in the checkout, such as `recipes/accelerate/one-gpu.yaml`.

    Returns:
        The path from the working directory if the file is below it, and the whole path otherwise.
    """
    path = ROOT / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def versions() -> dict[str, str]:
    """The versions of this library, of those that results depend on and of Python, without importing them.

    Returns:
        The version by name; `not installed` for one that is not there. vLLM's CPU build is a distribution of its own.
    """
    found = {"minillm": minillm.__version__}
    for name in _LIBRARIES:
        found[name] = "not installed"
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = version(distribution) + ("" if distribution == name else f" ({distribution})")
            except PackageNotFoundError:
                continue
            break
    return found | {"python": platform.python_version()}
