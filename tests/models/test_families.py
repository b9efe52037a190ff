"""Facts about model families stand in one row each, and hold for the configs that transformers makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OlmoConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minillm.errors import InputError
from minillm.models.config import AdapterConfig
from minillm.models.families import FAMILIES, KNOWN, Family, family_of, trains_quantized
from minillm.models.lora import check_student, load_student
from tests.conftest import save


def test_every_row_is_a_model_type_of_transformers() -> None:
    assert FAMILIES.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_published_settings_are_settings_of_the_family(name: str) -> None:
    settings = dict(KNOWN[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    unknown = {key for key in settings if not hasattr(type(config)(), key)}
    if unknown:  # Qwen2 has no such setting, and its heads have the usual size
        assert unknown == {"head_dim"}
        assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_facts_are_found_by_config() -> None:
    assert family_of(LlamaConfig()) is FAMILIES["llama"]
    assert family_of(OlmoConfig()) == Family()  # a family without a row
    assert family_of(object()) == Family()
    assert family_of(Gemma2Config()).tied_head_absent_in_vllm
    assert family_of(GPTNeoXConfig()).replaced_by_vllm_on_cpu
    assert trains_quantized(LlamaConfig())
    assert not trains_quantized(GPT2Config())


def test_a_student_that_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"student\.lora\.quantization: .*gpt2 the other way round"):
        load_student(folder, AdapterConfig(rank=2, quantization="4bit"))
    with pytest.raises(InputError, match=r"student\.lora\.quantization: .*gpt2 the other way round"):
        check_student(folder, AdapterConfig(rank=2, quantization="4bit"))
