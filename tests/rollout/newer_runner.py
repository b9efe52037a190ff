"""Run by a test in a process of its own: the pair in vLLM's newer model runner, on a CPU.

The runner needs Triton, whose CPU builds have no backend that vLLM accepts; the kernels are interpreted, so a name is
enough.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.backends

from minillm.data.sampling import Sampling
from minillm.models.weights import plain_weights
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama
from tests.rollout.mixture import PROMPT, SAMPLING, enumerate_mixture, fits


def main() -> None:
    backends: Any = triton.backends.backends
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from minillm.rollout.engines.vllm import VLLMEngine

    n, alpha = 2000, 0.5
    student, teacher = tiny_llama(3, layers=1, vocab=8, scale=0.4), tiny_llama(4, layers=2, vocab=8, scale=0.4)
    local = LocalTeacher(teacher)
    engine: Any = VLLMEngine(save(student, Path(sys.argv[1])), EngineSizing(96, torch.float32, 256), teacher=local)
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    print(type(worker.model_runner.sampler).__name__)
    rollouts = engine.generate([PROMPT] * n, replace(SAMPLING, teacher_mix=alpha), list(range(n)))
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    assert fits(counts, enumerate_mixture(student, teacher, alpha), n)
    assert not fits(counts, enumerate_mixture(student, teacher, 0.2), n)
    moved = tiny_llama(8, layers=1, vocab=8, scale=0.4)
    engine.update_weights(plain_weights(moved, torch.float32), 1)
    sampling, prompts = Sampling(12, (1,), 5, teacher_mix=0.4), [[2], [3, 4, 2, 2, 3], [4] * 40] * 2
    there = engine.generate(prompts, sampling, list(range(6)))
    reference: Any = TransformersEngine(moved, teacher=local)
    here = reference.generate(prompts, sampling, list(range(6)))
    assert [r.response_ids for r in there] == [r.response_ids for r in here]
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.teacher.hidden, b.teacher.hidden, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(a.behaviour_logprobs, b.behaviour_logprobs, rtol=2e-3, atol=2e-3)
    engine.close()


if __name__ == "__main__":
    main()
