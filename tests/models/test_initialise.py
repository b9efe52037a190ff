"""Students with random weights: the class of another model, the size that is asked for, the teacher's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.glm import GlmConfig

from minillm.errors import InputError
from minillm.models.initialise import config_like, random_model
from minillm.models.shape import shape_like, shape_of

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip


def test_what_is_not_given_is_the_other_models() -> None:
    made = config_like(LLAMA, {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}, 100)
    assert (made.hidden_size, made.num_attention_heads, made.num_hidden_layers) == (48, 6, 2)
    assert made.head_dim == 8
    assert (made.num_key_value_heads, made.intermediate_size, made.tie_word_embeddings) == (2, 64, True)
    assert (made.vocab_size, made.max_position_embeddings) == (100, 128)
    assert LLAMA.hidden_size == 32
    model: Any = random_model(made, 0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model(torch.tensor([[1, 99]])).logits.shape == (1, 2, 100)


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_settings_of_single_layers_follow_their_number(layers: int) -> None:
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4}
    for config in (Gemma3TextConfig(**small, sliding_window=8), Qwen3Config(**small)):
        made = config_like(config, {"num_hidden_layers": layers}, 64)
        assert len(made.layer_types) == layers
        assert made.head_dim == 16
        assert random_model(made, 0)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)  # pyright: ignore


def test_the_size_of_heads_follows_where_a_family_has_a_default_of_its_own() -> None:
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    glm = GlmConfig(**small, num_key_value_heads=2, head_dim=32, num_hidden_layers=2, pad_token_id=0)  # pyright: ignore
    assert config_like(glm, {"hidden_size": 48}, 64).head_dim == 24
    assert config_like(glm, {"hidden_size": 48, "head_dim": 16}, 64).head_dim == 16


def test_names_of_a_family_and_the_common_ones_are_taken() -> None:
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    for shape in ({"n_embd": 48, "n_layer": 3}, {"hidden_size": 48, "num_hidden_layers": 3}):
        made = config_like(gpt2, shape, 70)
        assert (made.n_embd, made.n_layer, made.vocab_size) == (48, 3, 70)


def test_the_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(5)
    first, again, other = (random_model(LLAMA, seed) for seed in (0, 0, 1))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    name = "model.layers.0.mlp.up_proj.weight"
    one, two, three = (model.state_dict()[name] for model in (first, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert one.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hiden_size": 48}, "LlamaConfig has no hiden_size; did you mean hidden_size"),
        ({"vocab_size": 10}, "vocab_size is not set here: it is the teacher's"),
        ({"dtype": "float32"}, r"set student\.dtype"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"hidden_size": 50}, r"student\.shape: .*50.* multiple of"),
        ({"num_attention_heads": 3, "hidden_size": 48}, "no multiple of num_key_value_heads 2: set both"),
        ({"hidden_size": "wide"}, "student.shape: LlamaConfig: "),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_like(LLAMA, shape, 64)


def test_the_plan_sizes_what_is_made(pair: tuple[str, str]) -> None:
    found = shape_like(pair[1], {"num_hidden_layers": 2}, 32)
    assert found.parameters == shape_of(pair[0]).parameters
    assert found.layers == 2
