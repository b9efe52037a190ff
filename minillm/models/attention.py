"""Which implementation of attention a student trains with."""

from __future__ import annotations

from typing import Any

import torch

_LONGEST_EAGER = 384  # tokens of a row; beyond that, probabilities of all pairs of tokens take too much memory


def training_attention(device: str, dtype: torch.dtype, longest: int) -> str | None:
    """Choose the implementation of attention for training.

    The backward pass of PyTorch's fused attention is slow in bfloat16 on CPUs: it took 29 % of the forward and backward
    pass of a student of 135M (8 rows of 191 tokens, two cores with AMX), of whose operations it is 1 %, and
    transformers' `eager` attention took 17.3 s where it took 21.5. In float32 the fused attention is the faster one
    (6.1 against 7.5 s, two cores with AVX2; `eval/speed/body.py` measures both). On GPUs it always is.

    Args:
        device: Type of the device, such as `cpu`.
        dtype: Dtype that is computed in.
        longest: Tokens of the longest row.

    Returns:
        `eager`, or None for the implementation that transformers chooses.
    """
    return "eager" if device == "cpu" and dtype == torch.bfloat16 and longest <= _LONGEST_EAGER else None


def set_training_attention(model: Any, device: torch.device, dtype: torch.dtype, longest: int) -> None:
    """Give a model that transformers loaded with fused attention the implementation that training chooses.

    Args:
        model: The student, which is changed in place.
        device: Device that it trains on.
        dtype: Dtype that is computed in.
        longest: Tokens of the longest row.
    """
    chosen = training_attention(device.type, dtype, longest)
    if chosen is not None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(chosen)
