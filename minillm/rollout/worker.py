"""The place of one training process among several."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Worker:
    """One training process.

    Attributes:
        seed: the seed of the run, the same in every process.
        rank: the index of this process.
        processes: the number of processes.
    """

    seed: int = 0
    rank: int = 0
    processes: int = 1
