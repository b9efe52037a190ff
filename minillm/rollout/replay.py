"""The part of a batch that is not sampled for it: earlier rollouts (replay) and given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from minillm.data.rollouts import Rollout
from minillm.data.seeding import ShuffledPasses, permutation
from minillm.rollout.config import RolloutConfig
from minillm.rollout.worker import Worker

_GIVEN_RESPONSE_VERSION = -1  # the weights version of a given response


class ReplayedAndGiven:
    """Replayed rollouts and given responses of one process.

    Which ones a batch gets is a function of its number and of what was sampled before.

    Args:
        config: settings of the rollouts.
        given: rows with `prompt_ids` and `response_ids`, and with `teacher` if they are routed.
        eos_ids: tokens that end a response.
        worker: this process, and the seed of the run.
        routed: whether there are several teachers, of which each row names its own.
    """

    def __init__(
        self,
        config: RolloutConfig,
        given: Sequence[dict[str, Any]],
        eos_ids: Sequence[int],
        worker: Worker,
        *,
        routed: bool = False,
    ) -> None:
        self.buffer: list[Rollout] = []
        """Rollouts that can be replayed, the oldest first."""
        self._config, self._given, self._eos_ids, self._worker = config, given, eos_ids, worker
        self._size, self._routed = config.num_rollouts // worker.processes, routed
        self._passes = ShuffledPasses(max(len(given), 1), worker.seed, "given")

    def sizes(self) -> tuple[int, int, int]:
        """This process's numbers of sampled, replayed and given responses in the next batch."""
        given = round((1 - self._config.on_policy) * self._size)
        replayed = min(round(self._config.replay * (self._size - given)), len(self.buffer))
        return self._size - given - replayed, replayed, given

    def complete(self, number: int, sampled: int) -> tuple[list[Rollout], list[Rollout]]:
        """Rollouts that complete a batch.

        Args:
            number: the batch's number.
            sampled: how many rollouts were sampled for it in this process.

        Returns:
            The replayed rollouts, and the given responses as rollouts without log q.
        """
        if sampled == self._size:
            return [], []
        given = self.sizes()[2]
        order = permutation(len(self.buffer), self._worker.seed, "replay", number, self._worker.rank)
        first = (number * self._worker.processes + self._worker.rank) * given
        rows = [self._passes[position] for position in range(first, first + given)]
        replayed = [replace(self.buffer[i]) for i in order[: self._size - sampled - given]]
        return replayed, [self._given_rollout(row) for row in rows]

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """Keep sampled rollouts for later batches, without the teacher's targets and KL(q‖p)."""
        if self._config.replay:
            self.buffer += [replace(rollout, teacher=None, reverse_kl=None) for rollout in rollouts]
            self.buffer = self.buffer[-max(self._config.replay_size // self._worker.processes, 1) :]

    def given_rows(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Row numbers of the given responses among some rollouts."""
        return sorted({r.row for r in rollouts if r.row is not None and self.is_given(r)})

    def is_given(self, rollout: Rollout) -> bool:
        """Whether a rollout is a given response."""
        return rollout.weights_version == _GIVEN_RESPONSE_VERSION

    def _given_rollout(self, number: int) -> Rollout:
        row = self._given[number]
        ids, none = list(row["response_ids"]), torch.zeros(0)
        rollout = Rollout(list(row["prompt_ids"]), ids, none, none, _GIVEN_RESPONSE_VERSION, ids[-1] in self._eos_ids)
        rollout.row, rollout.teacher_name = number, row["teacher"] if self._routed else None
        return rollout
