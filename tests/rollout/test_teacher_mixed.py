"""Teacher-mixed sampling against the enumerated mixture, on the transformers engine."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.samplers import teacher_mixed
from minillm.rollout.samplers.teacher_mixed import ROUND_COST, TeacherMixedSampler, draft_length
from minillm.teacher.local import LocalTeacher
from tests.conftest import tiny_llama

V, LENGTH, EOS = 5, 3, 1
SAMPLING = Sampling(LENGTH, (EOS,), V, temperature=1.3)
PROMPT = [2, 4, 3]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny_llama(3, layers=1, vocab=8, scale=0.4), tiny_llama(4, layers=2, vocab=8, scale=0.4)


def distribution(model: Any, prefix: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1, :V]
    return torch.softmax(logits.double() / SAMPLING.temperature, -1)


def enumerate_mixture(student: Any, teacher: Any, alpha: float) -> dict[tuple[int, ...], float]:
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    done = {}
    for _ in range(LENGTH):
        longer = {}
        for prefix, mass in probability.items():
            mix = (1 - alpha) * distribution(student, prefix) + alpha * distribution(teacher, prefix)
            for token in range(V):
                (done if token == EOS else longer)[(*prefix, token)] = mass * float(mix[token])
        probability = longer
    return {**done, **probability}


def chi_square(counts: Counter, expected: dict[tuple[int, ...], float], n: int) -> tuple[float, int]:
    pooled, statistic, cells = [0.0, 0.0], 0.0, 0
    for key, p in expected.items():
        if p * n < 5:
            pooled[0] += counts[key]
            pooled[1] += p * n
        else:
            statistic += (counts[key] - p * n) ** 2 / (p * n)
            cells += 1
    if pooled[1] > 0:
        statistic += (pooled[0] - pooled[1]) ** 2 / pooled[1]
        cells += 1
    return statistic, cells - 1


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_frequencies_are_those_of_the_mixture(models: tuple[Any, Any], alpha: float) -> None:
    student, teacher = models
    engine, n = TransformersEngine(student, batch_size=2000), 6000
    seeds = list(range(n))
    if alpha:
        sampler = TeacherMixedSampler(LocalTeacher(teacher, 2000), alpha, draft_tokens=2)
        rollouts = sampler.generate(engine, [PROMPT] * n, SAMPLING, seeds)
    else:
        rollouts = engine.generate([PROMPT] * n, SAMPLING, seeds)
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    expected = enumerate_mixture(student, teacher, alpha)
    assert sum(expected.values()) == pytest.approx(1)
    statistic, freedom = chi_square(counts, expected, n)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    # The behaviour log-probabilities are those that sampled the tokens.
    for r in rollouts[:50]:
        assert float(r.behaviour_logprobs.sum().exp()) == pytest.approx(expected[tuple(r.response_ids)], rel=1e-3)
    weights = torch.stack([(r.student_logprobs - r.behaviour_logprobs).sum().exp() for r in rollouts]).double()
    assert abs(float(weights.mean()) - 1) <= 4 * float(weights.std()) / n**0.5 + 1e-5


def test_frequencies_where_most_of_q_has_to_be_asked_for(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each position only the most likely token is known, and the rejected one, which bounds no other."""
    monkeypatch.setattr(teacher_mixed, "TOP_LOGPROBS", 1)
    student, teacher = models
    asked = 0

    class Counted(TransformersEngine):
        def logprobs_of(self, prefixes: Any, ids: Any, sampling: Any) -> Any:
            nonlocal asked
            asked += len(prefixes)
            return super().logprobs_of(prefixes, ids, sampling)

    n = 12_000
    sampler = TeacherMixedSampler(LocalTeacher(teacher, 3000), 0.5, draft_tokens=2)
    rollouts = sampler.generate(Counted(student, 3000), [PROMPT] * n, SAMPLING, list(range(n)))
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    statistic, freedom = chi_square(counts, enumerate_mixture(student, teacher, 0.5), n)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    assert asked > 100


