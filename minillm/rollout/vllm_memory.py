"""What vLLM takes of memory to sample a model, by the model's config: one reckoning, for the engine and for the plan."""

from __future__ import annotations

from typing import Any

from minillm.models.shape import cached_bytes

GIB = 1 << 30
# On the CPU vLLM's blocks are 128 tokens by default; a resumed draft would prefill up to 127 of them again.
CPU_BLOCK = 32
_MOST_ON_CPU, LEAST_CACHE = 4 * GIB, GIB // 8
_BUFFERS = 2 * GIB  # vLLM's own, beside weights and cache
_SAMPLER_COPIES = 5  # float32 rows of logits that vLLM's sampler holds at once for every sequence it draws from


def sequences_at_once(sequences: int, gpu: bool) -> int:
    """Of so many sequences, those that are drawn from at the same time."""
    return min(max(sequences, 16 if gpu else 64), 256)


def cache_needed(config: Any, *, max_length: int, sequences: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many sequences of full length (at most: windows of attention are not seen).

    Args:
        config: of the text model.
        itemsize: bytes of one number.
    """
    blocks = sequences * (-(-max_length // CPU_BLOCK) + 1)  # whole ones, and one to grow into
    return cached_bytes(config, itemsize) * CPU_BLOCK * blocks


def cache_wanted(needed: int, memory: float | None, gpu: bool) -> int:
    """Bytes of cache that are asked for: what is needed, on a CPU 4 GiB of it at most; or the `memory` in GiB that a recipe says."""
    if memory is not None:
        return int(memory * GIB)
    return needed if gpu else max(min(needed, _MOST_ON_CPU), LEAST_CACHE)


def buffer_bytes(vocabulary: int, sequences: int) -> int:
    """What vLLM takes of a GPU beside weights and cache."""
    return _BUFFERS + _SAMPLER_COPIES * sequences_at_once(sequences, gpu=True) * vocabulary * 4
