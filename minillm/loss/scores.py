"""The scores of tokens, and the derivatives of a loss by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class TokenScores:
    """Scores of N response tokens, in float32 (float64 for float64 states) and without gradient.

    Without a teacher `logp` equals `logq`, and both KL divergences are zero. No log-probability is below `LOG_ZERO`.

    Attributes:
        logq: log q(y), the student's log-probability of the token itself.
        logp: log p(y), the teacher's log-probability of the token itself.
        reverse_kl: KL(q‖p) of the next-token distributions.
        forward_kl: KL(p‖q) of the next-token distributions.
        entropy: Entropy of q.
        divergence: Values of the additional divergence, if `token_scores` was given one.
        text_logq: log q(y) at the temperature of text. Equal to `logq` if the temperatures are the same.
        text_forward_kl: KL(p‖q) at the temperature of text. Equal to `forward_kl` if the temperatures are the same.
        going_on: log(1 − q(end)), the log-probability that the token is no end token, if there are `end_ids`.
        target_cross_entropy: −Σ w log q over the tokens of `SparseTargets`, if they are the teacher.
    """

    logq: Float[Tensor, " tokens"]
    logp: Float[Tensor, " tokens"]
    reverse_kl: Float[Tensor, " tokens"]
    forward_kl: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    divergence: Float[Tensor, " tokens"] | None = None
    text_logq: Float[Tensor, " tokens"] = None  # pyright: ignore[reportAssignmentType]
    text_forward_kl: Float[Tensor, " tokens"] = None  # pyright: ignore[reportAssignmentType]
    going_on: Float[Tensor, " tokens"] | None = None
    target_cross_entropy: Float[Tensor, " tokens"] | None = None

    def __post_init__(self) -> None:
        if self.text_logq is None:
            self.text_logq, self.text_forward_kl = self.logq, self.forward_kl


@dataclass
class ScoreGradients:
    """Derivatives of the loss by each field of `TokenScores` of the same name. None means zero."""

    logq: Float[Tensor, " tokens"] | None = None
    reverse_kl: Float[Tensor, " tokens"] | None = None
    forward_kl: Float[Tensor, " tokens"] | None = None
    divergence: Float[Tensor, " tokens"] | None = None
    text_logq: Float[Tensor, " tokens"] | None = None
    text_forward_kl: Float[Tensor, " tokens"] | None = None
    going_on: Float[Tensor, " tokens"] | None = None
    target_cross_entropy: Float[Tensor, " tokens"] | None = None
