"""How far an engine's log-probabilities are from the trainer's."""

from __future__ import annotations

import logging

from minillm.train.log import Metrics

logger = logging.getLogger(__name__)

# In nats per token. bfloat16 engines differ from the trainer by some hundredths; an engine that differs this much
# samples from a different model than the one that is trained.
_ALARM = 0.3


class MismatchMonitor:
    """Logs the mismatch, and warns once if it is too large to train on.

    Args:
        metrics: where the mismatch is logged, as `engine_mismatch`.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._alarmed = metrics, False

    def note(self, total: float, tokens: float) -> None:
        """Add the sum of |log q(engine) − log q(trainer)| over `tokens` tokens, both with the same weights."""
        self._metrics.add_mean("engine_mismatch", total, tokens)
        if total > _ALARM * tokens and not self._alarmed:
            self._alarmed = True
            logger.warning(
                "log q of the sampled tokens differs by %.2f nats per token between the sampling engine and the "
                "trainer, which hold the same weights: importance weights are off by as much. Have both compute in one "
                "dtype, or set objective.old_logprobs: trainer.",
                total / tokens,
            )
