"""Where the rollouts of a batch come from: sampled now or ahead of time, replayed, and given responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.data.seeding import ShuffledPasses, seed_of
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine
from minillm.rollout.replay import ReplayedAndGiven
from minillm.rollout.worker import Worker


@dataclass
class SampledBatch:
    """The rollouts that one process sampled for a batch.

    Attributes:
        rollouts: the rollouts.
        seconds: how long sampling took.
    """

    rollouts: list[Rollout]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """The number of response tokens."""
        return sum(len(rollout.response_ids) for rollout in self.rollouts)

    def means(self, update: int) -> dict[str, tuple[float, float]]:
        """Sums and counts of metrics of the responses, by name, for a batch that is trained on from `update` on."""
        rollouts, count = self.rollouts, len(self.rollouts)
        return {
            "response_length": (self.num_tokens, count),
            "finished": (sum(rollout.finished for rollout in rollouts), count),
            "version_lag": (sum(update - rollout.weights_version for rollout in rollouts), count),
        }

    def without_reverse_kl(self) -> SampledBatch:
        """Return the batch without the engine's KL(q‖p), for objectives that take that of the trainer."""
        return replace(self, rollouts=[replace(rollout, reverse_kl=None) for rollout in self.rollouts])


class RolloutSource:
    """Supplies the rollouts of each batch to one process.

    Args:
        config: settings of the rollouts.
        prompts: token ids of every prompt of the training data.
        others: replayed rollouts and given responses.
        teacher_of: returns the name of the teacher of a prompt's row, where there are several.
        score_given: returns log q of each token of given responses, under the student's current weights.
        worker: this process, and the seed of the run.
    """

    def __init__(
        self,
        config: RolloutConfig,
        prompts: Sequence[list[int]],
        others: ReplayedAndGiven,
        *,
        score_given: Callable[[Sequence[Rollout]], Sequence[Tensor]],
        worker: Worker,
        teacher_of: Callable[[int], str] | None = None,
    ) -> None:
        self.others, self.prompts, self._teacher_of = others, prompts, teacher_of
        self._config, self._score_given, self._worker = config, score_given, worker
        self._passes = ShuffledPasses(len(prompts), worker.seed, "prompts")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._ahead: tuple[int, Future[SampledBatch]] | None = None

    def prompt_rows(self, number: int) -> list[int]:
        """The rows of this process's prompts in batch `number`.

        Batches take the prompts one after another, in passes that each have a seeded order of their own.
        """
        samples = self._config.samples_per_prompt
        size = self._config.num_rollouts // samples
        rows = [
            self._passes[position] for position in range(number * size, (number + 1) * size) for _ in range(samples)
        ]
        return rows[self._worker.rank :: self._worker.processes]

    def sample(self, number: int, engine: Engine, sampling: Sampling) -> SampledBatch:
        """Sample the responses of batch `number` with the weights that the engine holds.

        This touches nothing but the engine, because it may run beside the updates.
        """
        rows = self.prompt_rows(number)[: self.others.sizes()[0]]
        # The position distinguishes a prompt that occurs twice in one batch.
        me = self._worker
        seeds = [seed_of(me.seed, number, me.rank + i * me.processes, row) for i, row in enumerate(rows)]
        start = time.perf_counter()
        rollouts = engine.generate([self.prompts[row] for row in rows], sampling, seeds)
        for rollout, row in zip(rollouts, rows, strict=True):
            rollout.row, rollout.teacher_name = row, None if self._teacher_of is None else self._teacher_of(row)
        return SampledBatch(rollouts, time.perf_counter() - start)

    def sample_ahead(self, number: int, engine: Engine, sampling: Sampling) -> None:
        """Start to sample batch `number` in the background."""
        self._ahead = number, self._background.submit(self.sample, number, engine, sampling)

    def take_ahead(self, number: int) -> Future[SampledBatch] | None:
        """Batch `number`, if it is being sampled or was sampled in the background."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == number else None

    def wait(self) -> None:
        """Wait until nothing is sampled in the background; an error of it is raised later, where its batch is taken."""
        if self._ahead is not None:
            self._ahead[1].exception()

    def complete(self, number: int, sampled: Sequence[Rollout]) -> list[Rollout]:
        """The whole batch: the sampled rollouts, replayed ones, and given responses with log q."""
        replayed, given = self.others.complete(number, len(sampled))
        for rollout, logq in zip(given, self._score_given(given), strict=True):
            rollout.student_logprobs = rollout.behaviour_logprobs = logq
        return [*sampled, *replayed, *given]

    def rows_of(self, rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
        """The rows that rollouts come from: of the training prompts, and of the given responses."""
        given = self.others.given_rows(rollouts)
        prompts = {r.row for r in rollouts if r.row is not None and not self.others.is_given(r)}
        return sorted(prompts), given

    def close(self) -> None:
        """Stop sampling in the background."""
        self._background.shutdown(wait=False, cancel_futures=True)
