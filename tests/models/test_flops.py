"""The operations that formulas count are those that PyTorch's counter sees, for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.data.batches import pad
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, token_scores
from minillm.models.families import FAMILIES
from minillm.models.flops import Dimensions, dimensions_of, update_flops
from minillm.models.head import Head, TeacherStates, body, head_of, hidden_states
from minillm.models.load import load_model
from minillm.models.shape import shape_of

# More than the smallest sizes: rotary embeddings, which are not counted, would be above a percent of a tiny model.
BLOCKS: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 48, "num_hidden_layers": 4, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 512, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "opt": {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 320,
        "max_position_embeddings": 256, "word_embed_proj_dim": 96, "pad_token_id": 0,
    },
    "gpt_neox": {
        "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 320, "max_position_embeddings": 256,
    },
    "gemma2": BLOCKS | {"sliding_window": 8},
    "gemma3_text": BLOCKS | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": BLOCKS | {"sliding_window": 8},
    "mixtral": BLOCKS | {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
ROWS, LENGTH = 3, 40


def model_of(family: str, attention: str = "eager") -> Any:
    config = AutoConfig.for_model(family, **OWN.get(family, BLOCKS))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ids(rows: int = ROWS, length: int = LENGTH) -> Any:
    return torch.randint(1, 512, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_forward_and_backward_of_every_family(family: str) -> None:
    model = model_of(family)
    sizes, states = dimensions_of(model), []
    forward = counted(lambda: states.append(body(model)(input_ids=ids(), use_cache=False).last_hidden_state))
    assert sizes.forward([LENGTH] * ROWS, masked=True) == pytest.approx(forward, rel=0.01)
    backward = counted(lambda: states[0].sum().backward())
    assert sizes.backward([LENGTH] * ROWS, masked=True) == pytest.approx(backward, rel=0.01)
    assert sizes.forward([LENGTH] * ROWS) < sizes.forward([LENGTH] * ROWS, masked=True)
    whole = counted(lambda: model(input_ids=ids(), use_cache=False))
    assert sizes.forward([LENGTH] * ROWS, masked=True) + sizes.head(ROWS * LENGTH) == pytest.approx(whole, rel=0.01)


def test_only_the_chosen_experts_count() -> None:
    model = model_of("mixtral")
    model.set_experts_implementation("eager")
    forward = counted(lambda: body(model)(input_ids=ids(), use_cache=False))
    assert dimensions_of(model).forward([LENGTH] * ROWS, masked=True) == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_decoding_with_a_cache(family: str) -> None:
    """Token by token, the counter sees exactly the pairs that are not masked, but not sliding windows."""
    model = model_of(family)
    sizes = dimensions_of(model)
    prompt, response = 9, 12

    def decode() -> None:
        inputs, cache = ids(2, prompt), None
        for token in range(response):
            out = model(input_ids=inputs, past_key_values=cache, logits_to_keep=1)
            cache, inputs = out.past_key_values, ids(2, 1)
            assert out.logits.shape[1] == 1, token

    with torch.no_grad():
        found = counted(decode)
    # The prompt is read at once, with masked pairs; windows are not looked at.
    full = replace(sizes, windows=(None,) * len(sizes.windows))
    masked = 2 * (full.forward([prompt], masked=True) - full.forward([prompt]))
    cut = 2 * (full.decoding([prompt], [response]) - sizes.decoding([prompt], [response]))
    assert (cut > 0) == (family == "gemma3_text")
    assert sizes.decoding([prompt] * 2, [response] * 2) + masked == pytest.approx(found, rel=0.01)


def test_what_is_in_the_cache_is_not_computed_again() -> None:
    sizes = dimensions_of(model_of("llama"))
    whole, rest = sizes.decoding([20], [5]), sizes.decoding([20], [5], cached=[19])
    assert whole - rest == sizes.forward([19])
    # Three responses to one prompt, of which all but the last token is computed once.
    assert sizes.decoding([20] * 3, [5] * 3, [0, 19, 19]) == whole + 2 * rest


@pytest.mark.parametrize("length", [1, 8, 9, 40])
@pytest.mark.parametrize("window", [None, 1, 8, 64])
def test_pairs_that_are_seen(length: int, window: int | None) -> None:
    sizes = Dimensions(0, 0, 1, 1, 1, True, attention=1, windows=(window, None))
    near = sum(min(token + 1, window or length) for token in range(length))
    assert sizes.forward([length]) == 4 * (near + length * (length + 1) / 2)
    assert sizes.forward([length], masked=True) == 4 * 2 * length**2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_products_of_the_head(frozen: bool, with_teacher: bool) -> None:
    """Four, or three with a frozen head, of which one is the teacher's."""
    student, width, hidden = model_of("llama"), 500, 96
    student.get_output_embeddings().weight.requires_grad_(not frozen)
    tokens = 700
    states = torch.randn(tokens, 128).requires_grad_()
    teacher = TeacherStates(torch.randn(tokens, hidden), Head(torch.randn(512, hidden))) if with_teacher else None

    def run() -> None:
        loss, _ = token_scores(
            states,
            head_of(student),
            torch.zeros(tokens, dtype=torch.long),
            teacher,
            loss_fn=lambda part, scores: (scores.logq.sum(), ScoreGradients(logq=torch.ones_like(scores.logq))),
            settings=ScoringSettings(width=width),
        )
        loss.backward()

    expected = dimensions_of(student).head_training(tokens, width, hidden if with_teacher else None)
    assert expected == pytest.approx(counted(run), rel=1e-6)
    products = (2 if frozen else 3) * 128 + (hidden if with_teacher else 0)
    assert expected == 2 * tokens * width * products


