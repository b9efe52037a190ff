"""Student and teacher as one vLLM model: other architectures than the conformance tests have, preemption, both runners."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines import choose, vllm_memory
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import memory_settings, vllm_is_installed
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama
from tests.rollout.mixture import PAIRS, PROMPT, SAMPLING, enumerate_mixture, fits, llama, wide_llama


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "wider" in name else pytest.mark.full) for name in PAIRS]
)
def test_frequencies_of_pairs(name: str, tmp_path: Path) -> None:
    student, teacher = (make() for make in PAIRS[name])
    local, folder, n = LocalTeacher(teacher), save(student, tmp_path), 6000
    engine = VLLMEngine(folder, EngineSizing(96, torch.float32, 256), teacher=local)
    try:
        for alpha, other in ((0.5, 0.2), (0.2, 0.5), (0.0, 0.3)):
            rollouts = engine.generate([PROMPT] * n, replace(SAMPLING, teacher_mix=alpha), list(range(n)))
            counts = Counter(tuple(r.response_ids) for r in rollouts)
            expected = enumerate_mixture(student, teacher, alpha)
            assert fits(counts, expected, n)
            assert not fits(counts, enumerate_mixture(student, teacher, other), n)
            for r in rollouts[:50]:
                assert float(r.behaviour_logprobs.sum().exp()) == pytest.approx(
                    expected[tuple(r.response_ids)], rel=5e-3
                )
        sampling, prompts = Sampling(20, (1,), 5, teacher_mix=0.4), [[2], [3, 4, 2, 2, 3], [4] * 40] * 4
        mixed = engine.generate(prompts, sampling, list(range(12)))
        for r, states in zip(mixed, local.hidden(prompts, [r.response_ids for r in mixed]), strict=True):
            assert r.teacher is not None
            assert r.teacher.hidden is not None
            torch.testing.assert_close(r.teacher.hidden, states, rtol=5e-3, atol=5e-3)
    finally:
        engine.close()


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_preemption_and_prefill_in_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has room for a few of 64 responses. Preempted ones are read again, and draw the same tokens. Prompts
    are prefilled in chunks, as they are on a GPU."""
    chunks = {"block_size": 32, "enforce_eager": True, "enable_chunked_prefill": True}
    monkeypatch.setattr("minillm.rollout.engines.vllm._device_settings", lambda on_gpu: chunks)
    student, local = llama(), LocalTeacher(tiny_llama(4, layers=2, vocab=8, scale=0.4))
    sampling, prompts = Sampling(60, (7,), 7, teacher_mix=0.4), [[2, 3, 4], [5] * 30] * 32
    engine = VLLMEngine(
        save(student, tmp_path),
        EngineSizing(96, torch.float32, 64, memory=0.0012),
        teacher=local,
        options={"max_num_seqs": 48, "max_num_batched_tokens": 64},
    )
    preempted = []
    try:
        scheduler: Any = engine._llm.llm_engine.engine_core.engine_core.scheduler  # pyright: ignore
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
        there = engine.generate(prompts, sampling, list(range(64)))
    finally:
        engine.close()
    assert preempted
    here = TransformersEngine(student, teacher=local).generate(prompts, sampling, list(range(64)))
    assert [r.response_ids for r in there] == [r.response_ids for r in here]
    for a, b in zip(there, here, strict=True):
        assert a.teacher is not None
        assert b.teacher is not None
        torch.testing.assert_close(a.teacher.hidden, b.teacher.hidden, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(a.student_logprobs, b.student_logprobs, rtol=2e-3, atol=2e-3)


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_the_newer_runner_mixes_too(tmp_path: Path) -> None:
    """vLLM's newer runner is that of GPUs. Here it runs on the CPU, with its Triton kernels interpreted."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-m", "tests.rollout.newer_runner", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NewerSampler" in done.stdout


def test_what_vllm_cannot_mix_is_left_to_transformers_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    choose._warn_of_fallback.cache_clear()
    monkeypatch.setattr(vllm_memory, "vllm_is_installed", lambda: True)
    monkeypatch.setattr("minillm.rollout.engines.vllm.vllm_is_installed", lambda: True)
    student, teacher = llama().config, wide_llama().config
    assert choose.choose_engine("auto", student, teacher) == "vllm"
    quantized = wide_llama().config
    quantized.quantization_config = "4bit"
    assert choose.choose_engine("auto", student, quantized) == "transformers"
    with pytest.raises(EngineError, match=r"a quantised teacher cannot be mixed in by vLLM.*set rollout.engine=auto"):
        choose.choose_engine("vllm", student, quantized)
    odd = SimpleNamespace(model_type="llama", head_dim=48, num_attention_heads=2)
    with pytest.raises(EngineError, match="no attention for heads of 48"):
        choose.choose_engine("vllm", student, odd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_memory, "_vllm_version", lambda: (0, 28))
    with pytest.raises(EngineError, match=r"vLLM before 0\.29 takes one number of attention heads on a GPU"):
        choose.choose_engine("vllm", student, teacher)
    monkeypatch.setattr(vllm_memory, "_vllm_version", lambda: (0, 29))
    assert choose.choose_engine("vllm", student, teacher) == "vllm"


def test_settings_that_exclude_a_mixture() -> None:
    with pytest.raises(ValueError, match=r"teacher_mix: 0\.2, the default: .*set lora: merged, or teacher_mix: 0"):
        RolloutConfig(lora="adapter")
    with pytest.raises(ValueError, match=r"lora: adapter with teacher_mix: 0\.4: vLLM mixes"):
        RolloutConfig(lora="adapter", teacher_mix=0.4)
    RolloutConfig(lora="adapter", teacher_mix=0.0)
    options = {"speculative_config": {"method": "ngram"}}
    with pytest.raises(ValueError, match=r"speculative_config with teacher_mix: .*leave it out, or set teacher_mix: 0"):
        RolloutConfig(engine_options=options)
    RolloutConfig(engine_options=options, teacher_mix=0.0)
    with pytest.raises(ValueError, match=r"draft_tokens: .*without drafts: leave it out"):
        RolloutConfig.model_validate({"draft_tokens": 10})


def test_the_cache_has_room_for_both(tmp_path: Path) -> None:
    student, teacher, sizing = llama(), wide_llama(), EngineSizing(4096, torch.float32, sequences=128)
    folders = [save(model, tmp_path / name) for name, model in (("s", student), ("t", teacher))]
    alone = [memory_settings(folder, sizing)["kv_cache_memory_bytes"] for folder in folders]
    both = memory_settings(folders[0], sizing, teacher.config)["kv_cache_memory_bytes"]
    assert both == sum(alone)
