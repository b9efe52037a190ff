"""Whether the long-term term does anything: its share of the gradient, and how much of it is signal."""

from __future__ import annotations

from minillm.loss.credit import SampledTokens
from minillm.loss.leave_one_out import Gather
from minillm.loss.signal import PARTS, GradientSketch, SketchSums
from minillm.train.log import Metrics


class SignalMonitor:
    """Measures every so many updates, and logs three shares.

    `long_term_share`: the squared norm of the expected gradient of the long-term term, as a multiple of that of the
    single-step term. `long_term_signal` and `single_step_signal`: the part of each term's squared gradient, in one
    update, that different responses agree on; the rest is noise. All are of the gradient of the head's weight, and
    estimates: over few responses they can lie below 0. The gradient is computed twice in the updates that are measured.

    Args:
        every: the number of updates from one measurement to the next; 0 for none.
        metrics: where the shares are logged.
    """

    def __init__(self, every: int, metrics: Metrics) -> None:
        self._every, self._metrics = every, metrics
        self._left = 0
        self._sums = SketchSums()

    def begin(self, update: int, micro_batches: int) -> None:
        """Note the micro-batches of an update, which may be measured."""
        self._left = micro_batches if self._every and update % self._every == 0 else 0
        self._sums = SketchSums()

    def sketch(self, tokens: SampledTokens) -> GradientSketch | None:
        """What measures a micro-batch; None if this update is not measured."""
        return GradientSketch(tokens.segments, len(tokens.lengths)) if self._left else None

    def add(self, sketch: GradientSketch | None) -> None:
        """Add a micro-batch. After the last one of an update every process must call this."""
        if sketch is None:
            return
        self._sums.add(sketch.sums())
        self._left -= 1
        if self._left == 0:
            self._log(self._metrics.gather)

    def _log(self, gather: Gather) -> None:
        everywhere = SketchSums()
        for sums in gather(self._sums):
            everywhere.add(sums)
        signal, norms = everywhere.signal()
        self._metrics.add_mean("long_term_share", float(signal[0]), float(signal[1]))
        for name, of_part, norm in zip(PARTS, signal, norms, strict=True):
            self._metrics.add_mean(f"{name}_signal", float(of_part), float(norm))
