"""What is special about each model family, one row per family.

A family needs a row only if one of its models is named in a recipe, or if something outside its config has to be known
about it. What a config says by itself (scales and soft caps of logits, sliding windows, settings of single layers) is
read from the config where it is needed, for families with a row and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Facts about a model family. The defaults hold for a family without a row.

    Attributes:
        published: Config settings of published models, by hub id. With these, recipes that name the models can be
            planned without a network.
        transposed_if_quantized: Whether bitsandbytes stores the layers of the family the other way round than
            transformers does, so that weights read back from them are transposed.
        tied_head_absent_in_vllm: Whether vLLM has no head of its own to load weights into if the head is tied to the
            embedding. For other families it has one, and both must be sent for both to change.
        replaced_by_vllm_on_cpu: Whether vLLM's CPU build replaces the family's class in transformers, after which only
            vLLM's own models of the family work in the process.
    """

    published: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    transposed_if_quantized: bool = False
    tied_head_absent_in_vllm: bool = False
    replaced_by_vllm_on_cpu: bool = False


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": width,
    }


def _neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
    }


def _llama(
    width: int,
    layers: int,
    heads: tuple[int, int],
    inner: int,
    vocab: int,
    *,
    head_size: int | None = None,
    tied: bool = False,
    context: int = 4096,
) -> dict[str, Any]:
    """Settings of Llama and of families whose configs use the same names.

    Args:
        width: Size of the hidden states.
        layers: Number of decoder blocks.
        heads: Number of attention heads, and of key-value heads.
        inner: Width of the feed-forward layers.
        vocab: Rows of the embedding.
        head_size: Size of one attention head, if it is not `width` divided by the number of heads.
        tied: Whether the output head is the embedding.
        context: Number of positions.
    """
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_size or width // heads[0],
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
    }


_LLAMA_7B = _llama(4096, 32, (32, 32), 11008, 32000)
_LLAMA_13B = _llama(5120, 40, (40, 40), 13824, 32000)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        published={
            "openai-community/gpt2": _gpt2(768, 12, 12),
            "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
            "openai-community/gpt2-large": _gpt2(1280, 36, 20),
            "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
        },
        transposed_if_quantized=True,
    ),
    "opt": Family(
        published={
            "facebook/opt-1.3b": _opt(2048, 24, 32),
            "facebook/opt-2.7b": _opt(2560, 32, 32),
            "facebook/opt-6.7b": _opt(4096, 32, 32),
            "facebook/opt-13b": _opt(5120, 40, 40),
        },
    ),
    "llama": Family(
        published={
            "huggyllama/llama-7b": _LLAMA_7B,
            "huggyllama/llama-13b": _LLAMA_13B,
            "meta-llama/Llama-2-7b-hf": _LLAMA_7B,
            "meta-llama/Llama-2-13b-chat-hf": _LLAMA_13B,
            "meta-llama/Meta-Llama-3-8B": _llama(4096, 32, (32, 8), 14336, 128256, context=8192),
            "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 32, (32, 8), 14336, 128256, context=131072),
            "meta-llama/Llama-3.2-1B": _llama(2048, 16, (32, 8), 8192, 128256, tied=True, context=131072),
            "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 16, (32, 8), 8192, 128256, tied=True, context=131072),
            "meta-llama/Llama-3.2-3B": _llama(3072, 28, (24, 8), 8192, 128256, tied=True, context=131072),
            "meta-llama/Llama-3.2-3B-Instruct": _llama(3072, 28, (24, 8), 8192, 128256, tied=True, context=131072),
            "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 30, (9, 3), 1536, 49152, tied=True, context=8192),
            "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 32, (15, 5), 2560, 49152, tied=True, context=8192),
            "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(2048, 24, (32, 32), 8192, 49152, tied=True, context=8192),
        },
    ),
    "qwen2": Family(
        published={
            "Qwen/Qwen2.5-0.5B-Instruct": _llama(896, 24, (14, 2), 4864, 151936, tied=True, context=32768),
            "Qwen/Qwen2.5-1.5B-Instruct": _llama(1536, 28, (12, 2), 8960, 151936, tied=True, context=32768),
            "Qwen/Qwen2.5-3B-Instruct": _llama(2048, 36, (16, 2), 11008, 151936, tied=True, context=32768),
            "Qwen/Qwen2.5-7B-Instruct": _llama(3584, 28, (28, 4), 18944, 152064, context=32768),
            "Qwen/Qwen2.5-14B-Instruct": _llama(5120, 48, (40, 8), 13824, 152064, context=32768),
        },
    ),
    "qwen3": Family(
        published={
            "Qwen/Qwen3-0.6B": _llama(1024, 28, (16, 8), 3072, 151936, head_size=128, tied=True, context=40960),
            "Qwen/Qwen3-1.7B": _llama(2048, 28, (16, 8), 6144, 151936, head_size=128, tied=True, context=40960),
            "Qwen/Qwen3-4B": _llama(2560, 36, (32, 8), 9728, 151936, head_size=128, tied=True, context=40960),
            "Qwen/Qwen3-8B": _llama(4096, 36, (32, 8), 12288, 151936, head_size=128, context=40960),
            "Qwen/Qwen3-14B": _llama(5120, 40, (40, 8), 17408, 151936, head_size=128, context=40960),
        },
    ),
    "gpt_neox": Family(
        published={
            "EleutherAI/pythia-160m": _neox(768, 12, 12),
            "EleutherAI/pythia-410m": _neox(1024, 24, 16),
            "EleutherAI/pythia-1b": _neox(2048, 16, 8),
            "EleutherAI/pythia-2.8b": _neox(2560, 32, 32),
        },
        replaced_by_vllm_on_cpu=True,
    ),
    "glm": Family(
        published={
            "zai-org/glm-4-9b-hf": _llama(4096, 40, (32, 2), 13696, 151552, head_size=128, context=8192),
        },
    ),
    "gemma2": Family(
        published={
            "google/gemma-2-2b-it": _llama(2304, 26, (8, 4), 9216, 256000, head_size=256, tied=True, context=8192),
            "google/gemma-2-9b-it": _llama(3584, 42, (16, 8), 14336, 256000, head_size=256, tied=True, context=8192),
        },
        tied_head_absent_in_vllm=True,
    ),
    "gemma3_text": Family(
        published={
            "google/gemma-3-270m-it": _llama(640, 18, (4, 1), 2048, 262144, head_size=256, tied=True, context=32768),
            "google/gemma-3-1b-it": _llama(1152, 26, (4, 1), 6912, 262144, head_size=256, tied=True, context=32768),
        },
    ),
}
"""Every family that something has to be known about, by the `model_type` of its (text) config."""

KNOWN: dict[str, dict[str, Any]] = {
    name: {"model_type": model_type, **settings}
    for model_type, family in FAMILIES.items()
    for name, settings in family.published.items()
}
"""Config settings of all published models above, by hub id."""

NOT_ON_CPUS = frozenset(name for name, family in FAMILIES.items() if family.replaced_by_vllm_on_cpu)
"""Model types whose class vLLM's CPU build replaces in transformers."""


def family_of(config: Any) -> Family:
    """Return the facts about the family of a model.

    Args:
        config: Config of the model, or of its text model.

    Returns:
        The row of `FAMILIES`, or the defaults if there is none.
    """
    return FAMILIES.get(getattr(config, "model_type", None) or "", Family())


def trains_quantized(config: Any) -> bool:
    """Return whether a student of this config can train an adapter on layers that bitsandbytes has quantised.

    The layers of GPT-2 cannot: bitsandbytes stores them the other way round.
    """
    return not family_of(config).transposed_if_quantized
