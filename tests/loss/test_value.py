"""The linear value of a prefix: what it knows, how it is fitted, and the advantages that it leaves."""

from __future__ import annotations

import pytest
import torch

from minillm.loss import credit, value
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens

LENGTHS = [5, 1, 30, 3, 2]


def tokens(seed: int = 0) -> tuple[SampledTokens, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64)  # noqa: E731
    old = -draw()
    sampled = SampledTokens(old, old, None, torch.tensor(LENGTHS), draw())
    sampled.offset = torch.full_like(old, 0.4)
    return sampled, draw()


def test_features_depend_on_the_tokens_before_only() -> None:
    sampled, entropy = tokens()
    assert sampled.reverse_kl is not None
    phi = value.features(sampled, entropy)
    assert phi.shape == (sum(LENGTHS), value.NUM_FEATURES)
    start = 6  # of the third response
    assert phi[start + 4].tolist() == pytest.approx(
        [1, float(sampled.reverse_kl[10]), float(entropy[10]), float(sampled.reverse_kl[6:11].mean()), 0.05]
    )
    later = sampled.reverse_kl.clone()
    later[11:] += 1.0
    changed = SampledTokens(sampled.student_logprobs, sampled.behaviour_logprobs, None, sampled.lengths, later)
    torch.testing.assert_close(value.features(changed, entropy)[6:11], phi[6:11])


def test_the_fit_is_least_squares_over_all_processes() -> None:
    sampled, entropy = tokens()
    phi, theta = value.features(sampled, entropy), torch.tensor([0.3, -1.0, 0.5, 2.0, -0.7], dtype=torch.float64)
    assert value.fit(phi, phi @ theta) == pytest.approx(theta.tolist(), rel=0.05, abs=0.02)
    parts = [(phi[:9], (phi @ theta)[:9]), (phi[9:], (phi @ theta)[9:])]
    sums = [(a.t() @ a, a.t() @ b) for a, b in parts]
    assert value.fit(*parts[0], lambda _: sums) == pytest.approx(value.fit(phi, phi @ theta))


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("trace", [1.0, 0.8, 0.0])
def test_advantages_are_those_of_a_plain_loop(trace: float, discount: float) -> None:
    sampled, entropy = tokens()
    assert sampled.reverse_kl is not None
    objective = Objective.rate(baseline="value", trace=trace, discount=discount)
    phi, theta = value.features(sampled, entropy), [0.3, -1.0, 0.5, 2.0, -0.7]
    baseline, returns = value.baselines_by_value(sampled, objective, phi, theta)
    got, first = returns - baseline, 0
    for n in LENGTHS:
        f = [*(phi[first : first + n] @ phi.new_tensor(theta)).tolist(), 0.0]
        x = [*(0.4 - sampled.reverse_kl[first : first + n]).tolist(), 0.0]
        delta = [x[t + 1] + discount * f[t + 1] - f[t] if t + 1 < n else -f[t] for t in range(n)]
        for t in range(n):
            want = sum((discount * trace) ** (k - t) * delta[k] for k in range(t, n))
            assert float(got[first + t]) == pytest.approx(want, rel=1e-9, abs=1e-12)
            if trace == 1:
                total = sum(discount ** (k - t - 1) * x[k] for k in range(t + 1, n))
                assert want == pytest.approx(total - f[t], rel=1e-9, abs=1e-9)
        first += n


def test_the_first_batch_has_no_value() -> None:
    sampled, entropy = tokens()
    objective = Objective.rate(baseline="value", trace=0.5)
    baseline, returns = value.baselines_by_value(sampled, objective, value.features(sampled, entropy), [])
    assert float(baseline.abs().max()) == 0
    rewards = credit.precomputed_rewards(sampled, objective)
    assert rewards is not None
    torch.testing.assert_close(returns, credit.returns(rewards + 0.4, sampled, objective))
