"""Choosing an engine, what each engine states about itself, and the parts of vLLM that a recorder can stand in for."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.models.launcher import environment_without_launcher
from minillm.models.load import load_model
from minillm.models.weights import plain_weights
from minillm.rollout.config import RESERVED_ENGINE_OPTIONS, RolloutConfig
from minillm.rollout.engines import choose, local_server
from minillm.rollout.engines import vllm as vllm_engine
from minillm.rollout.engines.base import EngineSizing, padding_bias
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine, _tolerate_shared_gpu
from minillm.rollout.engines.vllm_memory import GIB, HEADS_ON_CPUS, cache_bytes, memory_settings, vllm_is_installed
from tests.conftest import save, tiny_llama


def test_the_values_of_the_setting_are_the_registered_engines() -> None:
    assert set(get_args(RolloutConfig.model_fields["engine"].annotation)) == {"auto", *choose.ENGINES}
    assert [name for name in choose.ENGINES if choose.supports_overlap(name)] == ["server"]
    assert not choose.supports_overlap("auto")
    assert [name for name, e in choose.ENGINES.items() if e.capabilities.supports_no_repeat_ngram] == ["transformers"]


def test_what_an_engine_would_ignore_is_refused() -> None:
    for name, engine in choose.ENGINES.items():
        blocking = Sampling(4, (1,), 32, no_repeat_ngram=6)
        if name == "transformers":
            engine.capabilities.check(blocking)
            continue
        with pytest.raises(EngineError, match="vLLM blocks no n-grams; use engine: transformers"):
            engine.capabilities.check(blocking)
        engine.capabilities.check(Sampling(4, (1,), 32, top_logprobs=20))
        with pytest.raises(EngineError, match="at most 20 top log-probabilities per position; 21 were requested"):
            engine.capabilities.check(Sampling(4, (1,), 32, top_logprobs=21))


def test_the_engine_of_a_request_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers sample the model in training; of other models a copy is sampled in this process."""
    folder, sizing = save(tiny_llama(0), tmp_path / "model"), EngineSizing(64, torch.float32)
    model = load_model(folder, torch.float32)
    config = RolloutConfig(engine="server", servers=["http://127.0.0.1:9"], server_patience=0.1, engine_memory=0.5)
    assert EngineSizing.from_config(config, 64, 8, torch.float32) == EngineSizing(64, torch.float32, 8, 0.5)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9.*tried for 0\.1 s"):
        choose.make_engine(config, folder, sizing, model=model, work=tmp_path)
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: False)
    other = choose.make_engine(config, folder, sizing)
    same = choose.make_engine(RolloutConfig(engine="transformers"), folder, sizing, model=model)
    engines = (other, same)
    assert all(isinstance(engine, TransformersEngine) for engine in engines)
    sampling = Sampling(6, (1,), 32)
    before = [engine.generate([[2]], sampling, [0])[0].student_logprobs for engine in engines]
    assert torch.equal(*before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    after = [engine.generate([[2]], sampling, [0])[0].student_logprobs for engine in engines]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_a_module_that_the_plan_needs_loads_without_torch() -> None:
    code = "import sys, minillm.rollout.engines.vllm_memory; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


def test_a_server_is_started_as_no_process_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(0).config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "MASTER_ADDR", "GROUP_RANK", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MINE", "2")
    kept = environment_without_launcher()
    assert kept["MINE"] == "2"
    assert not [name for name in kept if name in ("RANK", "MASTER_ADDR", "GROUP_RANK")]
    assert not [name for name in kept if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]
    environment = local_server._environment()
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "RANK" not in environment
    command = local_server._command(tmp_path, 8000, EngineSizing(64, torch.float32, sequences=4))
    words = " ".join(command[1:])
    assert f"-m vllm.entrypoints.openai.api_server --model {tmp_path} --host 127.0.0.1 --port 8000" in words
    assert "--max-model-len 64 --dtype float32 --logprobs-mode processed_logprobs --max-num-seqs 64" in words
    assert f"--max-num-batched-tokens 4096 --kv-cache-memory-bytes {GIB // 8} --enforce-eager --block-size 32" in words


def test_options_that_the_recipe_decides_are_refused() -> None:
    for option in sorted(RESERVED_ENGINE_OPTIONS):
        with pytest.raises(ValueError, match=f"engine_options: {option} follows from the recipe"):
            RolloutConfig(engine_options={option: 1})


def test_without_vllm_auto_falls_back_in_one_line_and_vllm_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: False)
    choose._warn_of_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose.choose_engine("auto") == "transformers"
        assert choose.choose_engine("server") == "transformers"
    assert [record.message for record in caplog.records] == [
        "vLLM is not installed: sampling with transformers instead, several times slower."
    ]
    with pytest.raises(
        EngineError, match=r"rollout\.engine: vLLM is not installed: pip install 'minillm-distill\[vllm\]'"
    ):
        choose.choose_engine("vllm")
    assert choose.choose_engine("transformers") == "transformers"
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: True)
    assert choose.choose_engine("auto") == "vllm"


