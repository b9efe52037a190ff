"""The cross-entropy to a few weighted tokens, −Σ w log q, and its gradient.

By the logits, with W = Σ w, it is W·q − w: in all columns but those of the weighted tokens the form of −W·d log q(y).
So `differentiate` does the work with another factor of log q(y), and a few columns are computed anew, as in
`minillm.loss.words`. No teacher is read and no logits of one are computed. A hard label that joins in is the derivative
by log q(y) that every loss has, so a mixture of both costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.data.rollouts import SparseTargets
from minillm.errors import InputError
from minillm.loss.config import NOT_LINEAR
from minillm.loss.divergences import gradient_is_linear_in_p
from minillm.loss.elementwise import Derivatives
from minillm.loss.scores import ScoreGradients
from minillm.loss.words import ChunkLogits, columns

if TYPE_CHECKING:
    from jaxtyping import Float

_REFUSED = ("reverse_kl", "forward_kl", "text_forward_kl", "going_on")


class SparseScorer:
    """Scores against `SparseTargets`.

    Args:
        targets: Weights of a few tokens at each position.
        wide: dtype of the computation.
    """

    def __init__(self, targets: SparseTargets, wide: torch.dtype) -> None:
        self._ids, self._weights, self._wide = targets.ids, targets.weights.to(wide), wide

    @classmethod
    def of(
        cls, teacher: Any, num_tokens: int, divergence: Callable[[Tensor, Tensor], Tensor] | None, wide: torch.dtype
    ) -> SparseScorer | None:
        """Return the scorer of a teacher that is given as `SparseTargets`, and None for any other.

        Args:
            teacher: The teacher of `token_scores`.
            num_tokens: Number of tokens that are scored.
            divergence: The additional divergence that is asked for.
            wide: dtype of the computation.

        Raises:
            InputError: The divergence is one that they cannot give, or they are of another number of tokens.
        """
        if not isinstance(teacher, SparseTargets):
            return None
        if divergence is not None and not gradient_is_linear_in_p(divergence):
            raise InputError(NOT_LINEAR)
        if len(teacher.ids) != num_tokens or teacher.ids.shape != teacher.weights.shape:
            raise InputError(
                f"SparseTargets: ids {list(teacher.ids.shape)} and weights {list(teacher.weights.shape)} for "
                f"{num_tokens} tokens"
            )
        return cls(teacher, wide)

    def cross_entropy(self, part: slice, chunk: ChunkLogits) -> Float[Tensor, " chunk"]:
        """Return −Σ w log q at each position of a chunk."""
        logits = columns(chunk.transforms.student, chunk.student, self._ids[part], self._wide)
        logq = (logits - chunk.measures.lse_q[:, None]).clamp(min=LOG_ZERO)
        return -(self._weights[part] * logq).sum(-1)

    def logits(self, part: slice, width: int) -> Float[Tensor, "chunk vocab"]:
        """Return logits whose softmax is the weights at each position of a chunk, for a function of whole logits."""
        weights = self._weights[part]
        return weights.new_zeros(len(weights), width).scatter_add(1, self._ids[part], weights).log()

    def derivative(self, given: ScoreGradients, by_score: dict[str, Tensor]) -> Float[Tensor, " chunk"]:
        """Return the derivative by −Σ w log q, if the loss reads no score that these targets cannot give.

        Raises:
            InputError: It reads one.
        """
        if any(getattr(given, name) is not None for name in _REFUSED):
            raise InputError(NOT_LINEAR)
        return by_score["target_cross_entropy"]

    def differentiate(
        self,
        function: Callable[..., Tensor],
        part: slice,
        chunk: ChunkLogits,
        derivatives: Derivatives,
        by_target: Float[Tensor, " chunk"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "chunk vocab"]:
        """Compute the gradient by the student's projections of a·log q(y) + c·(−Σ w log q).

        Args:
            function: An implementation of `differentiate`.
            part: Positions of the chunk's tokens.
            chunk: The chunk.
            derivatives: Of these a, the derivative by log q(y), is read.
            by_target: c.
            dtype: dtype of the result.
        """
        student, teacher, targets, measures, transforms = chunk
        weights, a = self._weights[part], derivatives.logq
        factor = by_target * weights.sum(-1) - a  # of q, in every column
        elsewhere = derivatives._replace(logq=-factor)
        grad = function(student, teacher, targets, measures, elsewhere, transforms, self._wide, dtype)
        index = torch.cat([targets[:, None], self._ids[part]], 1)
        logits = columns(transforms.student, student, index, self._wide)
        q = (logits - measures.lse_q[:, None]).clamp(min=LOG_ZERO).exp()
        slope = transforms.student.slope(logits)
        # A token may be in several slots: each writes the same share of q, and then adds what is its own.
        grad.scatter_(1, index, (q * factor[:, None] * slope).to(dtype))
        own = torch.cat([a[:, None], -by_target[:, None] * weights], 1)
        return grad.scatter_add_(1, index, (own * slope).to(dtype))
