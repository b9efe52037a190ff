"""How much of a gradient is signal, from a sketch of each response's part of it.

The gradient of the head's weight is G = Σ_t g_tᵀ h_t, with g_t the gradient by the logits of token t and h_t its hidden
state. With random signs P [vocab, k] and Q [hidden, k], divided by √k, the sketch (P G Q) keeps squared norms and inner
products on average, at the cost of two narrow products per token. The sketches S_i of n responses give

    ‖Σ_i S_i‖² − Σ_i ‖S_i‖² = Σ_{i≠j} ⟨S_i, S_j⟩,

whose mean, times n/(n−1), is the squared norm of the batch's expected gradient: what different responses agree on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SIZE = 32
"""k: a sketch has k² numbers. Norms are then right to about 0.1, by the draw of the signs."""
_SEED = 20261129
PARTS = ("long_term", "single_step")


@dataclass
class SketchSums:
    """Sums over responses, of which processes and micro-batches add up.

    Attributes:
        total: for each of `PARTS`, the sum of the sketches, [2, k·k].
        squares: for each of `PARTS`, the sum of their squared norms, [2].
        responses: number of responses.
    """

    total: Float[Tensor, "2 sketch"] = field(default_factory=lambda: torch.zeros(2, SIZE * SIZE, dtype=torch.float64))
    squares: Float[Tensor, " 2"] = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    responses: int = 0

    def add(self, other: SketchSums) -> None:
        """Add the sums of other responses."""
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.responses += other.responses

    def signal(self) -> tuple[Float[Tensor, " 2"], Float[Tensor, " 2"]]:
        """Return, for each of `PARTS`, the estimated squared norm of the expected gradient, and that of the gradient.

        The first is unbiased but for the sketch, and below 0 where there is nothing but noise.
        """
        norms = self.total.square().sum(-1)
        return self.responses / max(self.responses - 1, 1) * (norms - self.squares), norms


class GradientSketch:
    """Sketches the gradients of one micro-batch, chunk by chunk.

    Args:
        segments: Index of the response that each sampled token belongs to; other tokens come after them.
        responses: Number of responses.
    """

    def __init__(self, segments: Int[Tensor, " tokens"], responses: int) -> None:
        self._segments, self._responses = segments, responses
        self._signs: tuple[Tensor, Tensor] | None = None
        self._sketches: Tensor | None = None

    def __call__(
        self,
        part: slice,
        states: Float[Tensor, "chunk hidden"],
        long_term: Float[Tensor, "chunk vocab"],
        whole: Float[Tensor, "chunk vocab"],
    ) -> None:
        """Add a chunk.

        Args:
            part: Positions of its tokens.
            states: Hidden states of the student.
            long_term: Gradient of the long-term term by the projections.
            whole: Gradient of the whole loss by the projections.
        """
        count = min(part.stop, len(self._segments)) - part.start
        if count <= 0:
            return
        if self._signs is None:
            generator = torch.Generator().manual_seed(_SEED)
            draw = lambda rows: torch.randint(2, (rows, SIZE), generator=generator) * 2 - 1  # noqa: E731
            signs = (draw(whole.shape[1]), draw(states.shape[1]))
            self._signs = (signs[0].to(whole) / SIZE**0.5, signs[1].to(states) / SIZE**0.5)
            self._sketches = torch.zeros(2, self._responses, SIZE * SIZE, dtype=torch.float32, device=whole.device)
        assert self._sketches is not None
        by_logits, by_states = self._signs
        right = (states[:count] @ by_states).float()
        for place, grad in enumerate((long_term, whole)):
            left = (grad[:count] @ by_logits).float()
            outer = (left[:, :, None] * right[:, None, :]).flatten(1)
            self._sketches[place].index_add_(0, self._segments[part.start : part.start + count], outer)

    def sums(self) -> SketchSums:
        """Return the sums of this micro-batch, on the CPU."""
        if self._sketches is None:
            return SketchSums()
        long_term, whole = self._sketches.double().cpu()
        parts = torch.stack([long_term, whole - long_term])
        return SketchSums(parts.sum(1), parts.square().sum((1, 2)), self._responses)
