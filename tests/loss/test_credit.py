"""Returns and importance weights, compared with loops that follow the equations literally."""

from __future__ import annotations

import pytest
import torch

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import ReturnWalk, SampledTokens

LENGTHS = [5, 1, 9, 2, 40]


def tokens(lengths: list[int] = LENGTHS, seed: int = 0) -> SampledTokens:
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    draw = lambda: -2 * torch.rand(n, generator=g, dtype=torch.float64)  # noqa: E731
    return SampledTokens(draw(), draw(), draw(), torch.tensor(lengths))


def naive_returns(rewards: list[float], lengths: list[int], gamma: float, first: int) -> list[float]:
    out, start = [], 0
    for n in lengths:
        r = rewards[start : start + n]
        out += [sum(gamma ** (k - t - first) * r[k] for k in range(t + first, n)) for t in range(n)]
        start += n
    return out


@pytest.mark.parametrize("stretch", [1, 3, 8, 100])
@pytest.mark.parametrize(("return_from", "first"), [("next", 1), ("current", 0)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_walk_in_any_stretches_sums_the_future(stretch: int, return_from: str, first: int, gamma: float) -> None:
    data = tokens()
    assert data.teacher_logprobs is not None
    rewards = data.teacher_logprobs - data.student_logprobs
    walk = ReturnWalk(data.segments, gamma, return_from)
    got = torch.empty_like(rewards)
    for start in range((len(rewards) - 1) // stretch * stretch, -1, -stretch):
        part = slice(start, min(start + stretch, len(rewards)))
        got[part] = walk(part, rewards[part])
    want = naive_returns(rewards.tolist(), LENGTHS, gamma, first)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.9, 0.5])
def test_long_responses_stay_finite(gamma: float) -> None:
    data = tokens([4096, 3])
    values = credit.returns(torch.ones(4099), data, Objective.paper(discount=gamma, length_norm=False))
    assert torch.isfinite(values).all()
    assert values[0] == pytest.approx(4095 if gamma == 1 else (1 - gamma**4095) / (1 - gamma), rel=1e-5)


def test_length_norm_divides_by_the_number_of_rewards() -> None:
    data = tokens([3])
    values = credit.returns(torch.tensor([1.0, 2.0, 4.0]), data, Objective.paper())
    assert values.tolist() == [3.0, 4.0, 0.0]  # (2+4)/2, 4/1, no reward after the last token
    current = credit.returns(torch.tensor([1.0, 2.0, 4.0]), data, Objective.paper(return_from="current"))
    assert current.tolist() == pytest.approx([7 / 3, 3.0, 4.0])


def test_token_and_prefix_weights_follow_their_products() -> None:
    data = tokens()
    rho = (data.student_logprobs - data.behaviour_logprobs).exp()
    torch.testing.assert_close(credit.token_weights(data), rho)
    before, including = credit.prefix_weights(data)
    start = 0
    for n in LENGTHS:
        product = 1.0
        for t in range(start, start + n):
            assert float(before[t]) == pytest.approx(product, rel=1e-9)
            product *= float(rho[t])
            assert float(including[t]) == pytest.approx(product, rel=1e-9)
        start += n
    assert float(credit.prefix_weights(data, truncation=1.5)[1].max()) <= 1.5


def test_rewards_are_scaled_then_clipped() -> None:
    logp, logq = torch.tensor([-3.0, -1.0]), torch.tensor([-1.0, -9.0])
    objective = Objective.paper(reward_scale=0.5, reward_clip=5.0)
    assert credit.sampled_rewards(logp, logq, objective).tolist() == [-4.0, 5.0]


def test_whitening_over_padding_is_whitening_of_the_padded_block() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    block = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 0.0])
    want = (block - block.mean()) * torch.rsqrt(block.var(unbiased=False) + 1e-8)
    torch.testing.assert_close(credit.whiten(values, slots=6), want[:3])
    assert float(credit.whiten(values).mean()) == pytest.approx(0, abs=1e-6)