@pytest.mark.skipif(
    not vllm_is_installed() or torch.cuda.is_available(), reason="vLLM is not installed, or not for CPUs"
)
def test_the_supported_head_sizes_are_those_that_vllm_lists() -> None:
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
    monkeypatch.setattr(vllm_engine, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose._warn_of_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose.choose_engine("auto", config) == "transformers"
    assert re.search(refusal, caplog.text)
    with pytest.raises(EngineError, match=rf"rollout\.engine: {refusal}.*set rollout\.engine=auto"):
        choose.choose_engine("vllm", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose.choose_engine("auto", config) == "vllm"


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "heads of their own size": Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=1, head_dim=48),
    "other names": GPT2Config(vocab_size=32, n_embd=64, n_layer=3, n_head=2),
    "OPT": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=64),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_key_value_cache_has_the_size_that_transformers_uses(kind: str, tmp_path: Path) -> None:
    CONFIGS[kind].save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    length, rows = 50, 3
    cache = model(torch.ones(rows, length, dtype=torch.long), use_cache=True).past_key_values
    taken = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    size = cache_bytes(tmp_path, EngineSizing(length, torch.float32, sequences=rows))
    blocks = -(-length // 32)
    assert size == taken / length * 32 * (blocks + 1)  # the blocks of a full sequence, and one to grow into


def test_memory_follows_the_recipe_and_has_bounds_on_a_cpu(tmp_path: Path) -> None:
    tiny_llama(0).config.save_pretrained(tmp_path)
    for sequences, memory, expected in ((64, None, GIB // 8), (10**6, None, 4 * GIB), (64, 0.5, GIB // 2)):
        sizing = EngineSizing(64, torch.float32, sequences, memory)
        assert memory_settings(tmp_path, sizing) == {"kv_cache_memory_bytes": expected}


def test_an_engine_sleeps_on_a_gpu_that_other_processes_share() -> None:
    class Worker:
        message = "Memory usage increased after sleeping."

        def sleep(self, level: int = 1) -> None:
            raise AssertionError(self.message)

    worker = Worker()
    _tolerate_shared_gpu(worker)
    worker.sleep(level=2)
    worker.message = "another failure"
    with pytest.raises(AssertionError, match="another failure"):
        worker.sleep(2)


def test_closing_an_engine_keeps_the_trainers_process_group(tmp_path: Path) -> None:
    """vLLM destroys its groups and then the default group, which training still needs."""
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

        for in_group in (True, False):
            engine = VLLMEngine.__new__(VLLMEngine)
            engine._llm, engine._in_process_group = Closing(), in_group  # pyright: ignore
            assert dist.is_initialized()
            engine.close()
            assert dist.is_initialized() == in_group
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_sleeping_engine_wakes_in_the_order_that_vllm_needs() -> None:
    """First the memory of the weights, then the new weights, then the cache. vLLM sleeps on GPUs only, so a recorder
    stands in for it."""
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
    engine._llm, engine._can_sleep, engine._asleep, engine.version = Recorder(), True, False, 0  # pyright: ignore
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
    # A teacher beside the student was given up too, and is filled in again from the trainer's copy.
    calls.clear()
    engine._pair = SimpleNamespace(  # pyright: ignore
        load_student=lambda weights: calls.append(("student", len(weights))),
        load_teacher=lambda: calls.append("teacher"),
    )
    engine.sleep()
    engine.update_weights(weights, 5)
    engine.update_weights(weights, 6)
    woken = [("sleep", 2), ("wake", "weights"), ("student", n), "teacher", ("wake", "kv_cache"), "reset"]
    assert calls == [*woken, ("student", n), "reset"]
    engine._pair = None
    engine._can_sleep = False
    engine.sleep()
    assert calls[-1] == "reset"
    pytest.importorskip("vllm")
    # With an adapter, the weights of the base model are not sent again, so they have to be kept.
    calls.clear()
    engine._can_sleep = engine.takes_adapter = True
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
