"""Batches: what is predicted, what is padding, and documents that share a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from minillm.data.batches import pad, share_rows
from minillm.data.text import pack_text
from minillm.models.head import hidden_states, keeps_sequences_apart
from tests.conftest import tiny_llama


def test_padding_is_by_length_and_never_by_id() -> None:
    """Id 0 (the padding), and an end token inside the prompt, are tokens like others."""
    batch = pad([[5, 0, 1], [7]], [[0, 0, 1], [9]])
    assert batch.input_ids.tolist() == [[5, 0, 1, 0, 0, 1], [7, 9, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [2, 3, 4, 6]
    assert batch.targets.tolist() == [0, 0, 1, 9]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.position_ids is None


def test_sequences_that_share_a_row_count_from_zero() -> None:
    batch = pad([[5], [7], [8]], [[6], [1, 2], [3]], rows=[0, 0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2], [8, 3, 0, 0, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch.positions.tolist() == [0, 2, 3, 5]
    assert batch.targets.tolist() == [6, 1, 2, 3]


def test_sequences_share_rows_while_there_is_room() -> None:
    assert share_rows([3, 4, 2, 5, 1], 8) == [0, 0, 1, 1, 0]
    assert share_rows([8, 8], 8) == [0, 1]


def test_documents_fill_blocks_and_stay_apart() -> None:
    def packed(*given: Any, **options: Any) -> list[list[list[int]]]:
        return [[list(piece) for piece in block] for block in pack_text(*given, **options)]

    documents = [[1, 2], [3, 4, 5, 6], [7]]
    assert packed(documents, 5, eos=9) == [[[1, 2, 9], [3, 4]], [[5, 6, 9], [7, 9]]]
    assert packed(documents, 5, eos=9, several=False) == [[[1, 2, 9]], [[3, 4, 5, 6, 9]], [[7, 9]]]
    assert packed([[1, 2, 3]], 3, eos=9) == [[[1, 2, 3]]]  # an end token alone predicts nothing
    assert packed([[]], 4, eos=9) == []


def test_a_packed_row_gives_the_states_and_gradients_of_separate_ones() -> None:
    model = tiny_llama(0)
    prompts, responses = [[4], [5], [6, 7]], [[5, 6, 7], [9, 4], [8]]
    grads = []
    for rows in ([0, 1, 2], [0, 0, 1]):
        model.zero_grad()
        states = hidden_states(model, pad(prompts, responses, rows=rows))
        (states * torch.arange(states.numel()).reshape(states.shape).cos()).sum().backward()
        weight = dict(model.named_parameters())["model.layers.0.self_attn.k_proj.weight"].grad
        assert weight is not None
        grads.append((states.detach(), weight.clone()))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "initializer_range": 0.3,
}
FAMILIES: list[tuple[PreTrainedConfig, bool]] = [
    (LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2), True),
    (Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=32), True),
    (Gemma2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=32), True),
    (GPTNeoXConfig(**SMALL, intermediate_size=64), True),
    (GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=32, initializer_range=0.3), True),
    (OPTConfig(**{**SMALL, "init_std": 0.3}, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=32), False),
]


@pytest.mark.parametrize(("config", "apart"), FAMILIES, ids=[c.model_type for c, _ in FAMILIES])
def test_which_families_can_share_a_row(config: PreTrainedConfig, apart: bool) -> None:
    torch.manual_seed(0)
    assert keeps_sequences_apart(AutoModelForCausalLM.from_config(config)) is apart
