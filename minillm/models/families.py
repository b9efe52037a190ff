"""Published dimensions of the models that the recipes name, so that they can be planned for without a network."""

from __future__ import annotations

from typing import Any


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 50257,
        "n_positions": 1024,
    }


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": width,
    }  # fmt: skip


def _blocks(
    kind: str, width: int, layers: int, heads: tuple[int, int], inner: int, vocab: int, *, size: int | None = None, tied: bool = False,
    context: int = 4096, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": size or width // heads[0], "intermediate_size": inner, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": context, **more,
    }  # fmt: skip


def _neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "vocab_size": 50304, "max_position_embeddings": 2048,
    }  # fmt: skip


_LLAMA_7B = _blocks("llama", 4096, 32, (32, 32), 11008, 32000)
_LLAMA_13B = _blocks("llama", 5120, 40, (40, 40), 13824, 32000)

KNOWN: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "huggyllama/llama-7b": _LLAMA_7B,
    "huggyllama/llama-13b": _LLAMA_13B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_7B,
    "meta-llama/Llama-2-13b-chat-hf": _LLAMA_13B,
    "meta-llama/Llama-3.1-8B-Instruct": _blocks("llama", 4096, 32, (32, 8), 14336, 128256, context=131072),
    "meta-llama/Llama-3.2-1B-Instruct": _blocks("llama", 2048, 16, (32, 8), 8192, 128256, tied=True, context=131072),
    "meta-llama/Llama-3.2-3B-Instruct": _blocks("llama", 3072, 28, (24, 8), 8192, 128256, tied=True, context=131072),
    "Qwen/Qwen2.5-0.5B-Instruct": _blocks("qwen2", 896, 24, (14, 2), 4864, 151936, tied=True, context=32768),
    "Qwen/Qwen2.5-1.5B-Instruct": _blocks("qwen2", 1536, 28, (12, 2), 8960, 151936, tied=True, context=32768),
    "Qwen/Qwen2.5-3B-Instruct": _blocks("qwen2", 2048, 36, (16, 2), 11008, 151936, tied=True, context=32768),
    "Qwen/Qwen2.5-7B-Instruct": _blocks("qwen2", 3584, 28, (28, 4), 18944, 152064, context=32768),
    "Qwen/Qwen2.5-14B-Instruct": _blocks("qwen2", 5120, 48, (40, 8), 13824, 152064, context=32768),
    "Qwen/Qwen3-0.6B": _blocks("qwen3", 1024, 28, (16, 8), 3072, 151936, size=128, tied=True, context=40960),
    "Qwen/Qwen3-1.7B": _blocks("qwen3", 2048, 28, (16, 8), 6144, 151936, size=128, tied=True, context=40960),
    "Qwen/Qwen3-4B": _blocks("qwen3", 2560, 36, (32, 8), 9728, 151936, size=128, tied=True, context=40960),
    "Qwen/Qwen3-8B": _blocks("qwen3", 4096, 36, (32, 8), 12288, 151936, size=128, context=40960),
    "Qwen/Qwen3-14B": _blocks("qwen3", 5120, 40, (40, 8), 17408, 151936, size=128, context=40960),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _blocks("llama", 576, 30, (9, 3), 1536, 49152, tied=True, context=8192),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _blocks("llama", 960, 32, (15, 5), 2560, 49152, tied=True, context=8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _blocks("llama", 2048, 24, (32, 32), 8192, 49152, tied=True, context=8192),
    "EleutherAI/pythia-160m": _neox(768, 12, 12),
    "EleutherAI/pythia-410m": _neox(1024, 24, 16),
    "EleutherAI/pythia-1b": _neox(2048, 16, 8),
    "EleutherAI/pythia-2.8b": _neox(2560, 32, 32),
    "google/gemma-2-2b-it": _blocks("gemma2", 2304, 26, (8, 4), 9216, 256000, size=256, tied=True, context=8192),
    "google/gemma-2-9b-it": _blocks("gemma2", 3584, 42, (16, 8), 14336, 256000, size=256, tied=True, context=8192),
    "google/gemma-3-270m-it": _blocks("gemma3_text", 640, 18, (4, 1), 2048, 262144, size=256, tied=True, context=32768),
    "google/gemma-3-1b-it": _blocks("gemma3_text", 1152, 26, (4, 1), 6912, 262144, size=256, tied=True, context=32768),
}
