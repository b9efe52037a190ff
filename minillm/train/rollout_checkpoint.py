"""The rollouts in a checkpoint of on-policy training: one file per process, beside the trainer's own files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minillm.data.rollouts import Rollout
from minillm.errors import EngineError, InputError

_FILE = "rollouts-{rank}.pt"


@dataclass
class RolloutCheckpoint:
    """What one process needs to continue on-policy training.

    Attributes:
        number: the number of the current batch of rollouts.
        rollouts: this process's rollouts of that batch; empty between two batches.
        replay: this process's rollouts that can be replayed.
        credit: what the batches before leave to the batch that comes next, or that is unfinished (`BatchCredit.state`);
            empty in checkpoints of earlier versions.
    """

    number: int
    rollouts: list[Rollout]
    replay: list[Rollout]
    credit: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, rank: int, processes: int) -> None:
        """Write this process's file. The teacher's targets are left out; the teacher scores again after a resume.

        Args:
            folder: the checkpoint, which machines may have on a disk of their own.
            rank: the index of this process.
            processes: the number of processes.
        """
        saved = {
            "processes": processes,
            "number": self.number,
            "rollouts": [rollout.to_saved() for rollout in self.rollouts],
            "earlier": [rollout.to_saved() for rollout in self.replay],
            "credit": self.credit,
        }
        torch.save(saved, folder / _FILE.format(rank=rank))

    @classmethod
    def load(cls, folder: Path, rank: int, processes: int) -> RolloutCheckpoint | None:
        """Read this process's file, or process 0's if the run now has more processes.

        Args:
            folder: the checkpoint.
            rank: the index of this process.
            processes: the number of processes.

        Returns:
            The state, or None if the checkpoint has no such files.

        Raises:
            InputError: the checkpoint was saved within a batch of rollouts, by another number of processes; or what
                this process saved is not in it.
        """
        files, own = sorted(folder.glob(_FILE.format(rank="*"))), folder / _FILE.format(rank=rank)
        if not files:
            return None
        saved = torch.load(own if own in files else files[0], weights_only=True)
        writers = saved.get("processes", len(files))  # earlier versions did not say how many they were
        if saved["rollouts"] and writers != processes:
            raise InputError(
                f"{folder}: {writers} process(es) saved this checkpoint within a batch of rollouts; "
                f"resume with as many processes, not {processes}"
            )
        if saved["rollouts"] and own not in files:
            raise InputError(
                f"{folder}: {own.name} is not there: every process goes on with the rollouts that it saved; give each "
                "machine the rank that it had, or save on a file system that all of them share"
            )
        rollouts, replay = ([Rollout.from_saved(fields) for fields in saved[key]] for key in ("rollouts", "earlier"))
        return cls(saved["number"], rollouts, replay, saved.get("credit", {}))


@contextmanager
def saved_on_engine_error(total: Callable[[float], float], save: Callable[[], None]) -> Iterator[None]:
    """If any process loses its engine in the body of the `with` statement, save in all processes, then raise in all.

    Args:
        total: sums a number over all processes.
        save: saves a checkpoint.

    Raises:
        EngineError: a process lost its engine.
    """
    lost: EngineError | None = None
    try:
        yield
    except EngineError as error:
        lost = error
    if total(float(lost is not None)):
        save()
        raise lost or EngineError("another process lost its engine; the error is in its output")
