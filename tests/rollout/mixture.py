"""Pairs of tiny models, their mixture by enumeration, and the χ² statistic of samples from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minillm.data.sampling import Sampling
from tests.conftest import tiny_llama

V, LENGTH, EOS = 5, 3, 1
SAMPLING = Sampling(LENGTH, (EOS,), V, temperature=1.3)
PROMPT = [2, 4, 3]


def distribution(model: Any, prefix: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1, :V]
    return torch.softmax(logits.double() / SAMPLING.temperature, -1)


def enumerate_mixture(student: Any, teacher: Any, alpha: float) -> dict[tuple[int, ...], float]:
    """The probability of every response to `PROMPT`."""
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    done = {}
    for _ in range(LENGTH):
        longer = {}
        for prefix, mass in probability.items():
            mix = (1 - alpha) * distribution(student, prefix) + alpha * distribution(teacher, prefix)
            for token in range(V):
                (done if token == EOS else longer)[(*prefix, token)] = mass * float(mix[token])
        probability = longer
    return {**done, **probability}


def chi_square(counts: Counter, expected: dict[tuple[int, ...], float], n: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom. Responses that are expected fewer than five times count as one."""
    pooled, statistic, cells = [0.0, 0.0], 0.0, 0
    for key, p in expected.items():
        if p * n < 5:
            pooled[0] += counts[key]
            pooled[1] += p * n
        else:
            statistic += (counts[key] - p * n) ** 2 / (p * n)
            cells += 1
    if pooled[1] > 0:
        statistic += (pooled[0] - pooled[1]) ** 2 / pooled[1]
        cells += 1
    return statistic, cells - 1


def fits(counts: Counter, expected: dict[tuple[int, ...], float], n: int) -> bool:
    """Whether the statistic lies within four standard deviations of its mean."""
    statistic, freedom = chi_square(counts, expected, n)
    return statistic < freedom + 4 * (2 * freedom) ** 0.5


def gemma(seed: int) -> Any:
    """A model with a sliding window of four tokens in every other layer, and soft caps."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=4, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


SHARED: dict[str, Any] = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.3}


def wide_llama() -> Any:
    """Another width, grouped keys, a head of its own, and more rows in it."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=9, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, **SHARED,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def qwen2() -> Any:
    """Biases, and heads of 64 instead of 32."""
    torch.manual_seed(6)
    config = Qwen2Config(
        vocab_size=8, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, **SHARED,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gpt2() -> Any:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=8, n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4, eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama() -> Any:
    return tiny_llama(3, layers=1, vocab=8, scale=0.4)


PAIRS = {
    "llama from a wider llama": (llama, wide_llama),
    "llama from qwen2": (llama, qwen2),
    "gpt2 from llama": (gpt2, llama),
    "llama from gpt2": (llama, gpt2),
    "llama from gemma2": (llama, lambda: gemma(5)),
}
