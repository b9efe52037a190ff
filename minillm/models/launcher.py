"""Environment variables that a launcher of several processes (accelerate launch, torchrun) sets."""

from __future__ import annotations

import os

_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_")


def environment_without_launcher() -> dict[str, str]:
    """Return a copy of this process's environment without the variables of the launcher.

    A child process that inherits them takes itself for one of the launched processes, and waits for the others.
    """
    return {name: value for name, value in os.environ.items() if name not in _NAMES and not name.startswith(_PREFIXES)}


def machines() -> int:
    """Return how many machines the processes that were launched together run on; 1 without a launcher.

    A launcher that does not say how many of them run on this machine is taken to have started all of them here.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    return max(world // max(int(os.environ.get("LOCAL_WORLD_SIZE", world)), 1), 1)
