"""Which rollouts and which text an update trains on, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minillm.data.batches import bucket
from minillm.data.rollouts import Rollout
from minillm.data.seeding import permutation
from minillm.data.text import TextBlocks
from minillm.errors import InputError
from minillm.rollout.config import RolloutConfig
from minillm.rollout.worker import Worker
from minillm.train.checks import update_size_fault


@dataclass
class MicroBatch:
    """What one forward and backward of one process trains on.

    Attributes:
        rollouts: indices into this process's rollouts of the batch.
        text: blocks of the packed text.
        count: the divisor of the losses of response tokens.
        text_count: the divisor of the losses of text tokens.
        first_use: whether this is the first update on the batch, so that the weights are those that sampled it.
    """

    rollouts: list[int]
    text: list[int]
    count: float
    text_count: float
    first_use: bool


@dataclass(frozen=True)
class UpdatePosition:
    """The position of an update among rollout batches and inner epochs.

    Attributes:
        batch: the number of its rollout batch.
        inner_epoch: the number of the pass over that batch.
        index: its number within the pass.
        first: whether it is the first update on the batch.
    """

    batch: int
    inner_epoch: int
    index: int
    first: bool


class BatchSchedule:
    """The order of updates. It follows from their numbers, so it is the same in every process and after a resume.

    Args:
        config: settings of the rollouts.
        micro_batch_size: responses in one forward of one process.
        accumulation: forwards of one process in an update.
        worker: this process, and the seed of the run; by default a single process.
        by_update: whether losses are divided by token counts of the whole update, rather than of each micro-batch.

    Raises:
        InputError: the rollouts of a batch do not fill whole updates.
    """

    def __init__(
        self,
        config: RolloutConfig,
        micro_batch_size: int,
        accumulation: int,
        *,
        worker: Worker | None = None,
        by_update: bool = True,
    ) -> None:
        self._config, self._micro_batch_size, self._by_update = config, micro_batch_size, by_update
        self._worker = worker or Worker()
        self._own_update_size = micro_batch_size * accumulation
        self.update_size = self._own_update_size * self._worker.processes
        """Responses of one update, over all processes."""
        if fault := update_size_fault(config, self.update_size, self._worker.processes):
            raise InputError(fault)

    @property
    def updates_per_batch(self) -> int:
        """Updates on one batch of rollouts, over all its inner epochs."""
        return self._updates_per_inner_epoch * self._config.inner_epochs

    @property
    def _updates_per_inner_epoch(self) -> int:
        return self._config.num_rollouts // self.update_size

    def updates_per_epoch(self, prompts: int) -> int:
        """Updates in one pass over training data with `prompts` prompts."""
        responses = prompts * self._config.samples_per_prompt
        return max(1, responses // self._config.num_rollouts) * self.updates_per_batch

    def position(self, update: int) -> UpdatePosition:
        """The position of update number `update`, counted from 0."""
        batch, within = divmod(update, self.updates_per_batch)
        inner_epoch, index = divmod(within, self._updates_per_inner_epoch)
        return UpdatePosition(batch, inner_epoch, index, first=within == 0)

    def micro_batches(
        self, update: int, rollouts: Sequence[Rollout], text: TextBlocks | None, total: Callable[[float], float]
    ) -> list[MicroBatch]:
        """The micro-batches of one update in this process.

        Args:
            update: the update's number, counted from 0.
            rollouts: this process's rollouts of the batch.
            text: packed text, of which the update reads as many blocks as it has responses.
            total: the sum of a number over all processes.
        """
        at = self.position(update)
        order = permutation(len(rollouts), self._worker.seed, "inner", at.batch, at.inner_epoch, self._worker.rank)
        chosen = order[at.index * self._own_update_size : (at.index + 1) * self._own_update_size]
        tokens = [len(rollouts[i].response_ids) for i in chosen]
        groups = self._groups([len(rollouts[i].prompt_ids) + len(rollouts[i].response_ids) for i in chosen])
        blocks = self._text_blocks(update, text, len(groups))
        text_tokens = [text.tokens(some) if text else 0 for some in blocks]
        if self._by_update:
            count, text_count = total(float(sum(tokens))), total(float(sum(text_tokens)))
            counts = [(count, text_count)] * len(groups)
        else:  # a mean in each micro-batch, then the mean of these
            share = len(groups) * self._worker.processes
            counts = [
                (share * float(sum(tokens[i] for i in group)), share * float(of_text))
                for group, of_text in zip(groups, text_tokens, strict=True)
            ]
        return [
            MicroBatch([chosen[i] for i in group], some, count, max(text_count, 1.0), at.first)
            for group, some, (count, text_count) in zip(groups, blocks, counts, strict=True)
        ]

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """The responses of each micro-batch, given the tokens of each response with its prompt."""
        size = self._micro_batch_size
        if self._by_update:
            return bucket(lengths, size)
        # Which responses are whitened together, and divided by one count, must not depend on their lengths.
        return [list(range(start, start + size)) for start in range(0, len(lengths), size)]

    def _text_blocks(self, update: int, text: TextBlocks | None, micro_batches: int) -> list[list[int]]:
        """This process's blocks of text for each micro-batch."""
        if not text:
            return [[] for _ in range(micro_batches)]
        blocks, size = text.of_update(update)[self._worker.rank :: self._worker.processes], self._micro_batch_size
        return [blocks[i * size : (i + 1) * size] for i in range(micro_batches)]
