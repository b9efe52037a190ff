"""The protocol of every teacher, and the one place where its targets are attached to rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling


class Teacher(Protocol):
    """A frozen model, in this process or behind a server, that scores sampled responses."""

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> list[TeacherTargets]:
        """Score responses with the teacher.

        Args:
            rollouts: the responses; they are not changed.
            sampling: the temperature and the vocabulary of the log-probabilities.

        Returns:
            The targets of each response, in order.
        """
        ...

    def close(self) -> None:
        """Release connections; a teacher in this process has none."""
        ...


def score_missing(teacher: Teacher, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
    """Score the rollouts that have no teacher targets yet, and attach the targets to them."""
    missing = [rollout for rollout in rollouts if rollout.teacher is None]
    for rollout, targets in zip(missing, teacher.score(missing, sampling), strict=True):
        rollout.teacher = targets
