"""The score of a word given that the response goes on, ∇log[q(y)/(1−h)], where h is the probability of the end tokens.

By the logits s_j, with h = Σ q_e over the end tokens e,

    d log(1−h)/ds_j = q_j h/(1−h)  for a word j,   −q_j  for an end token j.

The first line has the form of d log q(y), which `differentiate` knows, so a loss a·log q(y) + g·log(1−h) needs no other
kernel: it is differentiated with the factor a − g·h/(1−h) in place of a, and then the few columns in which that is
wrong, those of the token itself and of the end tokens, are computed anew. This holds for every implementation of
`differentiate`, and takes no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minillm.data.logprobs import LOG_ZERO
from minillm.loss.elementwise import Derivatives, Measures, Transforms
from minillm.models.head import LogitTransform

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_LEAST_REST = 1e-7  # of 1 − h where the token itself is an end token; float32 holds no smaller difference to 1


class ChunkLogits(NamedTuple):
    """The projections of a chunk and what is known about them: the first arguments of `differentiate`."""

    student: Float[Tensor, "chunk vocab"]
    teacher: Float[Tensor, "chunk vocab"]
    targets: Int[Tensor, " chunk"]
    measures: Measures
    transforms: Transforms


class EndTokens:
    """The tokens that end a response.

    Args:
        ids: Their ids. There may be several, or none.
        device: Device of the hidden states.
        wide: dtype of the computation.
    """

    def __init__(self, ids: Sequence[int], device: torch.device, wide: torch.dtype) -> None:
        self._ids = torch.tensor(sorted(set(ids)), dtype=torch.long, device=device)
        self._wide = wide

    def going_on(self, chunk: ChunkLogits) -> Float[Tensor, " chunk"]:
        """Return log(1−h), the log-probability that the response goes on."""
        index = self._ids.expand(len(chunk.targets), -1)
        logits = columns(chunk.transforms.student, chunk.student, index, self._wide)
        ends = (logits - chunk.measures.lse_q[:, None]).exp().sum(-1)
        rest = torch.log1p(-ends.clamp(max=1 - _LEAST_REST))
        # A word has at most the probability of all words, whatever the rounding of a probability near 1 says.
        is_end = torch.isin(chunk.targets, self._ids)
        return torch.where(is_end, rest, torch.maximum(rest, chunk.measures.logq))

    def differentiate(
        self,
        function: Callable[..., Tensor],
        chunk: ChunkLogits,
        derivatives: Derivatives,
        by_going_on: Float[Tensor, " chunk"],
        going_on: Float[Tensor, " chunk"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "chunk vocab"]:
        """Compute the gradient by the student's projections of a loss that contains g·log(1−h).

        Args:
            function: An implementation of `differentiate`.
            chunk: The chunk.
            derivatives: Derivatives of the loss by the other scores.
            by_going_on: g, the derivative by log(1−h).
            going_on: log(1−h).
            dtype: dtype of the result.
        """
        student, teacher, targets, measures, transforms = chunk
        a, r, f = (value[:, None] for value in derivatives)
        g, odds = by_going_on[:, None], torch.expm1(-going_on)[:, None]  # 1/(1−h) − 1
        shared = derivatives.logq - by_going_on * odds[:, 0]
        elsewhere = Derivatives(shared, derivatives.reverse_kl, derivatives.forward_kl)
        grad = function(student, teacher, targets, measures, elsewhere, transforms, self._wide, dtype)
        index = torch.cat([targets[:, None], self._ids.expand(len(targets), -1)], 1)
        s, z = (columns(t, x, index, self._wide) for t, x in zip(transforms, (student, teacher), strict=True))
        logq = (s - measures.lse_q[:, None]).clamp(min=LOG_ZERO)
        logp = (z - measures.lse_p[:, None]).clamp(min=LOG_ZERO)
        mass = torch.where(torch.isin(index, self._ids), a + g, a - g * odds)
        exact = logq.exp() * (r * (logq - logp - measures.reverse_kl[:, None]) + f - mass) - f * logp.exp()
        exact = exact + a * (index == targets[:, None])
        return grad.scatter_(1, index, (exact * transforms.student.slope(s)).to(dtype))


def columns(
    transform: LogitTransform,
    projected: Float[Tensor, "chunk vocab"],
    index: Int[Tensor, "chunk some"],
    wide: torch.dtype,
) -> Float[Tensor, "chunk some"]:
    """Return the logits of some tokens at each position."""
    bias = None if transform.bias is None else transform.bias[index]
    some = LogitTransform(bias, transform.scale, transform.softcap, transform.temperature)
    return some.logits(projected.gather(1, index), wide)
