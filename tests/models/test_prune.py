"""A pruned model is the teacher with blocks skipped, in families that keep settings for single layers, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.models.layers import decoder_layers
from minillm.models.load import load_model
from minillm.models.pruning.apply import prune
from minillm.models.pruning.depth import check_keep_layers
from minillm.models.pruning.layer_settings import cut_config
from minillm.models.shape import shape_of
from tests.conftest import save, tiny_llama

LAYERS, KEPT = 6, [0, 2, 3, 5]
BASE: dict[str, Any] = {
    "vocab_size": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BLOCKS: dict[str, Any] = BASE | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWS: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
}
SHARED: dict[str, Any] = {
    "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip

# Of each, settings that belong to single layers, in every form that families keep them in.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "flags of positions": ("smollm3", BLOCKS | {"no_rope_layers": [1, 0, 1, 0, 0, 1]}),
    "flags from a period": ("smollm3", BLOCKS | {"no_rope_layer_interval": 2}),
    "windows": ("qwen2", BLOCKS | WINDOWS | {"use_sliding_window": True, "max_window_layers": 2}),
    "a nested pattern": (
        "gpt_neo",
        BASE | {
            "hidden_size": 32, "intermediate_size": 48, "num_layers": LAYERS, "num_heads": 4, "window_size": 4,
            "max_position_embeddings": 64, "attention_types": [[["global", "local", "local"], 2]],
        },
    ),
    "a repeated pattern": (
        "recurrent_gemma", BLOCKS | {"head_dim": 8, "attention_window_size": 4, "block_types": ["attention", "recurrent"]},
    ),
    "indices of dense layers": ("qwen3_moe", BLOCKS | EXPERTS | {"head_dim": 8, "mlp_only_layers": [1, 2]}),
    "indices of all layers": ("qwen3_moe", BLOCKS | EXPERTS | {"head_dim": 8, "mlp_only_layers": list(range(LAYERS))}),
    "indices of experts, and flags": (
        "llama4_text",
        BLOCKS | {
            "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [1, 3, 5],
            "no_rope_layers": [1, 1, 0, 0, 1, 1], "attention_chunk_size": 4,
        },
    ),
    "indices of attention": ("lfm2", BLOCKS | {"full_attn_idxs": [1, 2, 5]}),
    "indices of attention among others": (
        "bamba",
        BLOCKS | {"attn_layer_indices": [1, 2], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "a number of dense layers": (
        "deepseek_v3",
        BLOCKS | {
            "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 3,
        },
    ),
    "sizes of each layer": (
        "laguna",
        BLOCKS | EXPERTS | WINDOWS | {
            "head_dim": 8, "num_attention_heads_per_layer": [4, 8, 4, 8, 4, 4], "shared_expert_intermediate_size": 16,
        },
    ),
    "overrides by layer, and keys that layers share": ("gemma4_text", BLOCKS | SHARED),
    "a text model in a wrapper": (
        "gemma3",
        {
            "text_config": BLOCKS | WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8}, "vision_config": VISION,
            "mm_tokens_per_image": 1,
        },
    ),
    "scales of the whole": ("granite", BLOCKS | {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
}  # fmt: skip


def made(kind: str, settings: dict[str, Any]) -> Any:
    config: Any = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # layers that say something, whatever the family starts from
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def passing_on(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, None) if isinstance(plain(*args, **kwargs), tuple) else given

    return forward


def with_blocks_skipped(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Not by `prune`'s own means."""
    _, layers = decoder_layers(model)
    for index in set(range(LAYERS)) - set(KEPT):
        layers[index].forward = passing_on(layers[index].forward)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_teacher_with_blocks_skipped(family: str, tmp_path: Path) -> None:
    model = made(*FAMILIES[family])
    prune(model, KEPT).save_pretrained(tmp_path)
    pruned: Any = load_model(tmp_path, torch.float32)
    assert pruned.config.get_text_config().num_hidden_layers == len(KEPT)
    ids = (torch.arange(24)[None] * 7 + 3) % 32
    want = with_blocks_skipped(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(pruned(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
        cached = getattr(pruned(input_ids=ids[:, :-1], use_cache=True), "past_key_values", None)
        if (
            cached is not None and pruned.config.model_type != "bamba"
        ):  # which, whole too, does not go on from its state on a CPU
            last = pruned(input_ids=ids[:, -1:], past_key_values=cached, use_cache=True).logits
            torch.testing.assert_close(last, want[:, -1:], rtol=1e-3, atol=1e-3)


# Scales by a layer's number, periods that a cut breaks, tensors that hold all layers' parts.
REFUSED: dict[str, tuple[str, dict[str, Any], list[int], str]] = {
    "scales": (
        "gpt2", BASE | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}, KEPT,
        "the pruned model would differ from",
    ),
    "a period": ("qwen3_moe", BLOCKS | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 2}, KEPT, "Missing key"),
    "parts": (
        "gemma4_text", BLOCKS | {"head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32}, KEPT,
        "size mismatch for model.embed_tokens_per_layer",
    ),
    "keys of a layer that goes": ("gemma4_text", BLOCKS | SHARED, [0, 1, 3, 5], "the pruned model would differ from"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_what_would_be_another_model_is_refused_by_name(family: str) -> None:
    kind, settings, kept, reason = REFUSED[family]
    model = made(kind, settings)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} cannot be pruned by depth: .*{reason}") as refused:
        prune(model, kept)
    assert "\n" not in str(refused.value)
    with torch.no_grad():  # the teacher skips nothing after that
        assert torch.equal(model(torch.tensor([[3, 4]])).logits, made(kind, settings)(torch.tensor([[3, 4]])).logits)


def test_a_setting_that_is_not_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(config: Any, kept: list[int]) -> Any:
        cut = cut_config(config, kept)
        cut.no_rope_layers = config.no_rope_layers
        return cut

    monkeypatch.setattr("minillm.models.pruning.apply.cut_config", forgetful)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match=r"SmolLM3ForCausalLM .*log-probabilities off by up to"):
            prune(made(*FAMILIES["flags of positions"]).to(dtype), KEPT)


def test_a_teacher_rounded_as_a_whole_is_no_other_model() -> None:
    """`to(bfloat16)` rounds the frequencies of positions, which a model that is loaded in bfloat16 keeps in float32."""
    teacher = made("llama", BLOCKS | {"hidden_size": 128, "head_dim": 64}).to(torch.bfloat16)
    pruned: Any = prune(teacher, KEPT)
    assert pruned.dtype == torch.bfloat16
    assert pruned.model.rotary_emb.inv_freq.dtype == torch.float32
    held = {tensor.data_ptr() for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert not any(tensor.data_ptr() in held for tensor in (*pruned.parameters(), *pruned.buffers()))
    tied: Any = prune(tiny_llama(0, layers=3), [0, 2])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_token_ids_are_no_layers() -> None:
    """Lists as long as the model is deep, or of numbers as small as its layers'."""
    config: Any = AutoConfig.for_model("llama", **BLOCKS | {"eos_token_id": [1, 2, 3, 4, 5, 6]})
    config.layers_that_end = [2, 5]
    cut = cut_config(config, KEPT)
    assert cut.eos_token_id == [1, 2, 3, 4, 5, 6]
    assert cut.layers_that_end == [1, 3]
    assert (config.num_hidden_layers, config.layers_that_end) == (LAYERS, [2, 5])


def test_depths_that_no_teacher_can_be_cut_to(tmp_path: Path) -> None:
    folder = save(tiny_llama(0, layers=6), tmp_path)
    for keep in (1, 7, 99):
        message = rf"student\.keep_layers: must be between 2 and the teacher's 6 layers \(given: {keep}\)"
        with pytest.raises(ValueError, match=message):
            check_keep_layers(6, keep)
        with pytest.raises(ValueError, match=message):
            shape_of(folder, keep)
    check_keep_layers(6, 6)


def test_a_pruned_models_size_is_known_before_it_is_made(tmp_path: Path) -> None:
    model = made("qwen3_moe", BLOCKS | EXPERTS | {"head_dim": 8, "mlp_only_layers": [0, 5]})
    folder = save(model, tmp_path)
    assert shape_of(folder, 4).parameters == sum(p.numel() for p in prune(model, KEPT).parameters())
