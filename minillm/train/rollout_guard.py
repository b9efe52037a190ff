"""Refuses batches of rollouts that no student can be trained on, and tells of those that teach little."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.train.finite import listed
from minillm.train.mismatch import MismatchMonitor
from minillm.train.rollout_faults import ENGINE_ADVICE, Degenerate, LooksWrong, record, rollout_faults
from minillm.train.schedule import MicroBatch

if TYPE_CHECKING:
    from minillm.train.on_policy import MiniLLMTrainer

logger = logging.getLogger(__name__)


class RolloutGuard:
    """Watches the rollouts of one trainer, and names them.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: MiniLLMTrainer) -> None:
        self._trainer = trainer
        self._looks = LooksWrong(self._alarm)
        self._mismatch = MismatchMonitor(trainer.metrics, trainer.rollout_config.mismatch_limit, self._alarm)

    def _alarm(self, text: str) -> None:
        trainer = self._trainer
        trainer.journal.write("alarm", update=trainer.state.global_step + 1, what=text)
        logger.warning("update %d: %s", trainer.state.global_step + 1, text)

    def look(self, rollouts: Sequence[Rollout]) -> dict[str, tuple[float, float]]:
        """Look at the responses that were just sampled.

        Returns:
            Sums and counts of what is logged of them.
        """
        found = Degenerate.of(rollouts)
        self._looks.look(found)
        return found.means()

    def refuses(self, rollouts: Sequence[Rollout]) -> bool:
        """Refuse a scored batch that holds a rollout with a fault; see `rollout_faults`.

        Returns:
            Whether the batch is skipped.

        Raises:
            TrainingDiverged: By `Finite.on_fault`.
        """
        trainer = self._trainer
        found = rollout_faults(rollouts, trainer.source.others.sizes()[0], trainer.width)
        together: dict[str, list[Rollout]] = defaultdict(list)
        for place, fault in found.items():
            together[fault].append(rollouts[place])
        faults = [f"{fault} on {self.name_rows(some)}" for fault, some in together.items()]
        contents = [record(rollouts[i], i, trainer.student_tokenizer.decode) | {"fault": found[i]} for i in found]
        return trainer.refuse(faults, contents, ENGINE_ADVICE)

    def judge(self, sums: Mapping[str, Tensor], micro_batch: MicroBatch, *, fresh: bool) -> None:
        """Suspect a micro-batch whose scores are not finite, or are not those of its engine.

        Args:
            sums: The sums over its tokens that the loss has collected, such as those of importance weights.
            micro_batch: The micro-batch.
            fresh: Whether the weights that sampled it are those that scored it.
        """
        wrong = sorted(name for name, value in sums.items() if not math.isfinite(float(value)))
        fault = f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite" if wrong else None
        if fault is None and fresh:
            fault = self._mismatch.note(float(sums["log_ratio"]), float(sums["tokens"]))
        if fault:
            self._trainer.suspect(fault, micro_batch)

    def refuses_scores(self, pairs: Sequence[tuple[Rollout, Tensor]]) -> bool:
        """Refuse a batch whose log-probabilities by the engine are too far from those of the trainer.

        Args:
            pairs: Those that the current weights sampled, with the trainer's log q of each.

        Returns:
            Whether the batch is skipped.

        Raises:
            TrainingDiverged: By `Finite.on_fault`.
        """
        total = sum(float((logq - rollout.student_logprobs).abs().sum()) for rollout, logq in pairs)
        fault = self._mismatch.note(total, sum(len(logq) for _, logq in pairs)) if pairs else None
        decode = self._trainer.student_tokenizer.decode
        contents = [record(r, i, decode) | {"trainer_logprobs": logq} for i, (r, logq) in enumerate(pairs)]
        named = [f"{fault} on {self.name_rows([r for r, _ in pairs])}"] if fault else []
        return self._trainer.refuse(named, contents, ENGINE_ADVICE)

    def rows_of(self, micro_batch: MicroBatch) -> str:
        """The rows of the data that a micro-batch holds, in words."""
        trainer = self._trainer
        blocks = [trainer.text.pieces(block) for block in micro_batch.text] if trainer.text else []
        text = [f'text that begins "{trainer.student_tokenizer.decode(list(pieces[0][:12]))}"' for pieces in blocks]
        return " and ".join([self.name_rows([trainer.rollouts[i] for i in micro_batch.rollouts]), *text])

    def name_rows(self, rollouts: Sequence[Rollout]) -> str:
        """The rows of the data that rollouts belong to, in words."""
        prompts, given = self._trainer.source.rows_of(rollouts)
        kinds = (("train_dataset row", prompts), ("responses row", given))
        return " and ".join(listed(what, rows) for what, rows in kinds if rows)

    def contents_of(self, micro_batch: MicroBatch) -> list[dict[str, Any]]:
        """What a micro-batch holds, for the file of a refused update."""
        trainer = self._trainer
        found = [record(trainer.rollouts[i], i, trainer.student_tokenizer.decode) for i in micro_batch.rollouts]
        blocks = [trainer.text.pieces(block) for block in micro_batch.text] if trainer.text else []
        return found + [{"text_ids": [list(piece) for piece in pieces]} for pieces in blocks]
