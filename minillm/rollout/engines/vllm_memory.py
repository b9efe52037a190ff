"""What vLLM takes of memory to sample a model, by the model's config: one reckoning, for the engine and for the plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.models.configs import head_size
from minillm.models.families import NOT_ON_CPUS
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


# The sizes of attention heads that the CPU build has kernels for.
HEADS_ON_CPUS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def why_not_on_cpus(config: Any) -> str | None:
    """What keeps vLLM's CPU build from sampling a model of this text config, if anything does."""
    if config.model_type in NOT_ON_CPUS:
        return f"vLLM on a CPU changes the class of {config.model_type} in transformers"
    if (size := head_size(config)) not in HEADS_ON_CPUS:
        return f"vLLM on a CPU has no attention for heads of {size} (but for {', '.join(map(str, HEADS_ON_CPUS))})"
    return None


def cache_bytes(folder: str | Path, *, max_length: int, sequences: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of so many sequences of full length (at most: windows of attention are not seen)."""
    config: Any = AutoConfig.from_pretrained(folder).get_text_config()
    return cache_needed(config, max_length=max_length, sequences=sequences, itemsize=dtype.itemsize)


def engine_limits(max_length: int, sequences: int) -> dict[str, int]:
    """Sequences drawn from at once, and tokens read in one step: vLLM's defaults are sized for a GPU of its own."""
    gpu = torch.cuda.is_available()
    return {
        "max_num_seqs": sequences_at_once(sequences, gpu),
        "max_num_batched_tokens": max(8192 if gpu else 4096, max_length),
    }


def memory_settings(
    folder: str | Path, *, max_length: int, sequences: int, dtype: torch.dtype, memory: float | None
) -> dict[str, Any]:
    """vLLM's settings of its memory, from what it will hold.

    The cache of `sequences` at full length; on a CPU 4 GiB of it at most, on a GPU what nine tenths of the free memory
    leave beside the weights and vLLM's buffers.
    """
    needed = cache_bytes(folder, max_length=max_length, sequences=sequences, dtype=dtype)
    wanted = cache_wanted(needed, memory, gpu=torch.cuda.is_available())
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": wanted}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters() * dtype.itemsize
    buffers = buffer_bytes(config.get_text_config().vocab_size, sequences)
    share = min(wanted + weights + buffers, 0.9 * free)
    # The cache's size is said outright: measuring it, vLLM takes memory that another process gives back meanwhile for an error.
    return {
        "gpu_memory_utilization": round(share / total, 3),
        "kv_cache_memory_bytes": int(max(min(wanted, share - weights - buffers), LEAST_CACHE)),
    }
