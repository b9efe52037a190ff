"""Reads weights that are sharded over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Return whether every forward pass is a collective operation, as with FSDP (1 or 2) and DeepSpeed ZeRO-3."""
    return isinstance(model, (FSDPModule, FullyShardedDataParallel)) or any(
        isinstance(p, DTensor) or _is_zero3(p) for p in model.parameters()
    )


def _is_zero3(value: Tensor) -> bool:
    return hasattr(value, "ds_id")  # set on a parameter of which this process holds only a part


@contextmanager
def gathered(values: Iterable[Tensor]) -> Iterator[None]:
    """Gather ZeRO-3 parameters inside the context. Every process must enter it.

    Args:
        values: Parameters. Those that ZeRO-3 has not sharded are left alone.
    """
    parts = [value for value in values if _is_zero3(value)]
    if not parts:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parts):
        yield


@torch.no_grad()
def full_tensor(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a complete weight, gathered from all processes if it is sharded. Every process must then call this.

    Args:
        value: A weight, or this process's shard of it.
        dtype: Dtype of the result; by default that of the weight. Shards of FSDP2 are cast before they are gathered, so
            that no process sends numbers wider than the result. ZeRO-3 gathers in its own dtype.
    """
    wanted = value.dtype if dtype is None else dtype
    if _is_zero3(value):
        with gathered([value]):
            return value.detach().to(wanted, copy=True)
    cast = value.detach().to(wanted)
    return cast.full_tensor() if isinstance(cast, DTensor) else cast
