"""Sampling from the mixture: the draw by itself, and the transformers engine against the enumerated mixture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from minillm.data.logprobs import LOG_ZERO
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.mixture import MixedTokens, MixtureRecord, sample_mixture, uniform_numbers
from minillm.teacher.local import LocalTeacher
from tests.conftest import tiny_llama
from tests.rollout.mixture import EOS, LENGTH, PAIRS, PROMPT, SAMPLING, V, enumerate_mixture, fits


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny_llama(3, layers=1, vocab=8, scale=0.4), tiny_llama(4, layers=2, vocab=8, scale=0.4)


@pytest.mark.parametrize(
    ("size", "alpha", "temperature"), [(5, 0.2, 1.3), (300, 0.5, 0.7), (1000, 0.0, 1.0), (513, 0.9, 2.0)]
)
def test_draws_have_the_frequencies_of_the_mixture(size: int, alpha: float, temperature: float) -> None:
    generator, n = torch.Generator().manual_seed(size), 100_000
    student, teacher = (3 * torch.randn(1, size + 3, generator=generator) for _ in range(2))
    q, p = (torch.softmax(logits[0, :size].double() / temperature, -1) for logits in (student, teacher))
    counts: Counter = Counter()
    for part in uniform_numbers(range(n), [size] * n).split(20_000):
        drawn = sample_mixture(
            student.expand(len(part), -1), teacher.expand(len(part), -1), part, alpha, temperature, size
        )
        counts.update((token,) for token in drawn.tokens.tolist())
        torch.testing.assert_close(drawn.student_logprobs.double(), q.log()[drawn.tokens], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(drawn.teacher_logprobs.double(), p.log()[drawn.tokens], atol=1e-5, rtol=1e-5)
        want = (q * (q.log() - p.log())).sum().expand(len(part))
        torch.testing.assert_close(drawn.reverse_kl.double(), want, atol=1e-5, rtol=1e-5)
    mixture = ((1 - alpha) * q + alpha * p).tolist()
    assert fits(counts, {(token,): mass for token, mass in enumerate(mixture)}, n)
    wrong = ((0.9 - alpha) * q + (0.1 + alpha) * p).tolist()
    assert not fits(counts, {(token,): mass for token, mass in enumerate(wrong)}, n)


def test_every_row_has_a_share_and_a_temperature_of_its_own() -> None:
    logits = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0))
    uniform = uniform_numbers([1, 2], [0, 5])
    together = sample_mixture(logits[0], logits[1], uniform, torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]), 300)
    for row, (alpha, temperature) in enumerate([(0.0, 0.5), (1.0, 2.0)]):
        rows = slice(row, row + 1)
        alone = sample_mixture(logits[0, rows], logits[1, rows], uniform[rows], alpha, temperature, 300)
        assert together.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(together.student_logprobs[rows], alone.student_logprobs)
        torch.testing.assert_close(together.teacher_logprobs[rows], alone.teacher_logprobs)
        torch.testing.assert_close(together.reverse_kl[rows], alone.reverse_kl)


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.full((3, 400), -torch.inf)
    logits[:, 399] = 0.0
    extremes = torch.tensor([[0.0, 0.0], [0.99, 1 - 2**-53], [0.5, 0.5]], dtype=torch.float64)
    drawn = sample_mixture(logits, logits, extremes, 0.5, 1.0, 400)
    assert drawn.tokens.tolist() == [399] * 3
    assert drawn.student_logprobs.tolist() == [0.0] * 3
    assert drawn.reverse_kl.tolist() == [0.0] * 3
    logits[:, 0] = 0.0
    excluded = sample_mixture(logits, logits.roll(-1, 1), extremes, 0.5, 1.0, 400)  # p allows 398 and 399
    torch.testing.assert_close(excluded.reverse_kl, torch.full((3,), 0.5 * (math.log(0.5) - LOG_ZERO)))
    assert sample_mixture(logits, logits, extremes, 0.5, 1.0, 400).tokens.tolist() == [0, 399, 399]


def test_random_numbers_follow_from_seed_and_position() -> None:
    n = 50_000
    for numbers in (uniform_numbers(range(n), [0] * n), uniform_numbers([7] * n, range(n))):
        assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
        flat = torch.cat([numbers, numbers.roll(1, 0)], 1)  # neighbours in seed or position are independent
        correlations = torch.corrcoef(flat.T) - torch.eye(4, dtype=torch.float64)
        assert float(correlations.abs().max()) < 5 / n**0.5
        for column in numbers.T:
            assert fits(Counter((int(u * 100),) for u in column.tolist()), {(i,): 0.01 for i in range(100)}, n)
    seeds, positions = [3, 2**63 - 1, -5], [0, 4, 9]
    alone = torch.cat([uniform_numbers([s], [t]) for s, t in zip(seeds, positions, strict=True)])
    assert torch.equal(uniform_numbers(seeds, positions), alone)


def test_a_record_sorts_steps_and_drops_what_was_sampled_ahead() -> None:
    record = MixtureRecord()

    def add(keys: list[tuple[int, int]], values: list[float]) -> None:
        numbers = torch.tensor(values)
        record.add(keys, MixedTokens(numbers.long(), -numbers, -2 * numbers, 3 * numbers), numbers[:, None])

    add([(1, 0), (0, 0)], [10.0, 0.0])
    add([(0, 1), (1, 1)], [99.0, 11.0])
    add([(0, 1), (0, 2)], [1.0, 2.0])  # the first of them again: the later counts
    [(logq, first), (_, second)] = record.finish([2, 2])
    assert first.reverse_kl is not None
    assert first.reverse_kl.tolist() == [0.0, 3.0]
    assert logq.tolist() == [-0.0, -1.0]
    assert first.token_logprobs is not None
    assert first.token_logprobs.tolist() == [-0.0, -2.0]
    assert second.hidden is not None
    assert second.hidden[:, 0].tolist() == [10.0, 11.0]
    record = MixtureRecord()
    add([(0, 0), (1, 0), (1, 1)], [0.0, 1.0, 2.0])
    with pytest.raises(EngineError, match="did not sample token 1 of response 0 from the mixture"):
        record.finish([2, 2])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_frequencies_are_those_of_the_mixture(models: tuple[Any, Any], alpha: float) -> None:
    student, teacher = models
    n = 6000
    engine = TransformersEngine(student, 2000, teacher=LocalTeacher(teacher))
    rollouts = engine.generate([PROMPT] * n, replace(SAMPLING, teacher_mix=alpha), list(range(n)))
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    expected = enumerate_mixture(student, teacher, alpha)
    assert sum(expected.values()) == pytest.approx(1)
    assert fits(counts, expected, n)
    assert not fits(counts, enumerate_mixture(student, teacher, 0.4 if alpha < 0.4 else 0.2), n)
    # The behaviour log-probabilities are those that sampled the tokens.
    for r in rollouts[:50]:
        assert float(r.behaviour_logprobs.sum().exp()) == pytest.approx(expected[tuple(r.response_ids)], rel=1e-3)
    weights = torch.stack([(r.student_logprobs - r.behaviour_logprobs).sum().exp() for r in rollouts]).double()
    assert abs(float(weights.mean()) - 1) <= 4 * float(weights.std()) / n**0.5 + 1e-5


@pytest.mark.parametrize("name", PAIRS)
def test_frequencies_of_pairs(name: str) -> None:
    student, teacher = (make() for make in PAIRS[name])
    n = 6000
    engine = TransformersEngine(student, 2000, teacher=LocalTeacher(teacher))
    rollouts = engine.generate([PROMPT] * n, replace(SAMPLING, teacher_mix=0.5), list(range(n)))
    counts = Counter(tuple(r.response_ids) for r in rollouts)
    assert fits(counts, enumerate_mixture(student, teacher, 0.5), n)
    assert not fits(counts, enumerate_mixture(student, teacher, 0.2), n)


@pytest.mark.parametrize("name", PAIRS)
def test_states_and_logprobs_are_those_of_one_plain_forward(name: str) -> None:
    student, teacher = (make() for make in PAIRS[name])
    local = LocalTeacher(teacher)
    sampling = Sampling(12, (EOS,), V, teacher_mix=0.5)
    prompts = [[2], [3, 4, 2, 2, 3, 0, 4], [4, 4]] * 4
    engine = TransformersEngine(student, teacher=local)
    rollouts = engine.generate(prompts, sampling, list(range(12)))
    assert max(len(r.response_ids) for r in rollouts) > 4
    for r, hidden in zip(rollouts, local.hidden(prompts, [r.response_ids for r in rollouts]), strict=True):
        assert r.teacher is not None
        assert r.teacher.hidden is not None
        torch.testing.assert_close(r.teacher.hidden, hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            r.teacher.token_logprobs, local.token_logprobs(hidden, r.response_ids, sampling), rtol=1e-4, atol=1e-4
        )
        for t, token in enumerate(r.response_ids):
            logits = student(torch.tensor([[*r.prompt_ids, *r.response_ids[:t]]])).logits[0, -1, :V].detach()
            assert float(torch.log_softmax(logits, -1)[token]) == pytest.approx(float(r.student_logprobs[t]), abs=1e-4)


def test_the_same_seeds_draw_the_same_and_rows_do_not_depend_on_their_company(models: tuple[Any, Any]) -> None:
    student, teacher = models
    engine = TransformersEngine(student, teacher=LocalTeacher(teacher))
    sampling = Sampling(8, (EOS,), V, teacher_mix=0.3)

    def sample(prompts: list[list[int]], seeds: list[int]) -> list[Rollout]:
        return engine.generate(prompts, sampling, seeds)

    together = sample([PROMPT, [2], [3, 3]], [7, 8, 9])
    alone = [sample([p], [s])[0] for p, s in (([*PROMPT], 7), ([2], 8), ([3, 3], 9))]
    assert [r.response_ids for r in together] == [r.response_ids for r in alone]
    assert [r.response_ids for r in sample([PROMPT] * 9, list(range(9)))] != [together[0].response_ids] * 9


def test_responses_end_at_eos_or_at_the_limit(models: tuple[Any, Any]) -> None:
    student, teacher = models
    engine = TransformersEngine(student, teacher=LocalTeacher(teacher))
    # One response in 140 reaches the limit.
    rollouts = engine.generate([PROMPT] * 600, Sampling(4, (EOS, 3), V, teacher_mix=0.5), list(range(600)))
    ends = {True: 0, False: 0}
    for r in rollouts:
        assert not set(r.response_ids[:-1]) & {EOS, 3}
        assert r.finished == (r.response_ids[-1] in (EOS, 3))
        assert r.finished or len(r.response_ids) == 4
        assert max(r.response_ids) < V  # padded vocabulary rows are never sampled
        ends[r.finished] += 1
    assert min(ends.values()) > 0


def test_an_engine_refuses_what_it_cannot_mix(models: tuple[Any, Any]) -> None:
    student, teacher = models
    mixed = replace(SAMPLING, teacher_mix=0.5)
    with pytest.raises(EngineError, match="started without a teacher"):
        TransformersEngine(student).generate([PROMPT], mixed, [0])
    engine = TransformersEngine(student, teacher=LocalTeacher(teacher))
    for setting in ({"top_logprobs": 2}, {"no_repeat_ngram": 3}):
        with pytest.raises(EngineError, match="an engine that mixes returns no top_logprobs and blocks no n-grams"):
            engine.generate([PROMPT], replace(mixed, **setting), [0])


def test_the_enumeration_is_complete(models: tuple[Any, Any]) -> None:
    assert len(enumerate_mixture(*models, 0.2)) == sum(4**n for n in range(3)) + 4**3
    assert all(len(key) <= LENGTH for key in enumerate_mixture(*models, 0.2))
