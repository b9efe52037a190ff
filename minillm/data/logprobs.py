"""The least log-probability that counts.

A model excludes a token by a logit of −inf, or by what stands for it: the least number of its dtype, −10,000, vLLM's −9999.
A divergence to it would be infinite, and its gradient not a number. Here no log-probability is below `LOG_ZERO`: a mass of e^−80
that the sum over a vocabulary does not see, and 80 nats for each unit of probability that one model gives to what the other excludes.
Gradients are those of log-probabilities without the floor, which are finite wherever the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minillm.data.sampling import Sampling

LOG_ZERO = -80.0


def floored_log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] of logits, none below `LOG_ZERO`; differentiable. 16-bit logits are taken to float32 first."""
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    return _Floored.apply(torch.log_softmax(wide, dim=-1))  # pyright: ignore[reportReturnType]


class _Floored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> Tensor:
        return logs.clamp(min=LOG_ZERO)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return upstream


def next_token_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [..., vocab_size], float32, of the distribution that tokens are drawn from."""
    return torch.log_softmax(logits[..., : sampling.vocab_size].float() / sampling.temperature, dim=-1)
