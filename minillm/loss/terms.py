"""Terms that losses share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from minillm.loss.config import DivergenceConfig
from minillm.loss.divergences import named
from minillm.loss.token_scores import Divergence, TokenScores


@dataclass
class Tally:
    """Sums over tokens, for the metrics of an update; add them over micro-batches and processes, then divide."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().double().sum()
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def single_step_score(divergence: DivergenceConfig, scores: TokenScores) -> tuple[str, Tensor]:
    """The divergence among a token's scores, and the field of `ScoreGradients` that it is weighed by.

    The two KLs are there in any case; another kind is what `token_scores` was given as `divergence`.
    """
    if divergence.name in ("reverse_kl", "forward_kl"):
        return divergence.name, getattr(scores, divergence.name)
    assert scores.divergence is not None
    return "divergence", scores.divergence


def extra_divergence(divergence: DivergenceConfig) -> Divergence | None:
    """What `token_scores` must be given for `single_step_score`."""
    return None if divergence.name in ("reverse_kl", "forward_kl") else named(divergence)
