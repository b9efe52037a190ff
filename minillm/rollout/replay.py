"""What a batch of rollouts holds besides those drawn for it: earlier ones (replay), and given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from minillm.data.rollouts import Rollout
from minillm.data.seeding import permutation
from minillm.rollout.config import RolloutConfig

_GIVEN_RESPONSE_VERSION = -1  # the weights' version of a given response


class OtherResponses:
    """Of one process of several; which ones a batch gets is a function of its number and of what was drawn before.

    Args:
        given: rows with `prompt_ids` and `response_ids`.
        eos_ids: tokens that end a response.
    """

    def __init__(
        self,
        config: RolloutConfig,
        given: Sequence[dict[str, Any]],
        eos_ids: Sequence[int],
        seed: int,
        rank: int,
        processes: int,
    ) -> None:
        self.earlier: list[Rollout] = []  # the oldest first
        self._config, self._given, self._eos_ids = config, given, eos_ids
        self._seed, self._rank, self._processes = seed, rank, processes
        self._size = config.num_rollouts // processes

    def sizes(self) -> tuple[int, int, int]:
        """Of this process's part of the next batch: drawn now, drawn earlier, given."""
        given = round((1 - self._config.on_policy) * self._size)
        earlier = min(round(self._config.replay * (self._size - given)), len(self.earlier))
        return self._size - given - earlier, earlier, given

    def of_batch(self, number: int, drawn: int) -> tuple[list[Rollout], list[Rollout]]:
        """Earlier rollouts and given responses that fill up batch `number` beside `drawn` new ones. The given ones lack log q."""
        if drawn == self._size:
            return [], []
        given = self.sizes()[2]
        again = permutation(len(self.earlier), self._seed, "replay", number, self._rank)[: self._size - drawn - given]
        first = (number * self._processes + self._rank) * given
        rows = [self._given[row] for row in (self._row_at(place) for place in range(first, first + given))]
        return [replace(self.earlier[i]) for i in again], [self._given_rollout(row) for row in rows]

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """For later batches, without what was scored."""
        if self._config.replay:
            bare = {"teacher_hidden": None, "teacher_logprobs": None, "teacher_rows": None, "reverse_kl": None}
            self.earlier += [replace(rollout, **bare) for rollout in rollouts]
            self.earlier = self.earlier[-max(self._config.replay_size // self._processes, 1) :]

    def given_rows(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Which rows of the given responses are among some rollouts."""
        found = [(r.prompt_ids, r.response_ids) for r in rollouts if r.weights_version == _GIVEN_RESPONSE_VERSION]
        return [
            i for i, row in enumerate(self._given if found else []) if (list(row["prompt_ids"]), list(row["response_ids"])) in found
        ]  # fmt: skip

    def _row_at(self, place: int) -> int:
        lap, at = divmod(place, len(self._given))
        return permutation(len(self._given), self._seed, "given", lap)[at]

    def _given_rollout(self, row: dict[str, Any]) -> Rollout:
        ids, none = list(row["response_ids"]), torch.zeros(0)
        return Rollout(list(row["prompt_ids"]), ids, none, none, _GIVEN_RESPONSE_VERSION, ids[-1] in self._eos_ids)
