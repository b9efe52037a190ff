"""Parts that the losses share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from minillm.loss.config import DivergenceConfig
from minillm.loss.divergences import divergence_function
from minillm.loss.token_scores import Divergence, TokenScores

if TYPE_CHECKING:
    from jaxtyping import Float

_ALWAYS_SCORED = ("reverse_kl", "forward_kl")  # `token_scores` computes these in any case


@dataclass
class Tally:
    """Sums over tokens, from which the metrics of an update are computed.

    The sums of micro-batches and processes are added before they are divided by a number of tokens.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        """Add values, one per token, to the sums of these names."""
        for name, value in values.items():
            value = value.detach().double().sum()
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def single_step_score(divergence: DivergenceConfig, scores: TokenScores) -> tuple[str, Float[Tensor, " tokens"]]:
    """Return the values of a divergence, and the name of their field in `TokenScores` and `ScoreGradients`.

    Args:
        divergence: The divergence of the loss.
        scores: Scores from a call of `token_scores` with `extra_divergence(divergence)`. Against `SparseTargets` it is
            their cross-entropy, which has the gradient of the forward KL, or a divergence of `BY_WEIGHTS`.
    """
    if scores.target_cross_entropy is not None and scores.divergence is None:
        return "target_cross_entropy", scores.target_cross_entropy
    if divergence.name in _ALWAYS_SCORED:
        return divergence.name, getattr(scores, divergence.name)
    assert scores.divergence is not None
    return "divergence", scores.divergence


def extra_divergence(divergence: DivergenceConfig) -> Divergence | None:
    """Return the function that `token_scores` needs as `divergence`; None for the KL divergences it always computes."""
    return None if divergence.name in _ALWAYS_SCORED else divergence_function(divergence)
