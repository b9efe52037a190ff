"""The output head of a model is read without the rest of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.errors import InputError
from minillm.models import head_weights
from minillm.models.head import head_of
from minillm.models.head_weights import load_head
from tests.conftest import tiny_llama

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.2},
    "granite": {"logits_scaling": 8.0},
    "phi": {},  # its head has a bias
}


def save_random(family: str, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | FAMILIES[family])))
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("size", ["1GB", "4KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_head_is_read(family: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = head_of(save_random(family, tmp_path, max_shard_size=size))
    assert (tmp_path / "model.safetensors.index.json").is_file() == (size == "4KB")
    monkeypatch.delattr(head_weights, "load_model")
    head = load_head(str(tmp_path), torch.float32, torch.device("cpu"))
    assert (head.scale, head.softcap) == (wanted.scale, wanted.softcap)
    assert torch.equal(head.weight, wanted.weight)
    assert not head.weight.requires_grad
    assert (head.bias is None) == (wanted.bias is None)
    if head.bias is not None and wanted.bias is not None:
        assert torch.equal(head.bias, wanted.bias)
    assert load_head(str(tmp_path), torch.bfloat16, torch.device("cpu")).weight.dtype == torch.bfloat16


def test_a_head_under_another_name_is_taken_from_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILLM_ALLOW_PICKLE", "1")
    model = tiny_llama(1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    file.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    head = load_head(str(tmp_path), torch.float32, torch.device("cpu"))
    assert torch.equal(head.weight, model.lm_head.weight)
    # Without the tied embedding there is no head.
    (tmp_path / "pytorch_model.bin").unlink()
    save_file({name: value for name, value in state.items() if "embed" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match="do not hold lm_head"):
        load_head(str(tmp_path), torch.float32, torch.device("cpu"))


def test_logits_that_are_made_in_another_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random("cohere", tmp_path)
    plain = head_weights.head_of

    def without_scale(model: Any) -> Any:
        head = plain(model)
        head.scale = 1.0
        return head

    monkeypatch.setattr(head_weights, "head_of", without_scale)
    with pytest.raises(InputError, match=r"the teacher .* makes its logits in a way that is not scored here"):
        load_head(str(tmp_path), torch.float32, torch.device("cpu"))