def test_a_frozen_base_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    base = model_of("qwen3")
    weights = dimensions_of(base).weights
    student: Any = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    sizes = dimensions_of(student)
    heads, hidden, inner = 4 * 48, 128, 320
    adapter = 4 * 8 * (hidden + heads + inner + hidden)
    assert (sizes.trained, sizes.frozen, sizes.head_trained) == (adapter, weights, False)
    assert dimensions_of(model_of("qwen3")).frozen_beside(adapter) == sizes
    # As checkpointing sets it. Otherwise the first layer, which is a quarter of this model, has no gradient by its input.
    base.enable_input_require_grads()
    states: list[Any] = []
    forward = counted(lambda: states.append(body(student)(input_ids=ids(), use_cache=False).last_hidden_state))
    assert sizes.forward([LENGTH] * ROWS, masked=True) == pytest.approx(forward, rel=0.01)
    backward = counted(lambda: states[0].sum().backward())
    assert sizes.backward([LENGTH] * ROWS, masked=True) == pytest.approx(backward, rel=0.01)


def test_an_update_is_the_sum_of_its_phases() -> None:
    student, teacher = model_of("gemma2"), model_of("llama").requires_grad_(False)
    sizes, large = dimensions_of(student), dimensions_of(teacher)
    assert (large.trained, large.head_trained) == (0, False)
    prompts, responses = [5, 9], [20, 11]
    found = update_flops(sizes, large, prompts, responses, width=500)
    batch = pad([[1] * 5, [1] * 9], [[2] * 20, [2] * 11])
    run: list[Any] = []
    # Two rows of 25 tokens, with padding and masked pairs.
    seen = counted(lambda: run.append(hidden_states(student, batch)))
    seen += counted(lambda: run[0].sum().backward())
    waste = 3 * (sizes.forward([25, 25], masked=True) - sizes.forward([25, 20]))
    assert found.student + waste == pytest.approx(seen, rel=0.01)
    assert found.teacher == large.forward([25, 20])
    assert found.head == sizes.head_training(31, 500, large.hidden)
    assert found.total == found.sampling + found.teacher + found.student + found.head
    mixed = update_flops(sizes, large, prompts, responses, width=500, mixed=True)
    assert mixed.sampling == found.sampling + large.decoding(prompts, responses)
    assert (mixed.teacher, mixed.student, mixed.head) == (0, found.student, found.head)


def test_dimensions_of_a_config_are_those_of_the_model(pair: tuple[str, str]) -> None:
    model: Any = load_model(pair[0], torch.float32)
    assert shape_of(pair[0]).dimensions == dimensions_of(model)
    linear = [module for module in body(model).modules() if isinstance(module, torch.nn.Linear)]
    assert dimensions_of(model).weights == sum(module.weight.numel() for module in linear)
    assert shape_of("openai-community/gpt2").dimensions.weights == 12 * 12 * 768**2


def test_products_to_measure_a_device_with() -> None:
    sizes = SimpleNamespace(hidden=8, inner=24, vocab=100)
    assert Dimensions.products(sizes, 64) == [(64, 8, 24), (64, 24, 8), (64, 8, 100)]  # pyright: ignore[reportArgumentType]
