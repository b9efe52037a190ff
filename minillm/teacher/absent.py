"""The absence of a teacher, for a trainer that reads none: its targets are on disk, or it has none."""

from __future__ import annotations

from collections.abc import Sequence

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.errors import InputError


class NoTeacher:
    """Stands in for a teacher that no model is loaded for."""

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> list[TeacherTargets]:
        """Refuse to score.

        Raises:
            InputError: in any case.
        """
        raise InputError("there is no teacher in this training, and something asked for its scores")

    def close(self) -> None:
        """Nothing has to be released."""


NO_TEACHER = NoTeacher()
"""Given to a trainer as its teacher, it loads none."""
