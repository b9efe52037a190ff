"""Log-probabilities from logits, with a lower limit where a divergence needs one.

A model excludes a token by a logit of −∞, or by a number used instead: the lowest of its dtype, −10,000, or vLLM's −9999.
A divergence to it would be infinite, and its gradient not a number. `floored_log_softmax` therefore returns no
log-probability below `LOG_ZERO`. That is a probability of e^−80, too small to change a sum over a vocabulary, and costs 80
nats for each unit of probability that one model gives to a token that the other excludes. Gradients are those of the
log-probabilities without the limit, which are finite wherever the logits are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.data.sampling import Sampling

if TYPE_CHECKING:
    from jaxtyping import Float

LOG_ZERO = -80.0
"""Lowest log-probability, used for log 0."""


def floored_log_softmax(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Return log-probabilities of at least `LOG_ZERO`. The result is differentiable.

    Args:
        logits: Logits. Those of 16 bits are converted to float32 first.

    Returns:
        Log-probabilities, in the dtype of the logits or in float32.
    """
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    return _Floored.apply(torch.log_softmax(wide, dim=-1))  # pyright: ignore[reportReturnType]


class _Floored(torch.autograd.Function):
    """Clamps at `LOG_ZERO` in the forward pass and passes every gradient through."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> Tensor:
        return logs.clamp(min=LOG_ZERO)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return upstream


def next_token_logprobs(logits: Float[Tensor, "*batch vocab"], sampling: Sampling) -> Float[Tensor, "*batch vocab"]:
    """Return the log-probabilities of the distribution that tokens are sampled from.

    Args:
        logits: Logits of a model's whole output head.
        sampling: Gives the temperature, and the number of ids that can be sampled (`vocab_size`).

    Returns:
        Log-probabilities in float32 over the first `vocab_size` ids. No lower limit is applied.
    """
    return torch.log_softmax(logits[..., : sampling.vocab_size].float() / sampling.temperature, dim=-1)


def mixture_logprobs(
    student: Float[Tensor, "*batch"], teacher: Float[Tensor, "*batch"], alpha: float
) -> Float[Tensor, "*batch"]:
    """Return log((1 − α)·q + α·p), the log-probabilities of a mixture of student and teacher.

    Args:
        student: log q.
        teacher: log p of the same tokens.
        alpha: Share α of the teacher, from 0 to 1. At 0 `student` itself is returned, and at 1 `teacher`.

    Returns:
        Log-probabilities of the mixture, in the wider dtype of the two. Between 0 and 1 they are −∞ only where both are.
    """
    if alpha == 0:
        return student
    if alpha == 1:
        return teacher
    return torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
