from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

from minillm.errors import EngineError
from minillm.models.weights import plain_weights
from minillm.rollout.engines import choose as build
from minillm.rollout.engines.base import padding_bias
from minillm.rollout.engines.vllm import VLLMEngine, _sleep_beside_others
from minillm.rollout.engines.vllm_memory import GIB, HEADS_ON_CPUS, cache_bytes, memory_settings, vllm_is_installed
from tests.conftest import tiny_llama


def test_without_vllm_auto_falls_back_in_one_line_and_vllm_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "vllm_is_installed", lambda: False)
    build._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert build.choose_engine("auto") == "transformers"
        assert build.choose_engine("auto") == "transformers"
    assert [record.message for record in caplog.records] == [
        "vLLM is not installed: sampling with transformers instead, several times slower."
    ]
    with pytest.raises(EngineError, match=r"rollout\.engine: vLLM is not installed: pip install 'minillm\[vllm\]'"):
        build.choose_engine("vllm")
    assert build.choose_engine("transformers") == "transformers"
    monkeypatch.setattr(build, "vllm_is_installed", lambda: True)
    assert build.choose_engine("auto") == "vllm"


@pytest.mark.skipif(
    not vllm_is_installed() or torch.cuda.is_available(), reason="vLLM is not installed, or not for CPUs"
)
def test_the_heads_that_a_cpu_takes_are_those_vllm_lists() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(HEADS_ON_CPUS) == CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (
            GPTNeoXConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1),
            "vLLM on a CPU changes the class of gpt_neox",
        ),
        (
            GPT2Config(n_embd=64, n_head=4, n_layer=1),
            r"vLLM on a CPU has no attention for heads of 16 \(but for 32, 64",
        ),
    ],
)
def test_a_model_that_vllm_does_not_take_on_a_cpu_is_sampled_by_transformers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, config: Any, refusal: str
) -> None:
    monkeypatch.setattr(build, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert build.choose_engine("auto", config) == "transformers"
    assert re.search(refusal, caplog.text)
    with pytest.raises(EngineError, match=rf"rollout\.engine: {refusal}.*set rollout\.engine=auto"):
        build.choose_engine("vllm", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.choose_engine("auto", config) == "vllm"


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "heads of their own size": Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=1, head_dim=48),
    "other names": GPT2Config(vocab_size=32, n_embd=64, n_layer=3, n_head=2),
    "OPT": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=64),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_and_values_get_the_room_that_transformers_takes(kind: str, tmp_path: Path) -> None:
    CONFIGS[kind].save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    length, rows = 50, 3
    cache = model(torch.ones(rows, length, dtype=torch.long), use_cache=True).past_key_values
    taken = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    room = cache_bytes(tmp_path, max_length=length, sequences=rows, dtype=torch.float32)
    blocks = -(-length // 32)
    assert room == taken / length * 32 * (blocks + 1)  # whole blocks, and one to grow into


def test_memory_follows_the_recipe_and_has_bounds_on_a_cpu(tmp_path: Path) -> None:
    tiny_llama(0).config.save_pretrained(tmp_path)
    sized: Any = {"max_length": 64, "dtype": torch.float32}
    assert memory_settings(tmp_path, sequences=64, memory=None, **sized) == {"kv_cache_memory_bytes": GIB // 8}
    assert memory_settings(tmp_path, sequences=10**6, memory=None, **sized) == {"kv_cache_memory_bytes": 4 * GIB}
    assert memory_settings(tmp_path, sequences=64, memory=0.5, **sized) == {"kv_cache_memory_bytes": GIB // 2}


def test_what_others_take_of_a_card_does_not_keep_an_engine_awake() -> None:
    class Worker:
        said = "Memory usage increased after sleeping."

        def sleep(self, level: int = 1) -> None:
            raise AssertionError(self.said)

    worker = Worker()
    _sleep_beside_others(worker)
    worker.sleep(level=2)
    worker.said = "another matter"
    with pytest.raises(AssertionError, match="another matter"):
        worker.sleep(2)


def test_a_closed_engine_leaves_the_trainers_their_process_group(tmp_path: Path) -> None:
    """vLLM destroys its groups, and then the default one, which training goes on in."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        own: list[Any] = [dist.new_group()]

        class Closing:
            class llm_engine:
                class engine_core:
                    @staticmethod
                    def shutdown() -> None:
                        while own:
                            dist.destroy_process_group(own.pop())
                        dist.destroy_process_group()

        for guest in (True, False):
            engine = VLLMEngine.__new__(VLLMEngine)
            engine._llm, engine._guest = Closing(), guest  # pyright: ignore
            assert dist.is_initialized()
            engine.close()
            assert dist.is_initialized() == guest
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_resting_engine_wakes_in_the_order_vllm_asks_for() -> None:
    """Sleep exists on GPUs alone, so a recorder stands for vLLM: weights, then what fills them, then the cache."""
    calls: list[Any] = []

    class Recorder:
        def sleep(self, level: int) -> None:
            calls.append(("sleep", level))

        def wake_up(self, tags: list[str] | None = None) -> None:
            calls.append(("wake", *(tags or ["all"])))

        class llm_engine:
            @staticmethod
            def add_lora(request: Any) -> None:
                calls.append(("adapter", request.lora_int_id))

            @staticmethod
            def remove_lora(number: int) -> None:
                calls.append(("without", number))

        def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
            calls.append((method, len(list(kwargs["weights_iterator"]))))

        def reset_prefix_cache(self) -> bool:
            calls.append("reset")
            return True

    engine = VLLMEngine.__new__(VLLMEngine)
    engine._llm, engine._sleeps, engine._asleep, engine.version = Recorder(), True, False, 0  # pyright: ignore
    weights = list(plain_weights(tiny_llama(0), torch.float32))
    engine.sleep()
    engine.sleep()
    engine.update_weights(weights, 3)
    engine.update_weights(weights, 4)
    n = len(weights)
    assert calls == [
        ("sleep", 2),
        ("wake", "weights"),
        ("reload_weights", n),
        ("wake", "kv_cache"),
        "reset",
        ("reload_weights", n),
        "reset",
    ]
    engine._sleeps = False
    engine.sleep()
    assert calls[-1] == "reset"
    pytest.importorskip("vllm")
    # Under an adapter the base's weights are not sent again, so that they have to be kept.
    calls.clear()
    engine._sleeps = engine.takes_adapter = True
    for version in (5, 6):
        engine.sleep()
        engine.update_adapter("/nowhere", version)
    assert calls == [
        ("sleep", 1),
        ("wake", "all"),
        ("adapter", 1),
        ("sleep", 1),
        ("wake", "all"),
        ("without", 1),
        ("adapter", 2),
    ]
    assert engine.version == 6
    del engine._llm


def test_rows_beyond_the_vocabulary_are_biased_away_as_far_as_vllm_on_a_gpu_takes_it() -> None:
    assert padding_bias(20, 20) is None
    assert padding_bias(20, 22) == {20: -100.0, 21: -100.0}
    assert len(padding_bias(20, 20 + 1024) or {}) == 1024
    assert len(padding_bias(20, 2000, limited=False) or {}) == 1980
    with pytest.raises(
        EngineError,
        match="head has 1,025 rows beyond the tokenizer's 20 tokens, of which vLLM leaves out 1,024 at most",
    ):
        padding_bias(20, 20 + 1025)
