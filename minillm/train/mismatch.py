"""How far an engine's log-probabilities are from the trainer's."""

from __future__ import annotations

from collections.abc import Callable

from minillm.train.log import Metrics

# In nats per token. bfloat16 engines differ from the trainer by some hundredths; an engine that differs this much
# samples from a different model than the one that is trained.
_ALARM = 0.3


class MismatchMonitor:
    """Logs the mismatch, raises an alarm once if it is too large to train well on, and tells where none should train.

    Args:
        metrics: where the mismatch is logged, as `engine_mismatch`.
        limit: nats per token above which an update is refused.
        alarm: is called with the alarm, in words.
    """

    def __init__(self, metrics: Metrics, limit: float, alarm: Callable[[str], None]) -> None:
        self._metrics, self._limit, self._alarm, self._alarmed = metrics, limit, alarm, False

    def note(self, total: float, tokens: float) -> str | None:
        """Add the sum of |log q(engine) − log q(trainer)| over `tokens` tokens, both with the same weights.

        Returns:
            The fault, in words, if the mean is above the limit.
        """
        self._metrics.add_mean("engine_mismatch", total, tokens)
        told = f"log q of the sampled tokens differs by {total / max(tokens, 1):.2f} nats per token between the "
        if total > self._limit * tokens:
            return f"{told}sampling engine and the trainer (rollout.mismatch_limit: {self._limit:g})"
        if total > _ALARM * tokens and not self._alarmed:
            self._alarmed = True
            self._alarm(
                f"{told}sampling engine and the trainer, which hold the same weights: importance weights are off by as "
                "much. Have both compute in one dtype, or set objective.old_logprobs: trainer."
            )
        return None