def test_the_wrong_mixture_is_noticed(models: tuple[Any, Any]) -> None:
    """The test above can fail: frequencies of α = 0.5 are not accepted for α = 0.2."""
    student, teacher = models
    sampler = TeacherMixedSampler(LocalTeacher(teacher, 2000), 0.5, draft_tokens=2)
    n = 6000
    rollouts = sampler.generate(TransformersEngine(student, 2000), [PROMPT] * n, SAMPLING, list(range(n)))
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    statistic, freedom = chi_square(counts, enumerate_mixture(student, teacher, 0.2), n)
    assert statistic > freedom + 4 * (2 * freedom) ** 0.5


def test_kept_states_and_logprobs_are_those_of_one_plain_forward(models: tuple[Any, Any]) -> None:
    """The append-only cache with masked slots changes nothing, whatever was drafted and retracted."""
    student, teacher = models
    local = LocalTeacher(teacher)
    sampling = Sampling(12, (EOS,), V)
    prompts = [[2], [3, 4, 2, 2, 3], [4, 4]] * 4
    sampler = TeacherMixedSampler(local, 0.5, draft_tokens=4)
    rollouts = sampler.generate(TransformersEngine(student), prompts, sampling, list(range(12)))
    assert sampler.accepted < sampler.drafted  # something was retracted
    for r, hidden in zip(rollouts, local.hidden(prompts, [r.response_ids for r in rollouts]), strict=True):
        assert r.teacher is not None
        assert r.teacher.hidden is not None
        torch.testing.assert_close(r.teacher.hidden, hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            r.teacher.token_logprobs, local.token_logprobs(hidden, r.response_ids, sampling), rtol=1e-4, atol=1e-4
        )
        for t, token in enumerate(r.response_ids):
            logits = student(torch.tensor([[*r.prompt_ids, *r.response_ids[:t]]])).logits[0, -1, :V]
            assert float(torch.log_softmax(logits, -1)[token]) == pytest.approx(float(r.student_logprobs[t]), abs=1e-4)


def test_the_same_seeds_draw_the_same_and_rows_do_not_depend_on_their_company(models: tuple[Any, Any]) -> None:
    student, teacher = models
    sampling = Sampling(8, (EOS,), V)

    def sample(prompts: list[list[int]], seeds: list[int]) -> list[Rollout]:
        sampler = TeacherMixedSampler(LocalTeacher(teacher), 0.3, 3)
        return sampler.generate(TransformersEngine(student), prompts, sampling, seeds)

    together = sample([PROMPT, [2], [3, 3]], [7, 8, 9])
    alone = [sample([p], [s])[0] for p, s in (([*PROMPT], 7), ([2], 8), ([3, 3], 9))]
    assert [r.response_ids for r in together] == [r.response_ids for r in alone]


def test_responses_end_at_eos_or_at_the_limit(models: tuple[Any, Any]) -> None:
    student, teacher = models
    sampling = Sampling(4, (EOS, 3), V)
    rollouts = TeacherMixedSampler(LocalTeacher(teacher), 0.5, 8).generate(
        TransformersEngine(student),
        [PROMPT] * 600,
        sampling,
        list(range(600)),  # one in 140 reaches the limit
    )
    ends = {True: 0, False: 0}
    for r in rollouts:
        assert not set(r.response_ids[:-1]) & {EOS, 3}
        assert r.finished == (r.response_ids[-1] in (EOS, 3))
        assert r.finished or len(r.response_ids) == 4
        assert max(r.response_ids) < V  # padded vocabulary rows are never sampled
        ends[r.finished] += 1
    assert min(ends.values()) > 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.9, 0.97])
def test_the_draft_length_wastes_least(acceptance: float, kind: str) -> None:
    """The draft length is compared with simulated rounds: tokens gained per step of cost."""
    draw, rounds, longest = torch.Generator().manual_seed(0), 100_000, 50
    refused = torch.rand(rounds, longest, generator=draw) >= acceptance
    first = torch.where(refused.any(1), refused.int().argmax(1), longest)  # accepted tokens before the first refusal
    gain = {k: float((first + 1).clamp(max=k).double().mean()) / (k + ROUND_COST[kind]) for k in range(1, longest + 1)}
    assert gain[draft_length(acceptance, kind)] == pytest.approx(max(gain.values()), rel=2e-3)


def test_itertools_of_the_world_is_complete(models: tuple[Any, Any]) -> None:
    assert len(enumerate_mixture(*models, 0.2)) == sum(4**n for n in range(3)) + 4**3
    assert all(len(key) <= LENGTH for key in itertools.chain(enumerate_mixture(*models, 0.2)))
