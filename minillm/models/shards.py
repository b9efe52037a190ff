"""Weights that are sharded over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Whether every forward is a collective operation: FSDP in either form, and DeepSpeed ZeRO-3."""
    return isinstance(model, (FSDPModule, FullyShardedDataParallel)) or any(
        isinstance(p, DTensor) or _is_zero3(p) for p in model.parameters()
    )


def _is_zero3(value: Tensor) -> bool:
    return hasattr(value, "ds_id")  # a parameter of which ZeRO-3 left this process a part


@contextmanager
def gathered(values: Iterable[Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters gathered for as long as this lasts, which every process must take part in."""
    parts = [value for value in values if _is_zero3(value)]
    if not parts:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parts):
        yield


@torch.no_grad()
def full_tensor(value: Tensor) -> Tensor:
    if _is_zero3(value):
        with gathered([value]):
            return value.detach().clone()
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()
