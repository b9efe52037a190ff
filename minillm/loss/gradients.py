"""The gradients by hidden states and head that a pass over chunks of tokens accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.models.head import Head, project_back


class Gradients:
    """The gradients that a call accumulates over its chunks. Each is None if it is not needed."""

    def __init__(self, hidden: Tensor, head: Head, width: int, needed: Sequence[bool], wide: torch.dtype) -> None:
        by_hidden, by_weight, by_bias = needed
        self.hidden = torch.empty_like(hidden, dtype=wide) if by_hidden else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if by_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if by_bias and head.bias is not None else None
        # The gradients have the size of the whole head, so that they need not be padded afterwards. The rows beyond the
        # vocabulary keep their zeros.
        self._used_weight = None if self.weight is None else self.weight[:width]
        self._used_bias = None if self.bias is None else self.bias[:width]
        self.needed = any(needed)

    def add(self, part: slice, grad: Tensor, states: Tensor, weight: Tensor, unit: Tensor | None) -> None:
        """Add the gradients of one chunk.

        Args:
            part: Positions of the chunk's tokens.
            grad: Gradient by the projections of the chunk [chunk, vocab], in multiples of `unit`.
            states: Hidden states of the chunk.
            weight: Weight of the head, without padding.
            unit: A scalar, or None for 1.
        """
        if self.hidden is not None:
            self.hidden[part] = scaled(project_back(grad, weight), unit)
        if self._used_weight is not None and unit is None and grad.dtype == self._used_weight.dtype:
            self._used_weight.addmm_(grad.t(), states)  # without a product beside the sum
        elif self._used_weight is not None:
            self._used_weight += scaled(grad.t() @ states, unit)
        if self._used_bias is not None:
            self._used_bias += scaled(grad.to(self._used_bias.dtype).sum(0), unit)


def scaled(value: Tensor, unit: Tensor | None) -> Tensor:
    """Return a value that is given in multiples of `unit`, a scalar, or None for 1."""
    return value if unit is None else value.to(unit.dtype) * unit
