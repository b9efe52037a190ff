"""Real vLLM, started once for this file, on a tiny model of which every response can be enumerated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minillm.models.weights import plain_weights
from minillm.rollout.engine import Sampling
from minillm.rollout.teacher_mixed import TeacherMixedSampler
from minillm.rollout.vllm_engine import VLLMEngine, vllm_is_installed
from minillm.teacher.local import LocalTeacher
from tests.conftest import save, tiny_llama
from tests.rollout.test_teacher_mixed import chi_square, enumerate_mixture

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")]

SAMPLING = Sampling(3, (1,), 5, temperature=1.3)
PROMPT = [2, 4, 3]


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny_llama(3, layers=1, vocab=32, scale=0.4)


@pytest.fixture(scope="module")
def engine(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(save(student, tmp_path_factory.mktemp("vllm")), max_length=96, memory=0.25, dtype=torch.float32)
    yield engine
    engine.close()


@pytest.fixture
def as_saved(engine: VLLMEngine, student: Any) -> VLLMEngine:
    engine.update_weights(plain_weights(student, torch.float32), engine.version + 1)
    return engine


def own_logprobs(model: Any, prompt: list[int], response: list[int], sampling: Sampling) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : sampling.vocab_size]
    return torch.log_softmax(logits / sampling.temperature, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_logprobs_are_of_what_drew_the_token(as_saved: VLLMEngine, student: Any) -> None:
    sampling = Sampling(12, (1,), 20, temperature=0.8)
    prompts = [[2], [3, 5, 4, 2], [9] * 40]
    rollouts = as_saved.generate(prompts, sampling, [1, 2, 3])
    for r in rollouts:
        torch.testing.assert_close(r.student_logprobs, own_logprobs(student, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4)
        assert max(r.response_ids) < 20  # the rest of the head counts as padding
        assert r.finished == (r.response_ids[-1] == 1)
    assert [r.response_ids for r in as_saved.generate(prompts, sampling, [1, 2, 3])] == [r.response_ids for r in rollouts]
    assert [r.response_ids for r in as_saved.generate(prompts, sampling, [4, 5, 6])] != [r.response_ids for r in rollouts]


def test_named_tokens_are_scored(as_saved: VLLMEngine, student: Any) -> None:
    got = as_saved.logprobs_of([[2, 3], [4]], [[0, 3, 4], [2]], SAMPLING)
    for prefix, ids, values in zip([[2, 3], [4]], [[0, 3, 4], [2]], got, strict=True):
        want = torch.stack([own_logprobs(student, prefix, [token], SAMPLING)[0] for token in ids])
        torch.testing.assert_close(values, want, atol=1e-4, rtol=1e-4)


def test_new_weights_arrive_even_when_the_tied_embedding_alone_moves(as_saved: VLLMEngine, student: Any) -> None:
    moved = tiny_llama(3, layers=1, vocab=32, scale=0.4)
    with torch.no_grad():
        moved.model.embed_tokens.weight.mul_(1.5)
    before = as_saved.version
    as_saved.update_weights(plain_weights(moved, torch.float32), before + 7)
    sampling = Sampling(8, (1,), 32)
    [r] = as_saved.generate([[2, 3, 4]], sampling, [0])
    assert r.weights_version == before + 7
    torch.testing.assert_close(r.student_logprobs, own_logprobs(moved, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4)


def test_more_prompt_tokens_than_one_scheduler_step_takes(as_saved: VLLMEngine) -> None:
    """A seeded request prefilled in parts fails on vLLM's CPU build; none must be."""
    rollouts = as_saved.generate([[2] * 90] * 100, Sampling(2, (1,), 32), list(range(100)))
    assert len(rollouts) == 100


def test_mixture_frequencies(as_saved: VLLMEngine, student: Any) -> None:
    teacher, n, alpha = tiny_llama(4, layers=2, vocab=32, scale=0.4), 2000, 0.5
    sampler = TeacherMixedSampler(as_saved, LocalTeacher(teacher, 500), alpha, draft_tokens=3)
    counts = Counter(tuple(r.response_ids) for r in sampler.generate([PROMPT] * n, SAMPLING, list(range(n))))
    statistic, freedom = chi_square(counts, enumerate_mixture(student, teacher, alpha), n)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
