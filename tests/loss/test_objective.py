"""The oracle: every response of a toy world is enumerated in float64, and the estimator's expectation under the
distribution that draws it is held against the exact gradient of KL(q‖p)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.credit import SampledTokens
from minillm.loss.objective import OnPolicyLoss
from minillm.loss.token_scores import Head, token_scores
from minillm.recipe import Objective

V, LENGTH, H, EOS = 3, 3, 4, 0


@dataclass
class World:
    """Student and teacher states for every prefix of a three-token vocabulary, up to LENGTH tokens."""

    states: Tensor  # [prefixes, H], the student's parameters
    head: Tensor
    teacher_states: Tensor
    teacher_head: Tensor
    place: dict[tuple[int, ...], int]

    @classmethod
    def random(cls, seed: int) -> World:
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(V), repeat=n) if EOS not in p]
        make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        return cls(
            make(len(prefixes), H).requires_grad_(), make(V, H).requires_grad_(), make(len(prefixes), H), make(V, H),
            {p: i for i, p in enumerate(prefixes)},
        )  # fmt: skip

    def responses(self) -> list[tuple[int, ...]]:
        """Finished ones, and those cut at LENGTH."""
        found = []
        for n in range(1, LENGTH + 1):
            for y in itertools.product(range(V), repeat=n):
                if EOS not in y[:-1] and (y[-1] == EOS or n == LENGTH):
                    found.append(y)
        return found

    def rows(self, y: tuple[int, ...]) -> list[int]:
        return [self.place[y[:t]] for t in range(len(y))]

    def logq(self) -> Tensor:
        return torch.log_softmax(self.states @ self.head.t(), -1)

    def logp(self) -> Tensor:
        return torch.log_softmax(self.teacher_states @ self.teacher_head.t(), -1)

    def exact(self) -> list[Tensor]:
        """Gradient of Σ_y q(y) log q(y)/p(y)."""
        logq, logp = self.logq(), self.logp()
        total = torch.zeros((), dtype=torch.float64)
        for y in self.responses():
            index = torch.tensor(self.rows(y)), torch.tensor(y)
            total = total + logq[index].sum().exp() * (logq[index] - logp[index]).sum()
        return list(torch.autograd.grad(total, [self.states, self.head]))

    def one(self, y: tuple[int, ...], objective: Objective, alpha: float) -> tuple[float, list[Tensor]]:
        """Probability of a response under the mixture, and the estimator's gradient on it."""
        rows, ids = torch.tensor(self.rows(y)), torch.tensor(y)
        q, p = self.logq().detach()[rows, ids], self.logp()[rows, ids]
        behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
        loss_of = OnPolicyLoss(objective, SampledTokens(q, behaviour, p, torch.tensor([len(y)])))
        loss, _ = token_scores(
            self.states[rows], Head(self.head), ids, self.teacher_states[rows], Head(self.teacher_head), weigh=loss_of, chunk=2
        )
        return float(behaviour.sum().exp()), list(torch.autograd.grad(loss, [self.states, self.head]))

    def expectation(self, objective: Objective, alpha: float) -> list[Tensor]:
        total: Any = None
        for y in self.responses():
            probability, grads = self.one(y, objective, alpha)
            grads = [probability * g for g in grads]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        return total

    def bias(self, objective: Objective, alpha: float) -> float:
        exact, got = (torch.cat([g.flatten() for g in gs]) for gs in (self.exact(), self.expectation(objective, alpha)))
        return float((got - exact).norm() / exact.norm())


def median_bias(objective: Objective, alpha: float) -> float:
    return float(torch.tensor([World.random(seed).bias(objective, alpha) for seed in range(20)]).median())


UNBIASED_PAPER = {"length_norm": False, "clip": None}


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("reward", ["expected", "sampled"])
def test_exact_is_unbiased_at_every_mix(alpha: float, reward: str) -> None:
    objective = Objective.exact(reward=reward)
    for seed in range(3):
        assert World.random(seed).bias(objective, alpha) < 1e-9


