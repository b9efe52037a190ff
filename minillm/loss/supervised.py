"""The loss on given responses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from minillm.loss.config import DivergenceConfig
from minillm.loss.terms import Tally, single_step_score
from minillm.loss.token_scores import ScoreGradients, TokenScores


class SupervisedLoss:
    """The `loss_fn` of `token_scores` for given responses: λ·CE + (1−λ)·D per token.

    CE is the cross-entropy −log q(y) at the temperature of text, and D a divergence between student and teacher. With
    D = KL(p‖q) this is the word-level distillation of the paper.

    Args:
        cross_entropy: λ, from 0 to 1. With 1 no teacher is needed.
        count: Number of tokens that the sum is divided by.
        divergence: D. Defaults to the forward KL.

    Attributes:
        tally: Sums for the metrics, complete when all chunks have been scored.
    """

    def __init__(self, cross_entropy: float, count: float | Tensor, divergence: DivergenceConfig | None = None) -> None:
        self._share, self._count = cross_entropy, count
        self._divergence = divergence or DivergenceConfig(name="forward_kl")
        self.tally = Tally()

    def __call__(self, part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        """Return the loss of a chunk and its derivatives by the scores; see `LossFn`."""
        ones = torch.ones_like(scores.logq) / self._count
        if self._share == 1:  # fine-tuning, possibly without a teacher
            self.tally.add(tokens=torch.ones_like(ones), cross_entropy=-scores.text_logq, entropy=scores.entropy)
            return (ones * -scores.text_logq).sum(), ScoreGradients(text_logq=-ones)
        field, value = single_step_score(self._divergence, scores)
        loss = ones * (self._share * -scores.text_logq + (1 - self._share) * value)
        if field not in ("forward_kl", "reverse_kl"):
            self.tally.add(**{field: value})
        if scores.target_cross_entropy is None:  # weights of some tokens do not say what the divergences are
            self.tally.add(forward_kl=scores.forward_kl, reverse_kl=scores.reverse_kl)
        elif field == "divergence":
            self.tally.add(target_cross_entropy=scores.target_cross_entropy)
        self.tally.add(tokens=torch.ones_like(ones), cross_entropy=-scores.text_logq, entropy=scores.entropy)
        return loss.sum(), replace(ScoreGradients(text_logq=-ones * self._share), **{field: ones * (1 - self._share)})
