"""A few weighted tokens in place of a distribution: what is unbiased, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.teacher.config import SamplerConfig
from minillm.teacher.sampling import Sample, sample, threshold

WORDS = 50


def a_distribution(words: int = WORDS, slope: float = 1.3) -> Tensor:
    p = torch.arange(1, words + 1, dtype=torch.float64) ** -slope
    g = torch.Generator().manual_seed(2)
    return (p / p.sum())[torch.randperm(words, generator=g)]


def dense(found: Sample, words: int) -> Tensor:
    return torch.zeros(len(found.ids), words, dtype=torch.float64).scatter_add(1, found.ids, found.weights)


def drawn(method: str, p: Tensor, tokens: int, times: int, temperature: float = 1.0) -> Sample:
    config = SamplerConfig.model_validate({"method": method, "tokens": tokens})
    return sample(p.log().expand(times, -1), config, temperature, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("slots", [1, 5, 12])
def test_the_expectation_of_threshold_is_p(slots: int) -> None:
    """Its one uniform number is enumerated, not sampled."""
    p, grid = a_distribution(), 200_000
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros(WORDS, dtype=torch.float64)
    for part in ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).split(50_000):
        found = threshold(p.expand(len(part), -1), slots, part, order)
        torch.testing.assert_close(
            found.weights.sum(-1), torch.ones(len(part), dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert bool((found.ids.sort(-1).values.diff(dim=-1) > 0).all()), "distinct"
        assert bool((found.counts == slots).all())
        shared = found.weights.gather(1, (found.explicit - 1)[:, None])
        later = torch.arange(slots) >= found.explicit[:, None]
        torch.testing.assert_close(found.weights[later], shared.expand(-1, slots)[later])
        mean += dense(found, WORDS).sum(0)
    torch.testing.assert_close(mean / grid, p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [4, 9])
def test_what_is_always_kept_leaves_the_expectation_p(slots: int) -> None:
    p, grid = a_distribution(), 200_000
    rare, likely = int(p.argsort()[20]), int(p.argmax())
    assert p[rare] < 1 / slots / 4, "left to the draw if nothing is said"
    certain = torch.zeros(WORDS, dtype=torch.bool)
    certain[[rare, likely]] = True
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(1))
    mean = torch.zeros(WORDS, dtype=torch.float64)
    for part in ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).split(50_000):
        found = threshold(p.expand(len(part), -1), slots, part, order, certain.expand(len(part), -1))
        every = dense(found, WORDS)
        torch.testing.assert_close(every[:, [rare, likely]], p[[rare, likely]].expand(len(part), -1))
        torch.testing.assert_close(every.sum(-1), torch.ones(len(part), dtype=torch.float64), rtol=0, atol=1e-12)
        assert bool((found.ids.sort(-1).values.diff(dim=-1) > 0).all()), "distinct"
        shared = found.weights.gather(1, (found.explicit - 1)[:, None])
        later = torch.arange(slots) >= found.explicit[:, None]
        torch.testing.assert_close(found.weights[later], shared.expand(-1, slots)[later])
        mean += every.sum(0)
    torch.testing.assert_close(mean / grid, p, rtol=0, atol=1e-5)


def test_only_what_reaches_the_floor_is_always_kept() -> None:
    p, times = a_distribution(), 400
    order = p.argsort(descending=True)
    above, below = int(order[25]), int(order[45])
    floor = float(p[order[30]])
    config = SamplerConfig(tokens=6, floor=floor)
    always = torch.tensor([[above, below]]).expand(times, -1)
    every = dense(sample(p.log().expand(times, -1), config, 1.0, torch.Generator().manual_seed(0), always), WORDS)
    torch.testing.assert_close(every[:, above], p[above].expand(times))
    assert int((every[:, below] > 0).sum()) < times / 4
    few = sample(p.log().expand(times, -1), SamplerConfig(tokens=3, floor=floor), 1.0, torch.Generator(), always)
    assert int((dense(few, WORDS)[:, above] > 0).sum()) < times / 4, "too few slots for two more"


def test_the_error_of_threshold_is_the_least_there_is() -> None:
    p, slots, times = a_distribution(), 8, 20_000
    found = drawn("threshold", p, slots, times)
    error = (dense(found, WORDS) - p).square().sum(-1).mean()
    level = found.weights[0, -1]
    tail = p[p < level]
    assert float(error) == pytest.approx(float((tail * (level - tail)).sum()), rel=0.02)
    assert error < (dense(drawn("random", p, slots, times), WORDS) - p).square().sum(-1).mean() / 3


@pytest.mark.parametrize("tokens", [WORDS, 255])
def test_as_many_tokens_as_there_are_give_p_itself(tokens: int) -> None:
    p = a_distribution()
    torch.testing.assert_close(dense(drawn("threshold", p, tokens, 1), WORDS)[0], p, rtol=0, atol=1e-15)
    few = torch.zeros_like(p).index_copy(0, torch.tensor([3, 9]), torch.tensor([0.25, 0.75], dtype=torch.float64))
    found = drawn("threshold", few, 6, 4)
    assert found.counts.tolist() == [2] * 4
    torch.testing.assert_close(dense(found, WORDS), few.expand(4, -1))


@pytest.mark.parametrize(("method", "unbiased"), [("threshold", True), ("random", True), ("top_p_k", False)])
def test_the_mean_gradient_over_draws_comes_to_the_full_one(method: str, unbiased: bool) -> None:
    """The gradient by the logits is q − p̂: its error falls as 1/√n, and that of truncation does not."""
    p, errors = a_distribution(), []
    for times in (100, 10_000):
        mean = dense(drawn(method, p, 6, times), WORDS).mean(0)
        errors.append(float((mean - p).norm()))
    ratio = errors[0] / errors[1]
    assert (4 < ratio < 25) if unbiased else ratio == pytest.approx(1)


def test_random_weights_are_shares_of_the_draws() -> None:
    found = drawn("random", a_distribution(), 20, 50)
    shares = found.weights * 20
    torch.testing.assert_close(shares, shares.round())
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(50, dtype=torch.float64))
    assert bool(((found.weights > 0).sum(-1) == found.counts).all())


def test_top_p_k_chooses_at_temperature_one_and_weights_at_its_own() -> None:
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04], dtype=torch.float64)
    config = SamplerConfig(method="top_p_k", tokens=4, top_p=0.85)
    found = sample(p.log()[None], config, 2.0, torch.Generator())
    expected = p[:3].sqrt() / p[:3].sqrt().sum()
    assert found.counts.item() == 3
    torch.testing.assert_close(found.weights[0, :3], expected)
    two = sample(p.log()[None], config.model_copy(update={"tokens": 2}), 1.0, torch.Generator())
    torch.testing.assert_close(two.weights[0], torch.tensor([0.625, 0.375], dtype=torch.float64))
    torch.testing.assert_close(two.kept[0], torch.tensor(0.8, dtype=torch.float64))


def test_the_temperature_is_that_of_the_distribution_that_is_sampled() -> None:
    p = a_distribution()
    found = drawn("threshold", p, WORDS, 1, temperature=2.0)
    expected = p.sqrt() / p.sqrt().sum()
    torch.testing.assert_close(dense(found, WORDS)[0], expected)
    torch.testing.assert_close(found.entropy[0], -(expected * expected.log()).sum())