def test_the_paper_without_norm_and_clip_is_unbiased_on_policy() -> None:
    for seed in range(3):
        assert World.random(seed).bias(Objective.paper(**UNBIASED_PAPER), 0.0) < 1e-9


# Median relative bias over 20 worlds, lengths up to 3.
@pytest.mark.parametrize(
    ("objective", "alpha", "low", "high"),
    [
        (Objective.paper(**UNBIASED_PAPER), 0.2, 0.10, 0.30),
        (Objective.recommended(length_norm=False, baseline="none", clip=None), 0.2, 0.03, 0.12),
        (Objective.recommended(length_norm=False, baseline="none", clip=None), 0.5, 0.08, 0.28),
        (Objective.exact(reward="sampled", return_from="current"), 0.2, 0.4, 1.3),
    ],
)
def test_the_bias_of_each_approximation_is_a_known_number(objective: Objective, alpha: float, low: float, high: float) -> None:
    assert low < median_bias(objective, alpha) < high


def test_gradients_match_a_plain_loop_response_by_response() -> None:
    """A reward that is not detached has mean zero and passes the expectation; it does not pass this."""
    world = World.random(5)
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        logq, logp = world.logq()[rows], world.logp()[rows]
        q_token, p_token = logq.gather(1, ids[:, None])[:, 0], logp.gather(1, ids[:, None])[:, 0]
        kl = (logq.exp() * (logq - logp)).sum(-1)
        reward = (p_token - q_token).detach()
        loss = kl.sum()
        for t in range(len(y)):
            future = reward[t + 1 :].mean() if t + 1 < len(y) else torch.zeros((), dtype=torch.float64)
            loss = loss - q_token[t] * future
        want = torch.autograd.grad(loss, [world.states, world.head])
        _, got = world.one(y, Objective.paper(), alpha=0.0)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_clip_stops_the_gradient_of_a_token_that_moved_far_enough() -> None:
    old = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))
    data = SampledTokens(old, old, old + torch.tensor([0.0, 1.0]), torch.tensor([2]))
    loss = OnPolicyLoss(Objective.paper(single_step=0.0), data)
    from minillm.loss.token_scores import TokenScores

    zeros = torch.zeros(2, dtype=torch.float64)
    for ratio, active in ((1.1, True), (1.3, False)):
        now = old + torch.log(torch.tensor([ratio, 1.0], dtype=torch.float64))
        _, weights = loss(slice(0, 2), TokenScores(now, old, zeros, zeros, zeros))
        assert weights.logq is not None
        assert (float(weights.logq[0]) != 0) is active  # its advantage is +1


def test_what_cannot_be_combined_cannot_be_written() -> None:
    for bad in ({"preset": "recommended", "weight_in_clip": True, "clip": None}, {"reward_scale": 2.0}, {"baseline": "whiten"}):
        with pytest.raises(ValueError, match=r"weight_in_clip|reward_scale|whiten"):
            Objective.model_validate(bad)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_baseline_has_the_mean_of_the_expected_returns(alpha: float) -> None:
    """Tokens come from the mixture, so sampled rewards need their weights before their mean is that of −KL."""
    world, objective = World.random(2), Objective.recommended(length_norm=False)
    logq, logp = world.logq().detach(), world.logp()
    kl = (logq.exp() * (logq - logp)).sum(-1)
    sampled, expected = 0.0, 0.0
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        q, p = logq[rows, ids], logp[rows, ids]
        behaviour = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
        probability = float(behaviour.sum().exp())
        total, _ = credit.return_sum(SampledTokens(q, behaviour, p, torch.tensor([len(y)])), objective)
        sampled += probability * float(total)
        expected += probability * float(sum(-kl[rows][t + 1 :].sum() for t in range(len(y))))
    assert sampled == pytest.approx(expected, rel=1e-9)
